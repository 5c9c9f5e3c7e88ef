"""The options the helper itself needs.

The helper never gets a directory from the agent: it reads the directory from
the configuration files, as the agent does. Started by fork it inherits what
was read; started by ``helper_command`` it reads the same files by itself. So
these two options belong to the helper, and the agent takes them from here.
"""

from oslo_config import cfg

INSTANCES_PATH = cfg.StrOpt(
    "instances_path",
    default="/var/lib/bootwright/instances",
    regex=r"^/[^\0]*$",
    help="Directory of the instances, with the image cache in it: an absolute path on a local "
    "filesystem. Neither its last component nor the image cache in it may be a symbolic link. "
    "Read once, at start.",
)

SUBDIRECTORY_NAME = cfg.StrOpt(
    "subdirectory_name",
    default="_base",
    regex=r"^(?!\.{1,2}$)[^/\0]+$",
    help="Name of the directory of the image cache inside instances_path: one name, not a path. "
    "The locks of the bases are in it too (.locks), because hosts that share it have to share "
    "them. Read once, at start.",
)


def register(conf: cfg.ConfigOpts) -> None:
    """Make both options known to `conf`; doing it twice does no harm."""
    conf.register_opt(INSTANCES_PATH)
    conf.register_opt(SUBDIRECTORY_NAME, group="image_cache")
