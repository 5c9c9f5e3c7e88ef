"""Mutual exclusion between processes and threads: flock on a file of its own.

The file is never removed: between the unlink and the open of two others there
would be two locks of one name. The kernel drops the lock when its holder dies.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from agent.cancellation import Cancellation
from agent.errors import BackendError
from agent.files import reporting_no_space
from agent.write_path import BLOCK

_POLL_FIRST_S = 0.05
_POLL_LONGEST_S = 0.5


class FileLock:
    """One holder at a time of `path`, on this host; objects may share a path.

    An object belongs to one thread; threads that compete have one each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Return whether the lock is now held; never waits.

        Raises:
            BackendError: the file cannot be opened, or is a symbolic link.
            InsufficientFreeSpace: it is not there, and the disk is full.
        """
        if self._fd is not None:
            raise RuntimeError(f"the lock {self._path} is already held by this object")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with reporting_no_space(self._path, BLOCK, "making the lock file"):
                fd = os.open(self._path, flags, 0o640)
        except OSError as e:
            raise BackendError(
                f"opening the lock file {self._path}: {e.strerror}",
                "its directory must exist and belong to the agent's user",
            ) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def acquire(self, cancellation: Cancellation) -> None:
        """Return when the lock is held.

        A blocking flock could not be woken up by a cancel, so this polls: at
        most half a second after the holder let go it is noticed.

        Raises:
            BackendError, InsufficientFreeSpace: as `try_acquire`.
            BootwrightError: the reason of the cancellation.
        """
        pause = _POLL_FIRST_S
        cancellation.check()
        while not self.try_acquire():
            cancellation.wait(pause)
            pause = min(2 * pause, _POLL_LONGEST_S)

    def release(self) -> None:
        """Let go; a lock that is not held stays so."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextlib.contextmanager
def held(path: Path, cancellation: Cancellation) -> Iterator[None]:
    """Hold the lock `path` during the block. Raises as `FileLock.acquire`."""
    lock = FileLock(path)
    lock.acquire(cancellation)
    try:
        yield
    finally:
        lock.release()
