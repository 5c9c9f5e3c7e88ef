"""The bases as they lie on disk: `_base` and everything in it.

    <name>, <name>.json     a base and its manifest; together, an entry
    .partial/<name>/        what is being fetched, or waits to be gone on with
    .quarantine/            bases whose bytes were found wrong, for people to look at
    .pins/, .hosts/         see `agent.pins` and `agent.claims`
    .locks/<name>           held by whoever makes or removes anything of that name;
                            here and not elsewhere, because hosts that share the
                            directory have to share the locks

Decides nothing: whether a base may go is for others to know.

Commit, and what a crash at any point of it leaves:

    1. manifest aside, in the partial     a partial, verified again when asked for
    2. rename of the data to its name     a file without a manifest: no entry; the
                                          manifest in the partial completes it
    3. rename of the manifest             the entry
"""

import contextlib
import logging
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import manifest as manifests
from agent.errors import BackendError, InsufficientFreeSpace, NotFound
from agent.files import UNFINISHED, fsync_directory, remove_tree, reporting_no_space
from agent.image import Image
from agent.locks import FileLock
from agent.manifest import Identity, Manifest, base_name, manifest_path
from agent.partial import Partial

LOG = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{40}")

# All that `_base` itself ever holds: bases, their manifests, and what
# `agent.files` writes to before it bears one of these names.
_OURS = re.compile(
    rf"({_NAME.pattern})(?:\.json)?|\.({_NAME.pattern})(?:\.json)?\.[0-9a-f]{{16}}\.tmp"
)


