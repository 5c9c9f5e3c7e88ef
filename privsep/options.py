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

# What lvm(8) takes for a name, but for those that would look like an option or a place.
_LVM_NAME = r"^(?!\.{1,2}$)[A-Za-z0-9_.+][A-Za-z0-9_.+-]*$"

VOLUME_GROUP = cfg.StrOpt(
    "images_volume_group",
    regex=_LVM_NAME,
    help="Name of the LVM volume group for disks of images_type lvm; there are none if it is not "
    "set. Other volumes may be in it. Read once, at start.",
)

THIN_POOL = cfg.StrOpt(
    "images_thin_pool",
    regex=_LVM_NAME,
    help="Name of a thin pool in images_volume_group, which zeroes its blocks. Disks are made in "
    "it, as snapshots of their base, and take space when the guest writes. If not set every disk "
    "is a full copy and takes all its space at once. Read once, at start.",
)

CIPHER = cfg.StrOpt(
    "cipher",
    default="aes-xts-plain64",
    regex=r"^[a-z0-9]+(-[a-z0-9:()]+)+$",
    help="Cipher and mode of encrypted disks, as cryptsetup(8) writes them. Read once, at start.",
)

KEY_SIZE = cfg.IntOpt(
    "key_size",
    default=512,
    min=128,
    max=512,
    help="Bits of the key of an instance; half of them are the cipher's in XTS mode. Read once, "
    "at start.",
)


def register(conf: cfg.ConfigOpts) -> None:
    """Make all of them known to `conf`; doing it twice does no harm."""
    conf.register_opt(INSTANCES_PATH)
    conf.register_opt(SUBDIRECTORY_NAME, group="image_cache")
    conf.register_opts([VOLUME_GROUP, THIN_POOL], group="libvirt")
    conf.register_opts([CIPHER, KEY_SIZE], group="ephemeral_storage_encryption")
