"""Durable file work; knows nothing of images.

Whatever must survive a power cut is written under another name in the same
directory, flushed, renamed, and the directory flushed: a reader sees the whole
file or none. Functions may be called from any thread; no two of them may write
the same target at once.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.cancellation import Cancellation
from agent.errors import BackendError, InsufficientFreeSpace
from agent.sparse import data_extents
from agent.write_path import BLOCK, write_all

UNFINISHED = ".*.tmp"
"""The glob of the files that `replacing` writes to, and a crash may leave."""

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_COPY_STEP = 16 << 20  # bytes between two looks at the cancellation: some 20 ms
_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType]
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What FICLONE and copy_file_range say when the file systems cannot do it, and a
# plainer way can. Old NFS servers and overlayfs answer with any of these.
_CANNOT = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EPERM)


def free_bytes(path: Path) -> int:
    """Return the bytes an unprivileged writer may still use where `path` is."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a file, or all if it has fewer."""
    with path.open("rb") as opened:
        return opened.read(count)


def no_space(path: Path, needed: int, free: int, what: str) -> InsufficientFreeSpace:
    """Return the error for `what` (such as "copying the base to") not fitting at `path`."""
    return InsufficientFreeSpace(
        f"{what} {path}: {needed} bytes are needed and the file system has {free} bytes free"
        " (or the quota is used up)",
        f"free space below {path.parent}; 'bootwright cache gc' removes bases nobody uses",
    )


@contextlib.contextmanager
def reporting_no_space(path: Path, needed: int, what: str) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT inside the block into `InsufficientFreeSpace`."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise no_space(path, needed, free_bytes(path.parent), what) from e


@contextlib.contextmanager
def reporting(what: str, path: Path, *, needed: int = BLOCK) -> Iterator[None]:
    """Turn what the file system says about `path` inside the block into an error for the job."""
    try:
        with reporting_no_space(path, needed, what):
            yield
    except OSError as e:
        raise BackendError(
            f"{what} {path}: {e.strerror or e}", "look at the file system and the kernel's log"
        ) from e


def supports_direct(directory: Path) -> bool:
    """Return whether O_DIRECT writes work there, which they do not on tmpfs and some others."""
    # Opening is not enough to know: some file systems take the flag and refuse the write.
    probe = directory / f".direct.{os.getpid()}.{threading.get_ident()}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT
    # mmap gives memory on a page boundary, which O_DIRECT asks for.
    with (
        contextlib.closing(mmap.mmap(-1, BLOCK)) as page,
        reporting_no_space(probe, BLOCK, "trying direct I/O at"),
    ):
        try:
            fd = os.open(probe, flags, 0o600)
            try:
                os.write(fd, page)
            finally:
                os.close(fd)
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        finally:
            probe.unlink(missing_ok=True)
    return True


def fsync(path: Path) -> None:
    """Make the content of file `path` durable; a link is not followed."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Aside:
    """A file that is written and has not got its name."""

    fd: int
    path: Path
    target: Path
    needed: int
    what: str
    named: Callable[[], None]


class Together:
    """Files that get their names together: written aside, flushed at once, renamed in turn.

    To a file system that is little more work than one of them, and after a crash none
    is there without those before it. What has not been published when the `with` block
    ends is removed, with the directories that were made for it. Used by one thread.
    """

    def __init__(self) -> None:
        self._files: list[_Aside] = []
        self._made: list[Path] = []
        self._to_flush: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._files:
            _give_up(one.fd, one.path)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                path.rmdir()  # unless there is anything in it

    def directory(self, path: Path, *, mode: int) -> None:
        """Make a directory, unless it is there; its name is durable when all is published."""
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode)
            self._made.append(path)
            # The umask has no say: the mode is part of what the caller promises.
            path.chmod(mode)
        self._to_flush.append(path.parent)

    @contextlib.contextmanager
    def file(
        self,
        target: Path,
        *,
        needed: int,
        what: str,
        mode: int = 0o640,
        named: Callable[[], None] = lambda: None,
    ) -> Iterator[int]:
        """Give a descriptor (read and write) to what becomes `target`.

        It stands beside the target as `.<name>.<random>.tmp`, and is removed if the
        block does not end well. A crash may leave it. `named` is called when the target
        is there, though not yet durable.

        Raises:
            InsufficientFreeSpace: naming `what` and the `needed` bytes.
        """
        aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with reporting_no_space(target, needed, what):
            fd = os.open(aside, flags, mode)
            try:
                os.fchmod(fd, mode)
                yield fd
                # Linux begins to write now what is dirty. When all are written, one commit
                # of the file system's journal will do for them. It is no more than advice.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            except BaseException:
                _give_up(fd, aside)
                raise
        self._files.append(
            _Aside(fd=fd, path=aside, target=target, needed=needed, what=what, named=named)
        )

    def publish(self) -> None:
        """Make durable what has been written, and give it its names; more may follow.

        Raises:
            InsufficientFreeSpace, OSError: something is not durable, or not there.
        """
        for one in self._files:
            with reporting_no_space(one.target, one.needed, one.what):
                os.fsync(one.fd)
        while self._files:
            one = self._files[0]
            with reporting_no_space(one.target, one.needed, one.what):
                one.path.rename(one.target)
            del self._files[0]
            self._to_flush.append(one.target.parent)
            one.named()
            _close(one.fd)
        for directory in dict.fromkeys(reversed(self._to_flush)):
            fsync_directory(directory)
        self._to_flush.clear()
        self._made.clear()


def _close(fd: int) -> None:
    """Close a file that is durable, or of no use: what comes too late for both is no failure."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _give_up(fd: int, path: Path) -> None:
    """Let an unfinished file go. Why it goes is what counts, and the next sweep takes the rest."""
    _close(fd)
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def joining(together: Together | None) -> Iterator[Together]:
    """Give what to join; without one, what is published when the block has ended well."""
    if together is not None:
        yield together
    else:
        with Together() as alone:
            yield alone
            alone.publish()