_MODE = 0o440


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A base, as it is listed."""

    path: Path
    manifest: Manifest
    identity: Identity
    """Of the file as it is; the manifest has that of the file that was verified."""
    allocated: int
    """Bytes on disk, shared by all entries of one inode."""
    last_used_at: float

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recognised(self) -> bool:
        """Whether it still is the file that was verified."""
        return self.identity == self.manifest.identity


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialEntry:
    name: str
    changed_at: float


class Store:
    """May be shared by any number of threads; two may not commit or remove one name at once."""

    def __init__(self, directory: Path) -> None:
        """`directory` is `_base`; it is made if need be."""
        self.directory = directory
        self.locks = directory / ".locks"
        self._partials = directory / ".partial"
        self._quarantine = directory / ".quarantine"
        self._foreign: set[Path] = set()
        directory.mkdir(exist_ok=True)
        # The hypervisor's user has to pass through to a base it is given, and
        # to see nothing else on the way.
        directory.chmod(0o711)
        for path in (self._partials, self._quarantine, self.locks):
            path.mkdir(mode=0o700, exist_ok=True)

    def path_of(self, name: str) -> Path:
        """Return where the base of that name is, or would be."""
        return self.directory / name

    def lock_of(self, name: str) -> Path:
        return self.locks / name

    def partial_of(self, image: Image) -> Partial:
        return Partial(self._partials / base_name(image.id), image)

    # What there is

    def entries(self) -> list[Entry]:
        """Return the bases, most recently used first."""
        names = [path.stem for path in self.directory.glob("[!.]*.json")]
        found = map(self.find, filter(_NAME.fullmatch, names))
        return sorted(filter(None, found), key=lambda entry: entry.last_used_at, reverse=True)

    def find(self, name: str) -> Entry | None:
        """Return a base; one that the disk does not tell about is as good as none."""
        base = self.path_of(name)
        try:
            manifest = manifests.read(manifest_path(base))
            status = base.lstat()
        except FileNotFoundError:
            return None
        except OSError as e:
            LOG.warning("the base %s is fetched anew when it is needed: %s", base, e)
            return None
        if manifest is None or not stat.S_ISREG(status.st_mode):
            return None
        return Entry(
            path=base,
            manifest=manifest,
            identity=Identity(inode=status.st_ino, size=status.st_size),
            allocated=status.st_blocks * 512,
            # An entry made of a file that was here already is as young as itself.
            last_used_at=max(status.st_mtime, manifest.created_at),
        )

    def get(self, image_id: str) -> Entry:
        """Raises: NotFound."""
        entry = self.find(base_name(image_id))
        if entry is None:
            raise NotFound(
                f"image {image_id} is not in the cache of this host",
                f"bootwright image fetch {image_id} gets it",
            )
        return entry

    def partials(self) -> list[PartialEntry]:
        """Return what is being fetched, or waits to be gone on with."""
        return list(filter(None, map(_partial_entry, _listed(self._partials))))

    def allocated(self) -> int:
        """Return the bytes that all of it takes; a file with several names counts once."""
        inodes: dict[int, int] = {}
        folders = [self.directory, self._quarantine, *_listed(self._partials)]
        for folder in folders:
            # A partial may go while it is looked at, and a file be put beside it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for path in folder.iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        status = path.lstat()
                        inodes[status.st_ino] = status.st_blocks * 512
        return sum(inodes.values())

    # Coming and going; the caller holds the lock of the name

    def commit(self, name: str, data: Path, manifest: Manifest, partial: Partial) -> None:
        """Make `data`, a file in the partial, the base of that name.

        What already bears the name is replaced in one step: a damaged base
        that instances stand on stays in its place until a sound one takes it.

        Raises:
            BackendError, InsufficientFreeSpace: the file system refused; nobody will
                believe what is there.
        """
        with self._changing(name):
            manifests.write(partial.directory / "manifest.json", manifest)
            data.rename(self.path_of(name))
            fsync_directory(self.directory)
        self.complete(name, partial)

    def complete(self, name: str, partial: Partial) -> bool:
        """Take the last step of a commit if all before it have been taken.

        Raises:
            BackendError, InsufficientFreeSpace: as `commit`.
        """
        path = self.path_of(name)
        aside = partial.directory / "manifest.json"
        with self._changing(name):
            manifest = manifests.read(aside)
            if manifest is None or not path.is_file():
                return False
            if manifest.identity != manifests.identity(path):
                return False
            # Not for QEMU either, whom libvirt makes its owner: 'virsh blockcommit' writes all
            # that a guest has to the bottom of its chain if nobody tells it where to end.
            with contextlib.suppress(PermissionError):  # libvirt was quick
                path.chmod(_MODE)
            aside.rename(manifest_path(path))
            fsync_directory(self.directory)
            return True

    def update(self, name: str, manifest: Manifest) -> None:
        """Replace the manifest of a base that was verified again.

        Raises:
            BackendError, InsufficientFreeSpace: it is as before.
        """
        with self._changing(name):
            manifests.write(manifest_path(self.path_of(name)), manifest)

    def forget(self, name: str) -> None:
        """Make a base a file of no entry.

        Overlays still find it; a fetch replaces it, and a sweep removes it when nobody needs it.

        Raises:
            BackendError: it is as before.
        """
        with self._changing(name):
            manifest_path(self.path_of(name)).unlink(missing_ok=True)
            fsync_directory(self.directory)

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        path = self.path_of(name)
        try:
            with reporting_no_space(path, 0, "committing"):
                yield
        except OSError as e:
            raise BackendError(
                f"the base {path} or its manifest cannot be changed: {e}",
                "check the file system and the kernel's log",
            ) from e

    def remove(self, name: str) -> None:
        path = self.path_of(name)
        # The manifest first: without it the rest is no entry.
        manifest_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        fsync_directory(self.directory)

    def quarantine(self, name: str, *, in_use: bool) -> None:
        """Take a damaged base out of the cache, and keep it for people to look at.

        With `in_use` the file itself stays where overlays look for it, until
        the image is fetched anew; only the manifest goes, so that nobody else
        is given it. A running guest has the old file open and goes on with it;
        from its next start it reads the new one. What somebody has removed
        meanwhile is no error.

        Raises:
            BackendError: the file system refused.
        """
        path = self.path_of(name)
        target = self._quarantine / f"{name}-{time.time():.0f}"
        with self._changing(name):
            with contextlib.suppress(FileNotFoundError):
                manifest_path(path).rename(manifest_path(target))
                if not in_use:
                    path.rename(target)
            fsync_directory(self._quarantine)
            fsync_directory(self.directory)

    # Leftovers

    def sweep(self, *, partials_s: float, quarantine_s: float, keep: Callable[[str], bool]) -> None:
        """Remove what no entry and nobody at work needs.

        That is partials nobody went on with for `partials_s`, or whose image is
        here by now; what has been in quarantine for `quarantine_s`; and at once
        files of no entry: what is being made is locked. A base that `keep` asks
        for stays, entry or not: it may be all that some instance has. Whatever
        does not bear a name of ours is left alone. What one name meets does not
        keep the others from being swept.
        """
        names = {entry.name for entry in self.partials()} | {
            name
            for path in _listed(self.directory)
            if path.is_file()
            and (name := self._owner(path)) is not None
            and not self._is_of_entry(path)
        }
        for name in sorted(filter(_NAME.fullmatch, names)):
            lock = FileLock(self.lock_of(name))
            try:
                if lock.try_acquire():  # or somebody is at work on it
                    self._sweep_one(name, partials_s=partials_s, keep=keep)
            except (OSError, BackendError, InsufficientFreeSpace) as e:
                LOG.error("what is left of the base %s cannot be removed: %s", name, e)
            finally:
                lock.release()
        _remove(p for p in self.directory.glob(f".*/{UNFINISHED}") if _age(p) > partials_s)
        _remove(p for p in _listed(self._quarantine) if _age(p) > quarantine_s)

    def _sweep_one(self, name: str, *, partials_s: float, keep: Callable[[str], bool]) -> None:
        base = self.path_of(name)
        partial = _partial_entry(self._partials / name)
        if partial is not None and self._outlived(partial, partials_s):
            LOG.info("removing the partial of %s, which nobody goes on with", base)
            remove_tree(self._partials / name)
            partial = None
        # Beside a partial it may be what an interrupted commit is completed with.
        spared = base if partial is not None or keep(name) else None
        _remove(
            path
            for path in [base, manifest_path(base), *self.directory.glob(f".{name}{UNFINISHED}")]
            if path != spared and self._owner(path) == name and not self._is_of_entry(path)
        )

    def _outlived(self, partial: PartialEntry, partials_s: float) -> bool:
        entry = self.find(partial.name)
        here = entry is not None and entry.recognised
        return here or partial.changed_at < time.time() - partials_s

    def _owner(self, path: Path) -> str | None:
        """Return the name of the base that a file in `_base` belongs to."""
        match = _OURS.fullmatch(path.name)
        if match is not None:
            return match[1] or match[2]
        if path not in self._foreign:
            self._foreign.add(path)
            LOG.warning("%s is none of the image cache's files and is left alone", path)
        return None

    def _is_of_entry(self, path: Path) -> bool:
        if path.name.startswith("."):
            return False
        base = path.with_suffix("")
        try:
            return base.is_file() and manifests.read(manifest_path(base)) is not None
        except FileNotFoundError:
            return False
        except OSError:
            return True  # nobody can know


def _listed(directory: Path) -> list[Path]:
    """Return what is in a directory; nothing if it is gone, as when a share is not mounted."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _partial_entry(directory: Path) -> PartialEntry | None:
    """Return what is there of a partial; None if it is none, or has just gone."""
    try:
        changed_at = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return PartialEntry(name=directory.name, changed_at=changed_at)


def _age(path: Path) -> float:
    """Return the seconds since the file was last written, renamed or given away."""
    try:
        return time.time() - path.lstat().st_ctime
    except FileNotFoundError:
        return 0.0


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            LOG.info("removing %s, which belongs to no entry of the cache", path)
            path.unlink(missing_ok=True)
