"""What the configuration comes to: plain values for the components to be built from.

Made by `agent.config`, taken apart by `main`; no component sees more than its
own arguments. Times are seconds, sizes are bytes.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keystoneauth1.session import Session

from agent.disk import DiskType
from agent.job import ConfigDriveFormat, GuestFormat, ImagesType


class ImageSourceName(enum.StrEnum):
    GLANCE = "glance"
    DIRECTORY = "directory"


@dataclass(frozen=True, kw_only=True, slots=True)
class CopySettings:
    """What Glance shall copy images to that are to be cloned."""

    store: str
    interval_s: float
    limit_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RbdSettings:
    pool: str
    glance_pools: frozenset[str]
    """Whose images may be cloned."""
    copy: CopySettings | None
    """None: what is elsewhere is fetched."""
    ceph_conf: Path | None
    """None for Ceph's own places."""
    user: str
    secret_uuid: str | None
    """None: made from the cluster's id and the user."""
    connect_timeout_s: float
    busy_retries: int
    busy_interval_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LibvirtSettings:
    connection_uri: str
    virt_type: str
    """kvm or qemu."""
    images_type: ImagesType
    """What a job that names none gets."""
    cache_modes: Mapping[DiskType, str]
    """Of the kinds of disks that have one configured."""
    discard: str | None
    """ignore or unmap; None leaves it to QEMU."""
    qcow2_cluster_size: int
    """Of new overlays."""
    qcow2_extended_l2: bool
    rbd: RbdSettings | None
    """None: no disks in Ceph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeSettings:
    group: str
    thin: bool
    clear: str
    """zero, shred or none."""
    clear_size: int | None
    """None for all of a volume."""


class KeyManager(enum.StrEnum):
    FILE = "file"
    BARBICAN = "barbican"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncryptionSettings:
    key_manager: KeyManager
    key_directory: Path
    key_size: int
    """Bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GlanceSettings:
    session: Session
    """Authenticates as configured; has not yet spoken to anybody."""
    endpoints: tuple[str, ...]
    """Tried in turn; empty: the service catalog knows."""
    service_type: str
    service_name: str | None
    interfaces: tuple[str, ...]
    """Of the service catalog, the best first; empty for keystoneauth's choice."""
    region_name: str | None
    num_retries: int
    max_connections_per_image: int
    stall_timeout_s: float
    """Without a single byte."""
    bandwidth_limit: int | None
    """Bytes per second, of all fetches together; None is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignatureSettings:
    """Of images, wherever they come from."""

    verify: bool
    """Whether all images have to be signed."""
    validate: bool
    """Whether a certificate that is trusted has to have issued the one they are signed with."""
    trusted: tuple[str, ...]
    certificate_directory: Path | None
    """None: a key manager has the certificates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesSettings:
    source: ImageSourceName
    directory: Path
    vmdk_types: tuple[str, ...]
    """Subformats a VMDK may be of."""
    glance: GlanceSettings | None
    """None unless images come from there."""
    signatures: SignatureSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCacheSettings:
    directory: Path
    require_hash: bool
    verify_before_use: bool
    max_concurrent_fetches: int
    reserved_free_space: int
    """Left to others."""
    max_size: int | None
    """None is no limit."""
    remove_unused: bool
    minimum_age_s: float
    high_watermark: int
    """Percent of the file system."""
    low_watermark: int
    prune_interval_s: float | None
    """None: only when somebody asks."""
    scrub_interval_s: float | None
    """None: never."""
    host_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QemuImgSettings:
    """Limits of one run of qemu-img."""

    cpu_time_s: int
    address_space: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiSettings:
    socket: Path
    socket_group: str | None
    metrics_listen: tuple[str, int] | None
    """IP address and port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    debug: bool
    instances_path: Path
    state_path: Path
    max_concurrent_builds: int
    default_ephemeral_format: GuestFormat
    preallocate: bool
    config_drive_format: ConfigDriveFormat
    force_config_drive: bool
    drain_timeout_s: float
    libvirt: LibvirtSettings
    volumes: VolumeSettings | None
    """None where there are no disks of images_type lvm."""
    encryption: EncryptionSettings | None
    """None where disks are not encrypted."""
    images: ImagesSettings
    image_cache: ImageCacheSettings
    qemu_img: QemuImgSettings
    api: ApiSettings
