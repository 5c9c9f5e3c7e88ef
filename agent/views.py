"""What the agent says about itself and about what it holds: all answers of the API but jobs.

Like `agent.report`, these are words of the contract: the command line prints
them unchanged. Sizes are bytes, instants are seconds since the epoch.
"""

import enum
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from agent.report import DiskReport, Status, TaskState


class _View(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Event(_View):
    """One change of one job."""

    seq: int
    """Counts up over all jobs and restarts; where to go on after a lost connection."""
    time: float
    job_id: str
    status: Status
    task_state: TaskState | None = None
    message: str = ""


class ImageState(enum.StrEnum):
    AVAILABLE = "available"
    """The image source has it, this host does not."""
    FETCHING = "fetching"
    CACHED = "cached"


class ImageEntry(_View):
    """One image as this host has it; `path` and below are None until it is cached."""

    id: str
    state: ImageState
    name: str | None = None
    source: str | None = None
    """The image source its bytes came from, or would."""
    path: str | None = None
    format: str | None = None
    virtual_size: int | None = None
    disk_usage: int | None = None
    """What its base takes from the filesystem."""
    digest: str | None = None
    """`algorithm:hex` of the bytes the image source delivered."""
    certificate: str | None = None
    """Id of the certificate its signature was verified with; None if nobody demanded that."""
    committed_at: float | None = None
    last_used_at: float | None = None
    instances: tuple[str, ...] = ()
    """UUIDs of the instances that stand on it."""
    pinned: bool = False
    """By an operator."""
    pinned_until: float | None = None
    """None if for ever, or not at all."""


class Fetch(_View):
    """One image on its way into the cache."""

    image_id: str
    bytes_done: int = 0
    bytes_total: int | None = None
    rate: float = 0.0
    """Bytes a second over the last few seconds."""
    waiters: int = 0
    """Jobs that wait for it."""


class CacheStatus(_View):
    directory: str
    entries: int
    disk_usage: int
    """What all bases take from the filesystem."""
    free_space: int
    """What the filesystem has left for the agent."""
    fetching: tuple[Fetch, ...] = ()


class Reason(enum.StrEnum):
    """Why a base is kept or removed."""

    IN_USE = "in use"
    UNKNOWN = "unknown"
    """Who needs it cannot be known."""
    DISABLED = "removal disabled"
    RECENT = "recent"
    """Nobody needs it, and neither its age nor the lack of space removes it."""
    AGE = "age"
    MAX_SIZE = "max_size"
    WATERMARK = "watermark"
    SPACE = "space"
    """For an image that is about to be fetched."""
    REQUEST = "request"
    """Somebody asked for its removal."""


class Decision(_View):
    """What becomes of one base, and why."""

    image_id: str
    base_name: str
    remove: bool
    reason: Reason
    detail: str
    """A sentence."""
    bytes: int = 0
    """What its removal gives back; 0 if it stays, or if another image shares the file."""


class GcReport(_View):
    dry_run: bool
    decisions: tuple[Decision, ...]
    bytes: int
    """What all removals give back."""


class Soundness(enum.StrEnum):
    INTACT = "intact"
    RECORDED = "recorded"
    """Nobody had hashed its bytes before; from now on they are held against this hash."""
    DAMAGED = "damaged"
    """It is out of the cache, and is fetched anew when it is needed."""
    UNRECOGNISED = "unrecognised"
    """It is not the file it was, and nobody had hashed its bytes: out of the cache likewise."""


class Verification(_View):
    """What came of reading a base from end to end."""

    image_id: str
    path: str
    soundness: Soundness
    digest: str
    """`algorithm:hex` of the bytes of the base, as they are; or at which byte they are
    unreadable. Empty if it was not read."""
    expected: str | None = None
    instances: tuple[str, ...] = ()
    """Names of those that stand on it; told when it is damaged."""


class InstanceView(_View):
    uuid: str
    name: str
    state: str | None
    """libvirt's word: running, shut off …; None when there is no domain."""
    job_id: str
    created_at: float
    image_id: str | None = None
    disks: tuple[DiskReport, ...] = ()
    metadata: dict[str, str] = Field(default_factory=dict)


class Check(_View):
    """Something the agent needs, and whether it is there."""

    name: str
    ok: bool
    message: str = ""
    hint: str = ""


class Result(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    """The agent works, and something about it is not as it should be."""
    ERROR = "error"
    """The agent does not start, or jobs fail."""


class Finding(_View):
    """What the doctor found out about one thing."""

    name: str
    result: Result
    message: str
    hint: str = ""
    """What to do about it; empty if it is as it should be."""


COMPLETE_HEADER: Final = "X-Console-Complete"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsolePiece:
    """Some bytes of a console. Travels as a body and its headers, not as JSON."""

    data: bytes
    """Empty at the end."""
    begins: str
    """What names the first byte that is kept; when it changes, so does what an offset means."""
    complete: bool
    """False if earlier bytes are gone."""


class AgentStatus(_View):
    version: str
    pid: int
    started_at: float
    draining: bool = False
    jobs: dict[Status, int] = Field(default_factory=dict)
    """How many jobs there are of each status; those there are none of may be missing."""
    instances: int = 0
    cache: CacheStatus
    checks: tuple[Check, ...] = ()

    @property
    def degraded(self) -> bool:
        return self.draining or not all(check.ok for check in self.checks)