@contextlib.contextmanager
def replacing(target: Path, *, needed: int, what: str, mode: int = 0o640) -> Iterator[int]:
    """Give a descriptor (read and write) to the file that becomes `target` at the end.

    When the block ends well the file and its name are durable; when not, the target is
    as before. See `Together.file`.
    """
    with joining(None) as alone, alone.file(target, needed=needed, what=what, mode=mode) as fd:
        yield fd


def write_durably(path: Path, data: bytes, *, mode: int = 0o640) -> None:
    """Put `data` at `path`, replacing what was there, so that a crash leaves old or new.

    Raises:
        InsufficientFreeSpace
    """
    with replacing(path, needed=len(data), what="writing", mode=mode) as fd:
        write_all(fd, memoryview(data), 0)


def copy_sparse(
    source: Path,
    target: Path,
    *,
    mode: int = 0o640,
    share: bool = True,
    cancellation: Cancellation,
) -> None:
    """Copy `source` to `target`: shared extents where the file system can, else without holes.

    Without `share` the target has blocks of its own for all that is no hole.

    On failure or cancel the target is as it was before.

    Raises:
        InsufficientFreeSpace: before the first byte if it is known not to fit.
        BootwrightError: the reason of the cancellation.
    """
    what = "copying to"
    with source.open("rb", buffering=0) as opened:
        status = os.fstat(opened.fileno())
        allocated = min(status.st_size, status.st_blocks * 512)
        with replacing(target, needed=allocated, what=what, mode=mode) as fd:
            if share and clone(opened.fileno(), fd):
                return
            free = free_bytes(target.parent)
            if allocated > free:
                raise no_space(target, allocated, free, what)
            os.ftruncate(fd, status.st_size)
            # copy_file_range(2) shares extents too where it can.
            copy = _copy_in_kernel if share else _copy_through_memory
            _copy_data(copy, opened.fileno(), fd, status.st_size, cancellation)


def remove_tree(path: Path) -> None:
    """Remove directory `path` and all below it, durably; one that is not there is no error.

    Symbolic links inside are removed, never followed, even if someone swaps a
    directory for a link meanwhile (shutil works on descriptors).

    Raises:
        BackendError: `path` is itself a link or no directory, or something
            below it could not be removed.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BackendError(
            f"removing {path}: it is not a directory, and nothing behind it was touched",
            "look what put it there and remove it by hand",
        )
    try:
        shutil.rmtree(path, onerror=_unless_gone)
        with contextlib.suppress(FileNotFoundError):
            fsync_directory(path.parent)
    except OSError as e:
        raise BackendError(f"removing {path}: {e}") from e


def clone(source: int, target: int) -> bool:
    """Let one file, a descriptor, share the extents of another; False if that cannot be.

    Raises:
        OSError: it could be, and failed.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno not in _CANNOT:
            raise
        return False
    return True


def _copy_data(
    copy: Callable[[int, int, int, int], int],
    source: int,
    target: int,
    size: int,
    cancellation: Cancellation,
) -> None:
    for begin, end in data_extents(source, 0, size):
        position = begin
        while position < end:
            cancellation.check()
            step = min(_COPY_STEP, end - position)
            try:
                copied = copy(source, target, step, position)
            except OSError as e:
                if copy is _copy_through_memory or e.errno not in _CANNOT:
                    raise
                copy = _copy_through_memory
                continue
            if copied == 0:
                raise BackendError(f"the file shrank to {position} bytes while it was copied")
            position += copied


def _copy_in_kernel(source: int, target: int, count: int, offset: int) -> int:
    return os.copy_file_range(source, target, count, offset, offset)


def _copy_through_memory(source: int, target: int, count: int, offset: int) -> int:
    data = os.pread(source, min(count, 1 << 20), offset)
    write_all(target, memoryview(data), offset)
    return len(data)


def _unless_gone(_function: object, _path: str, info: _ErrorInfo) -> None:
    """Let `rmtree` pass over what someone else has removed meanwhile."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
