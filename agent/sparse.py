"""Files with holes: found where they are, and left where zeros would be written.

Knows nothing of what the files hold. Functions may be called from any thread.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from agent.write_path import BLOCK, WritePath, write_all

_ZEROS = bytes(BLOCK)
_STEP = 1 << 20


class SparseFile:
    """One file that is written at given places; any thread may write.

    What is written where something else had been must not have blocks of zeros:
    they are left out, and so only right where the file has holes.
    """

    def __init__(self, path: Path, *, length: int) -> None:
        """Make the file, or cut or extend the one that is there, to `length` bytes.

        Raises:
            OSError: also if there is a symbolic link.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o640)
        try:
            os.ftruncate(self._fd, length)
            self._path = WritePath(path, self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, data: bytes, begin: int, end: int, offset: int) -> None:
        """Write `data[begin:end]` at `offset`, but for blocks of zeros."""
        view = memoryview(data)
        for start, stop in _data_runs(data, begin, end, offset):
            self._path.write(view[start:stop], offset + start - begin)

    def read(self, begin: int, end: int) -> bytes:
        """Return what is there from `begin` to `end`.

        Raises:
            ValueError: the file is shorter.
        """
        parts = []
        while begin < end:
            part = os.pread(self._fd, end - begin, begin)
            if not part:
                raise ValueError(f"the file ends at {begin}, before {end}")
            parts.append(part)
            begin += len(part)
        return b"".join(parts)

    def wipe(self, begin: int, end: int) -> None:
        """Write zeros over all that is no hole from `begin` to `end`, or to the file's end."""
        for start, stop in data_extents(self._fd, begin, min(end, os.fstat(self._fd).st_size)):
            for at in range(start, stop, _STEP):
                write_all(self._fd, memoryview(bytes(min(_STEP, stop - at))), at)

    def truncate(self, length: int) -> None:
        """Cut or extend the file to so many bytes."""
        os.ftruncate(self._fd, length)

    def flush(self) -> None:
        """Return when everything written is on stable storage."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close without flushing; may be called again."""
        if self._fd >= 0:
            self._path.close()
            os.close(self._fd)
            self._fd = -1


def data_extents(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every stretch between both that is not a hole.

    File systems without holes give one.
    """
    while begin < end:
        try:
            begin = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # a hole up to the end of the file
                return
            raise
        stop = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        if begin < stop:
            yield begin, stop
        begin = stop


def _data_runs(data: bytes, begin: int, end: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of blocks in `data[begin:end]` that are not all zeros.

    Blocks are those of the file, where `data[begin]` stands at `offset`; the
    pieces at both ends count as blocks.
    """
    shift = offset - begin
    start = position = begin
    while position < end:
        stop = min(position + BLOCK - (position + shift) % BLOCK, end)
        length = stop - position
        # bytes.startswith compares in place: some 10 GB/s, where slices of a
        # memoryview compare item by item.
        if data.startswith(_ZEROS if length == BLOCK else _ZEROS[:length], position):
            if start < position:
                yield start, position
            start = stop
        position = stop
    if start < end:
        yield start, end
