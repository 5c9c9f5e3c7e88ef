"""What the agent says about a job: its status, its phases and its result.

These are the words of the contract (docs/job.md); the journal stores them, the
API sends them and the command line prints them, unchanged. Sizes are bytes,
times are seconds, instants are seconds since the epoch.
"""

import enum

from pydantic import BaseModel, ConfigDict

from agent.job import Action


class Status(enum.StrEnum):
    QUEUED = "QUEUED"
    BUILD = "BUILD"
    ACTIVE = "ACTIVE"
    DONE = "DONE"
    ERROR = "ERROR"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self not in (Status.QUEUED, Status.BUILD)


class TaskState(enum.StrEnum):
    """What a job in BUILD is doing; Nova's words."""

    IMAGE_RESOLVING = "image_resolving"
    IMAGE_DOWNLOADING = "image_downloading"
    IMAGE_VERIFYING = "image_verifying"
    BLOCK_DEVICE_MAPPING = "block_device_mapping"
    SPAWNING = "spawning"
    DELETING = "deleting"
    RESIZING = "resizing"
    RESCUING = "rescuing"
    UNRESCUING = "unrescuing"
    REBUILDING = "rebuilding"


class Role(enum.StrEnum):
    KERNEL = "kernel"
    RAMDISK = "ramdisk"
    ROOT = "root"
    EPHEMERAL = "ephemeral"
    SWAP = "swap"
    CONFIG_DRIVE = "config_drive"
    RESCUE = "rescue"
    RESCUE_KERNEL = "rescue_kernel"
    RESCUE_RAMDISK = "rescue_ramdisk"

    @property
    def of_rescue(self) -> bool:
        """Whether such a disk goes when the rescue ends."""
        return self in (Role.RESCUE, Role.RESCUE_KERNEL, Role.RESCUE_RAMDISK)

    @property
    def is_device(self) -> bool:
        """Whether the guest finds it as a disk; a kernel and a ramdisk are handed to QEMU."""
        return self not in (Role.KERNEL, Role.RAMDISK, Role.RESCUE_KERNEL, Role.RESCUE_RAMDISK)


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InstanceReport(_Report):
    uuid: str
    name: str


class ImageReport(_Report):
    id: str
    digest: str | None = None
    """`algorithm:hex` of the bytes the image source delivered; null if nobody has read them, as of
    an image that is cloned in Ceph."""
    source: str | None = None
    """`cache`, or the image source the bytes came from in this job."""


class ChainLink(_Report):
    path: str
    """Absolute, on this host."""
    format: str


class DiskReport(_Report):
    role: Role
    device_name: str | None
    """As the guest is likely to see it; None for kernel and ramdisk."""
    path: str
    """Absolute, on this host."""
    format: str
    """`raw` or `qcow2`."""
    virtual_size: int
    """Bytes, as the guest sees it."""
    backing_chain: tuple[ChainLink, ...] = ()
    """From the disk's own backing file down to the last."""


class DomainReport(_Report):
    uuid: str
    state: str
    """libvirt's word: running, shut off, paused …"""


class PhaseReport(_Report):
    phase: TaskState
    seconds: float
    """How long it took, over all attempts."""
    bytes: int = 0
    """Received from the image source."""
    resumed: int = 0
    """Bytes an earlier attempt had already received and that were not asked for again."""


class ErrorReport(_Report):
    code: str
    """See below; never changes."""
    message: str
    """What was attempted, on what, and what was in the way."""
    hint: str = ""
    """What to do about it."""
    retriable: bool = False
    """Whether the same job may well succeed later."""
    phase: TaskState | None = None
    """In which it happened."""


class Progress(_Report):
    """Where a running job is; the newest value, not a history."""

    phase: TaskState
    role: Role | None = None
    bytes_done: int = 0
    bytes_total: int | None = None
    rate: float = 0.0
    """Bytes a second over the last few seconds."""
    last_byte_at: float | None = None
    """Seconds since the epoch."""


class JobReport(_Report):
    """One job, as `bootwright job show --format json` prints it."""

    id: str
    action: Action
    status: Status
    task_state: TaskState | None = None
    """What it is doing; none when it has ended."""
    request_id: str
    """On every log line of the job."""
    idempotency_key: str | None = None
    created_at: float
    """Seconds since the epoch."""
    updated_at: float
    """Seconds since the epoch."""
    instance: InstanceReport | None = None
    image: ImageReport | None = None
    disks: tuple[DiskReport, ...] = ()
    """In the order in which they are attached; kernel and ramdisk first. Of a boot that
    failed, those it was to have: `cleanup` has removed what there was of them."""
    domain: DomainReport | None = None
    domain_xml: str | None = None
    """Only for action prepare, or when the domain was not to be defined."""
    timeline: tuple[PhaseReport, ...] = ()
    """The phases, in the order in which they began."""
    progress: Progress | None = None
    """Of the phase it is in."""
    error: ErrorReport | None = None
