"""What can be configured: every option, with its meaning, unit, default and range.

Names are Nova's where Nova has the option. Only declared here: reading and
checking values is `agent.config`. An option is declared when something uses
it, and not before.
"""

from typing import Final

import castellan.options
from keystoneauth1 import loading
from oslo_config import cfg, types
from oslo_privsep import priv_context

from agent import disk_options
from agent.config_files import ABSOLUTE_PATH, API
from agent.job import ConfigDriveFormat, GuestFormat
from privsep.options import (
    INSTANCES_PATH,
    SUBDIRECTORY_NAME,
)

UUID: Final = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"

_DEFAULT: Final[list[cfg.Opt]] = [
    cfg.BoolOpt(
        "debug",
        default=False,
        help="Log at DEBUG what the agent and the libraries it stands on do.",
    ),
    INSTANCES_PATH,
    cfg.StrOpt(
        "state_path",
        default="/var/lib/bootwright",
        regex=ABSOLUTE_PATH,
        help="Directory of the journal of jobs: an absolute path on a local filesystem.",
    ),
    cfg.IntOpt(
        "max_concurrent_builds",
        default=10,
        min=1,
        max=1000,
        help="How many jobs run at the same time; more of them wait in the queue.",
    ),
    cfg.BoolOpt(
        "use_cow_images",
        default=True,
        help="What images_type = default in [libvirt] means: qcow2 (copy on write, disks share "
        "the base) if true, raw (every disk is a full copy) if false.",
    ),
    cfg.BoolOpt(
        "force_raw_images",
        default=True,
        help="Keep every base as raw. Only true is possible in this release: bases of another "
        "format do not exist.",
    ),
    cfg.StrOpt(
        "preallocate_images",
        default="none",
        choices=[
            ("none", "when the guest writes to it"),
            ("space", "when the disk is made, all of it; for qcow2 and raw disks"),
        ],
        help="When the space of a disk is taken from the filesystem. With space a raw disk shares "
        "no blocks with its base, and QEMU leaves the I/O of such disks to the kernel (io=native) "
        "if the cache mode allows that. What a disk gains by a resize while its guest runs is not "
        "taken.",
    ),
    cfg.StrOpt(
        "default_ephemeral_format",
        default=GuestFormat.EXT4.value,
        choices=[
            (GuestFormat.EXT4.value, "for Linux"),
            (GuestFormat.XFS.value, "for Linux, large files"),
            (GuestFormat.VFAT.value, "readable by every guest"),
            (GuestFormat.NONE.value, "no file system: an empty disk"),
        ],
        help="File system an ephemeral disk is born with when the job names none.",
    ),
    cfg.StrOpt(
        "config_drive_format",
        default=ConfigDriveFormat.ISO9660.value,
        choices=[
            (ConfigDriveFormat.ISO9660.value, "a CD-ROM, where the bus has such drives"),
            (ConfigDriveFormat.VFAT.value, "a disk of 64 MiB, with the tools of package mtools"),
        ],
        help="File system of config drives.",
    ),
    cfg.BoolOpt(
        "force_config_drive",
        default=False,
        help="Give every instance a config drive, also where neither the job nor the image asks "
        "for one.",
    ),
    cfg.IntOpt(
        "drain_timeout",
        default=30,
        min=0,
        max=3600,
        help="Seconds that jobs get to reach a point from which they can go on after a restart, "
        "when the agent is stopped. What is fetched by then is kept.",
    ),
]

