"""The instances of this host: one directory each, described by `instance.json`.

`instance.json` is there, whole, before the first disk it names. It
and nothing else says which disks an instance has, in which format, and on
which bases they stand: a guest can write to its disks, so no answer is ever
looked for in them.
"""

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import InstanceExists, NotFound
from agent.files import UNFINISHED, Together, fsync_directory, remove_tree, reporting
from agent.job import ImagesType
from agent.origin import Origin
from agent.report import Role
from agent.write_path import write_all

LOG = logging.getLogger(__name__)

RECORD_NAME = "instance.json"
CONSOLE_NAME = "console.log"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescue:
    """Of an instance that runs another image for the time being."""

    job_id: str
    origin: Origin | None = None
    """Of the rescue disk; None in a record of an older release."""
    domain_xml: str
    """The domain as it was, and will be again."""
    was_running: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuild:
    """Of an instance that is getting another root disk, and still has its own."""

    job_id: str
    origin: Origin
    image_digest: str | None
    image_properties: dict[str, str]
    disks: tuple[Disk, ...]
    """All that it will have."""
    domain_xml: str | None
    """The domain as it was; None if it had none."""
    was_running: bool
    anew: bool = False
    """Whether libvirt has been told to forget the domain, or is about to be."""
    forgotten: bool = False
    """Whether it has: what libvirt keeps of the domain from now on is that of the new one."""
    starts_with_host: bool = False
    """The domain as it was; known if it is made anew."""

    @property
    def root(self) -> Disk:
        return next(disk for disk in self.disks if disk.role is Role.ROOT)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceRecord:
    """The contents of `instance.json`."""

    version: Literal[1] = 1
    uuid: str
    name: str
    job_id: str
    """The job that made it; only that job may undo it."""
    told_made: bool = False
    """Whether that job was told to be done though the journal could not take it down."""
    created_at: float
    image_id: str
    image_digest: str | None = None
    image_properties: dict[str, str] = field(default_factory=dict)
    """Of the root's image when it was made."""
    origin: Origin | None = None
    """Of the root disk; None in a record of an older release."""
    own_domain: bool = False
    """Whether its owner has written its domain, so that the image has no say in that."""
    images_type: ImagesType
    """The backend that made its root disk, whatever the host's default is by now."""
    metadata: dict[str, str] = field(default_factory=dict)
    disks: tuple[Disk, ...] = ()
    iotune: dict[str, int] = field(default_factory=dict)
    """What each disk may do, by libvirt's name."""
    rescue: Rescue | None = None
    unrescued_by: str | None = None
    """The last job that ended a rescue: run again, it has nothing left to do."""
    rebuild: Rebuild | None = None
    rebuilt_by: str | None = None
    """The last job whose disks have taken the place of others: it must not do so twice."""
    replaced: tuple[Disk, ...] = ()
    """Those others, until they are gone."""

    @property
    def root(self) -> Disk:
        return next(disk for disk in self.disks if disk.role is Role.ROOT)

    @property
    def every_disk(self) -> tuple[Disk, ...]:
        """Every disk of which there may be something, each once: also what comes and what goes."""
        coming = () if self.rebuild is None else self.rebuild.disks
        every = (*self.disks, *coming, *self.replaced)
        return tuple({disk.path: disk for disk in every}.values())

    def has_of(self, job_id: str) -> bool:
        """Whether there is anything of it that a run of that job has made or done."""
        changes = (self.rescue, self.rebuild)
        return job_id in (
            self.job_id,
            self.unrescued_by,
            self.rebuilt_by,
            *(change.job_id for change in changes if change is not None),
        )

    @property
    def base_names(self) -> frozenset[str]:
        """The bases that some disk of it stands on."""
        return frozenset(disk.base_name for disk in self.every_disk if disk.base_name is not None)


_RECORD = TypeAdapter(InstanceRecord)


