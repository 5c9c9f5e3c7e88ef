"""The way of large writes to the disk: through the page cache, or around it.

Around it (O_DIRECT) spares a copy and the kernel's write-back, which compete
with the hash for the processor: 512 MiB cost 0.10 s of system time beside a
hash, and 0.18 to 0.70 s through the page cache. It also leaves alone what else
is there. But each write waits for the disk; where that is far away, the page
cache hides it by writing much at a time. So each file begins with a trial of
both, and the rest goes the faster way.
"""

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path

BLOCK = 4096
"""Bytes; what ext4 and xfs allocate at least, so a shorter hole saves nothing.

O_DIRECT is content with multiples of it, too.
"""

# A write that is smaller waits as long for less; on a turning disk, for a turn.
# It tells, too, that the network is slower than we are: the processor has time.
_LARGE = 256 << 10
_STEP = 1 << 20
TRIAL = 8 << 20
"""Bytes that each way is tried with: enough to tell a rate from a latency."""
# Wall clocks are noisy, and do not see what the processor is spared.
_ALLOWANCE = 1.5
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)


class Way(Enum):
    DIRECT = auto()
    BUFFERED = auto()


class WritePath:
    """To one file; any thread may write."""

    def __init__(self, path: Path, fd: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`fd` is `path`, open for writing, and stays the caller's."""
        self._fd = fd
        self._clock = clock
        self.chosen: Way | None = None
        """None while both are tried."""
        self._direct = _open_direct(path)
        if self._direct is None:
            self.chosen = Way.BUFFERED
        # Of the trial: what is being tried, for how long and how far, and how
        # long the way before took for a byte.
        self._trial = threading.Lock()
        self._trying = Way.DIRECT
        self._spent = 0.0
        self._written = 0
        self._direct_cost = 0.0
        # Aligned, as O_DIRECT wants them; one for each thread that writes just now.
        self._buffers: list[mmap.mmap] = []

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OSError: that failed; or, during the trial, syncing what had been written.
        """
        # Each block goes one way: in a page of the cache they would be in each other's.
        begin = -offset % BLOCK
        end = begin + (len(data) - begin) // BLOCK * BLOCK
        if end - begin < _LARGE:
            write_all(self._fd, data, offset)
            return
        write_all(self._fd, data[:begin], offset)
        self._write_blocks(data[begin:end], offset + begin)
        write_all(self._fd, data[end:], offset + end)

    def close(self) -> None:
        """Let go of the file; may be called again."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _write_blocks(self, data: memoryview, offset: int) -> None:
        if self.chosen is None:
            with self._trial:
                if self.chosen is None:
                    self._try(data, offset)
                    return
        self._write_by(self.chosen, data, offset)

    def _try(self, data: memoryview, offset: int) -> None:
        began = self._clock()
        self._write_by(self._trying, data, offset)
        self._written += len(data)
        if self._written >= TRIAL:
            os.fdatasync(self._fd)
        self._spent += self._clock() - began
        if self._written < TRIAL:
            return
        cost = self._spent / self._written
        if self._trying is Way.DIRECT:
            self._direct_cost = cost
            self._trying, self._spent, self._written = Way.BUFFERED, 0.0, 0
        elif self.chosen is None:
            slow = self._direct_cost > cost * _ALLOWANCE
            self.chosen = Way.BUFFERED if slow else Way.DIRECT

    def _write_by(self, way: Way, data: memoryview, offset: int) -> None:
        done = self._write_directly(data, offset) if way is Way.DIRECT else 0
        write_all(self._fd, data[done:], offset + done)

    def _write_directly(self, data: memoryview, offset: int) -> int:
        """Return how much was written; less than all where it turns out to be impossible."""
        if self._direct is None:
            return 0
        buffer = self._buffers.pop() if self._buffers else mmap.mmap(-1, _STEP)
        done = 0
        try:
            while done < len(data):
                length = min(_STEP, len(data) - done)
                buffer[:length] = data[done : done + length]
                done += os.pwrite(self._direct, memoryview(buffer)[:length], offset + done)
        except OSError as e:
            # Said by a file system that opens the file so all the same, or whose
            # blocks are larger than ours.
            if e.errno not in _CANNOT:
                raise
            self.chosen = Way.BUFFERED
        finally:
            self._buffers.append(buffer)
        return done


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _open_direct(path: Path) -> int | None:
    flags = os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except OSError as e:
        if e.errno not in _CANNOT:
            raise
        return None  # the file system knows no such thing