_IMAGE_CACHE: Final[list[cfg.Opt]] = [
    SUBDIRECTORY_NAME,
    cfg.BoolOpt(
        "require_hash",
        default=True,
        help="Refuse images for which the image source has no hash. If false, only their length "
        "is checked.",
    ),
    cfg.BoolOpt(
        "verify_before_use",
        default=False,
        help="Read every base in the image cache and check its hash before each new instance on "
        "it, and fetch one anew that is damaged or was never hashed: a second and more per "
        "GiB. Not read is what lies elsewhere: volumes that thin snapshots are taken of "
        "(images_type lvm) and images in Ceph that are cloned. An image whose bytes another one "
        "has in the cache is fetched all the same. If false, reading is left to the scrub (see "
        "scrub_interval), but for a base that is not the file it was.",
    ),
    cfg.IntOpt(
        "max_concurrent_fetches",
        default=4,
        min=1,
        max=64,
        help="How many images are fetched at the same time; more of them wait.",
    ),
    cfg.IntOpt(
        "reserved_free_space",
        default=0,
        min=0,
        max=1 << 30,
        help="MiB of the filesystem that fetches leave free. An image that would not fit beside "
        "them is refused, once the bases that nobody needs have made room.",
    ),
    cfg.IntOpt(
        "max_size",
        default=0,
        min=0,
        max=1 << 30,
        help="GiB the image cache may take from the filesystem; 0 for no limit. Beyond it the "
        "bases that nobody needs are removed, the longest unused first, and an image that would "
        "not fit is refused.",
    ),
    cfg.BoolOpt(
        "remove_unused_base_images",
        default=True,
        help="Remove bases that nobody needs: by age, by max_size, by the watermarks, and to make "
        "room for another image. If false, only 'bootwright image remove' removes any.",
    ),
    cfg.IntOpt(
        "remove_unused_original_minimum_age_seconds",
        default=86400,
        min=0,
        max=10 * 365 * 86400,
        help="Seconds a base has to be unused before its age removes it.",
    ),
    cfg.IntOpt(
        "high_watermark",
        default=95,
        min=1,
        max=100,
        help="Percent of the filesystem. When more is in use, by whatever, bases that nobody "
        "needs are removed down to low_watermark; 100 for never.",
    ),
    cfg.IntOpt(
        "low_watermark",
        default=90,
        min=0,
        max=100,
        help="Percent of the filesystem at which a removal for high_watermark stops; more than "
        "high_watermark counts as that.",
    ),
    cfg.IntOpt(
        "manager_interval",
        default=2400,
        min=0,
        max=30 * 86400,
        help="Seconds between two passes that remove bases; 0 for none but those of 'bootwright "
        "cache gc'.",
    ),
    cfg.IntOpt(
        "scrub_interval",
        default=7 * 86400,
        min=0,
        max=365 * 86400,
        help="Seconds within which every base is read and its hash checked, in the background; "
        "0 for never.",
    ),
    cfg.StrOpt(
        "host_id",
        regex=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        help="Name of this host among hosts that share the image cache or a pool in Ceph: letters, "
        "digits, '.', '_', '-', and always the same. If not set the content of /etc/machine-id, "
        "which a cloned host must not share; without that file, the host name.",
    ),
]

_IMAGES: Final[list[cfg.Opt]] = [
    cfg.StrOpt(
        "source",
        default="glance",
        choices=[
            ("glance", "the image service, see [glance]"),
            ("directory", "the local directory named here"),
        ],
        help="Where images come from.",
    ),
    cfg.StrOpt(
        "directory",
        default="/var/lib/bootwright/images",
        regex=ABSOLUTE_PATH,
        help="Directory of the images of source = directory: an absolute path. 'bootwright image "
        "add' puts images there.",
    ),
    cfg.ListOpt(
        "vmdk_allowed_types",
        item_type=types.String(regex=r"^[A-Za-z0-9]+$"),
        default=["monolithicSparse", "streamOptimized"],
        help="Names of the subformats (createType) that a VMDK image may be of; none of them if "
        "empty. Of whatever is named here, only images that are one sparse extent in a single file "
        "are taken: others would need files beside it.",
    ),
]

_GLANCE: Final[list[cfg.Opt]] = [
    cfg.ListOpt(
        "endpoint_override",
        item_type=types.URI(schemes=["http", "https"]),
        help="URLs of the image service, tried in turn; from the service catalog if not set.",
    ),
    cfg.IntOpt(
        "num_retries",
        default=3,
        min=0,
        max=1000,
        help="How often a request is tried again. While an image is fetched, only attempts in a "
        "row that brought no new byte count.",
    ),
    cfg.FloatOpt(
        "timeout",
        default=60.0,
        min=1.0,
        max=3600.0,
        help="Seconds to wait for a connection and for the answer to a request.",
    ),
    cfg.IntOpt(
        "max_connections_per_image",
        default=4,
        min=1,
        max=8,
        help="Connections over which one image is fetched, where it would come slower over fewer. "
        "More than one are opened only while the network or the store keeps a fetch waiting, and "
        "if the store serves parts of images. Each takes up to 10 MiB of memory.",
    ),
    cfg.FloatOpt(
        "stall_timeout",
        default=30.0,
        min=1.0,
        max=3600.0,
        help="Seconds without a single byte after which a fetch is broken off and resumed, and "
        "over which it must bring 4 KiB a second on average. A source that was too slow for "
        "longer than num_retries times in a row is given up.",
    ),
    cfg.BoolOpt(
        "verify_glance_signatures",
        default=False,
        help="Refuse images that are not signed, or not rightly (properties img_signature, "
        "img_signature_hash_method, img_signature_key_type and img_signature_certificate_uuid), "
        "wherever they come from and also those in the cache.",
    ),
    cfg.BoolOpt(
        "enable_certificate_validation",
        default=False,
        help="With verify_glance_signatures: refuse images unless the certificate they are signed "
        "with is valid today and was issued, directly or not, by one of "
        "default_trusted_certificate_ids or of the job's trusted_certificates.",
    ),
    cfg.ListOpt(
        "default_trusted_certificate_ids",
        item_type=types.String(regex=UUID),
        default=[],
        help="UUIDs of the certificates that are trusted where a job names none, for "
        "enable_certificate_validation.",
    ),
    cfg.StrOpt(
        "certificate_source",
        default="key_manager",
        choices=[
            (
                "key_manager",
                "Barbican or Vault, see [key_manager]",
            ),
            ("directory", "files, see certificate_directory"),
        ],
        help="Where the certificates are that images are signed with.",
    ),
    cfg.StrOpt(
        "certificate_directory",
        default="/etc/bootwright/certificates",
        regex=ABSOLUTE_PATH,
        help="Directory of the certificates of certificate_source = directory, in PEM and each "
        "named by its UUID: 1b6d3a53-….pem. An absolute path.",
    ),
    cfg.IntOpt(
        "bandwidth_limit",
        default=0,
        min=0,
        max=1 << 20,
        help="MiB per second that all fetches together may receive; 0 for no limit.",
    ),
]