class Instances:
    """The registry; may be shared by any number of threads, of one process.

    Read from disk once: the agent is the only one that writes here.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is `instances_path`."""
        self._directory = directory
        self._lock = threading.Lock()
        # Held while files are removed, so that two removals of one instance do
        # not meet; `_lock` is for what takes no time.
        self._removal = threading.Lock()
        self._known: dict[str, InstanceRecord] = {}
        self._uuids: dict[str, str] = {}  # by name
        self.unreadable: tuple[Path, ...] = ()
        """Records that exist and cannot be understood: who knows what they stand on."""
        # Names a running job has spoken for, before anything of it is on disk.
        self._claims: dict[str, str] = {}
        self._load()

    def _load(self) -> None:
        for entry in sorted(self._directory.iterdir()):
            # A file system's own lost+found, for one, may not even be looked into.
            path = entry / RECORD_NAME
            if not _is_uuid(entry.name) or not path.is_file():
                continue
            try:
                record = _RECORD.validate_json(path.read_bytes())
            except (OSError, ValidationError) as e:
                LOG.error(
                    "%s cannot be read: %s; restore it from a backup, or install the release "
                    "that wrote it. Until then nothing is removed from the image cache",
                    path,
                    e,
                )
                self.unreadable += (path,)
            else:
                self._know(record)

    def _know(self, record: InstanceRecord) -> None:
        with self._lock:
            self._known[record.uuid] = record
            self._uuids[record.name] = record.uuid

    def directory_of(self, uuid: str) -> Path:
        return self._directory / uuid

    def console_of(self, uuid: str) -> Path:
        return self._directory / uuid / CONSOLE_NAME

    def claim(self, *, uuid: str, name: str, job_id: str) -> None:
        """Speak for a name and a uuid until `release`, on behalf of one job.

        A job that runs again after a restart claims what its record on disk
        already says, and gets it.

        Raises:
            InstanceExists: an instance, or another job, has the name or uuid, or
                there are files of an instance whose record is lost.
        """
        with self._lock:
            if uuid not in self._known:
                self._require_no_files(uuid)
            for known in (uuid, self._uuids.get(name, uuid)):
                other = self._known.get(known)
                if other is not None and other.job_id != job_id:
                    which = f"name {name}" if other.name == name else f"uuid {uuid}"
                    raise InstanceExists(
                        f"the {which} belongs to instance {other.name} ({other.uuid})",
                        "choose another, or delete that one: "
                        f"bootwright instance delete {other.uuid}",
                    )
            for key in (uuid, name):
                if self._claims.get(key, job_id) != job_id:
                    raise InstanceExists(
                        f"job {self._claims[key]} is making an instance of that name or uuid "
                        f"({key}) right now",
                        "wait for it, cancel it, or choose another",
                    )
            self._claims[uuid] = self._claims[name] = job_id

    def hold(self, uuid: str, job_id: str, cancellation: Cancellation) -> InstanceRecord:
        """Keep other jobs from an instance that exists until `release`; wait for those before.

        Raises:
            NotFound: there is none of that uuid, or no longer.
            BootwrightError: the reason of the cancellation.
        """
        while True:
            with self._lock:
                record = self._known.get(uuid)
                if record is None:
                    raise _no_instance(uuid)
                if self._claims.get(uuid, job_id) == job_id:
                    self._claims[uuid] = job_id
                    return record
            cancellation.wait(0.1)

    def _require_no_files(self, uuid: str) -> None:
        directory = self.directory_of(uuid)
        with reporting("looking into", directory):
            if directory.is_dir() and set(directory.iterdir()) - set(directory.glob(UNFINISHED)):
                raise InstanceExists(
                    f"{directory} has files of an instance, and no {RECORD_NAME} that this agent "
                    "has read",
                    f"restore its {RECORD_NAME} and restart the agent, or move the directory away",
                )

    def release(self, job_id: str) -> None:
        with self._lock:
            self._claims = {key: job for key, job in self._claims.items() if job != job_id}

    def write(self, record: InstanceRecord) -> Path:
        """Make the instance's directory and its record durable; return the directory.

        Raises:
            InsufficientFreeSpace, BackendError: it cannot be written, or not durably.
                `get` returns what is on disk, which may be either.
        """
        directory = self.directory_of(record.uuid)
        with reporting("writing", directory / RECORD_NAME), Together() as alone:
            self.add(record, alone)
            alone.publish()
        return directory

    def add(self, record: InstanceRecord, together: Together) -> None:
        """Have the instance's directory and its record be there when `together` is published.

        Raises:
            InsufficientFreeSpace, BackendError: it cannot be written.
        """
        directory = self.directory_of(record.uuid)
        data = _RECORD.dump_json(record, indent=2)
        with reporting("making", directory):
            # Others may pass through, as the hypervisor's user must, but not list.
            together.directory(directory, mode=0o711)
        with (
            reporting("writing", directory / RECORD_NAME),
            together.file(
                directory / RECORD_NAME,
                needed=len(data),
                what="writing",
                named=lambda: self._know(record),
            ) as fd,
        ):
            write_all(fd, memoryview(data), 0)

    def settle(self, uuid: str) -> None:
        """Make durable what a run that was cut off may have left: the name of a record.

        Raises:
            InsufficientFreeSpace, BackendError: it cannot be.
        """
        directory = self.directory_of(uuid)
        with reporting("writing", directory):
            fsync_directory(directory)
            fsync_directory(self._directory)

    def create_console(self, uuid: str) -> None:
        """Make the console log if it is not there.

        It belongs to us, so that we can read what the guest writes: whoever
        opens it later, root's virtlogd or QEMU itself, keeps its owner.

        Raises:
            InsufficientFreeSpace, BackendError: it cannot be made.
        """
        path = self.console_of(uuid)
        with reporting("making", path):
            path.touch(mode=0o640)

    def get(self, uuid: str) -> InstanceRecord | None:
        with self._lock:
            return self._known.get(uuid)

    def find(self, name_or_uuid: str) -> InstanceRecord:
        """Raises: NotFound."""
        with self._lock:
            uuid = name_or_uuid if name_or_uuid in self._known else self._uuids.get(name_or_uuid)
            record = None if uuid is None else self._known[uuid]
        if record is None:
            raise _no_instance(name_or_uuid)
        return record

    def all(self) -> list[InstanceRecord]:
        """Return every instance, oldest first."""
        with self._lock:
            return sorted(self._known.values(), key=lambda record: record.created_at)

    def standing_on(self, base_name: str) -> list[InstanceRecord]:
        """Return the instances with a disk that needs that base."""
        return [record for record in self.all() if base_name in record.base_names]

    def remove(self, uuid: str) -> None:
        """Remove the instance's directory and all in it; done already is fine.

        The record goes last, so that a crash halfway leaves an instance that
        can still be found, and deleted again.

        Raises:
            BackendError: something of it cannot be removed.
        """
        directory = self.directory_of(uuid)
        with self._removal, reporting("removing", directory):
            if directory.is_dir():
                for entry in directory.iterdir():
                    if entry.name == RECORD_NAME:
                        continue
                    if entry.is_dir() and not entry.is_symlink():
                        remove_tree(entry)
                    else:
                        entry.unlink(missing_ok=True)
                fsync_directory(directory)
                remove_tree(directory)
        with self._lock:
            record = self._known.pop(uuid, None)
            if record is not None and self._uuids.get(record.name) == uuid:
                del self._uuids[record.name]

    def sweep(self) -> list[Path]:
        """Remove what a crash left, and return it; call it before any job runs.

        That is what was being written and had not got its name yet, and
        directories that have nothing else. Disks without a record stay: no crash
        leaves them, so somebody has moved the record away.
        """
        swept = []
        for directory in self._directory.iterdir():
            if not _is_uuid(directory.name):
                continue
            for path in directory.glob(UNFINISHED):
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink()
                swept.append(path)
            if (directory / RECORD_NAME).exists():
                continue
            try:
                directory.rmdir()
            except OSError as e:
                LOG.error(
                    "%s has no %s: %s; put the record back and restart the agent, or remove the "
                    "directory if nobody needs its disks",
                    directory,
                    RECORD_NAME,
                    e,
                )
            else:
                swept.append(directory)
        return swept


def _no_instance(name_or_uuid: str) -> NotFound:
    return NotFound(
        f"there is no instance {name_or_uuid!r} on this host",
        "bootwright instance list shows them",
    )


def _is_uuid(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False