# How the endpoint is found in the service catalog; retrying is not left to
# keystoneauth, which does not know what was already received.
_ADAPTER_OPTIONS: Final = ("service_type", "service_name", "valid_interfaces", "region_name")

_DOCUMENTED_AUTH_TYPES: Final = ("password", "v3applicationcredential", "none")
"""Those whose options the sample file shows; any other plugin works too."""

PRIVSEP_SECTIONS: Final = ("privsep_base_owner", "privsep_volumes")
"""One for each helper; the second has one only if images_volume_group is set."""
_DOCUMENTED_KEY_MANAGER: Final = {
    "key_manager": {"backend", "auth_type", "auth_url", "username", "password"},
    "barbican": {
        "barbican_endpoint",
        "barbican_endpoint_type",
        "barbican_region_name",
        "verify_ssl",
        "verify_ssl_path",
    },
    "vault": {
        "vault_url",
        "root_token_id",
        "approle_role_id",
        "approle_secret_id",
        "kv_mountpoint",
        "kv_version",
        "ssl_ca_crt_file",
    },
}
"""Those of castellan's options that the sample file shows; any other works too."""


def declared() -> dict[str, list[cfg.Opt]]:
    """All options by section, without those of the authentication plugin."""
    glance = [
        *_GLANCE,
        *(opt for opt in loading.get_session_conf_options() if opt.dest != "timeout"),
        *_adapter_options(),
        *loading.get_auth_common_conf_options(),
    ]
    return {
        "DEFAULT": _DEFAULT,
        "libvirt": disk_options.LIBVIRT,
        "glance": glance,
        "image_cache": _IMAGE_CACHE,
        "images": _IMAGES,
        "api": API,
        "qemu_img": disk_options.QEMU_IMG,
        "ephemeral_storage_encryption": disk_options.ENCRYPTION,
        **dict.fromkeys(PRIVSEP_SECTIONS, priv_context.OPTS),
        # castellan's own, which it looks for itself.
        **{str(section): list(opts) for section, opts in castellan.options.list_opts()},
    }


def auth_plugin(auth_type: str) -> list[cfg.Opt]:
    """The options of keystoneauth's plugin `auth_type`.

    Raises:
        keystoneauth1.exceptions.NoMatchingPlugin: there is none of that name.
    """
    options: list[cfg.Opt] = loading.get_auth_plugin_conf_options(auth_type)
    return options


def documented() -> dict[str, list[cfg.Opt]]:
    """All options by section, but for those of libraries that hardly anybody needs."""
    sections = declared()
    for section in (str(section) for section, _ in castellan.options.list_opts()):
        shown = _DOCUMENTED_KEY_MANAGER.get(section, set())
        sections[section] = [opt for opt in sections[section] if opt.dest in shown]
    return {section: opts for section, opts in sections.items() if opts}


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """The options for oslo.config's generator: sample file and documentation."""
    sections = documented()
    sections["glance"] = [
        *sections["glance"],
        *(opt for auth_type in _DOCUMENTED_AUTH_TYPES for opt in auth_plugin(auth_type)),
    ]
    return list(sections.items())


def _adapter_options() -> list[cfg.Opt]:
    options = loading.get_adapter_conf_options(include_deprecated=False)
    chosen = [opt for opt in options if opt.dest in _ADAPTER_OPTIONS]
    cfg.set_defaults(chosen, service_type="image")
    return chosen
