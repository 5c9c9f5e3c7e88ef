"""Reading and writing at given places of sparse files; knows nothing of their content."""

import errno
import os
from collections.abc import Iterator

_BLOCK = 4096
_ZEROS = bytes(_BLOCK)
_STEP = 1 << 20


def read(fd: int, begin: int, end: int) -> bytes:
    """Return what is there from `begin` to `end`.

    Raises:
        ValueError: the file is shorter.
    """
    parts = []
    while begin < end:
        part = os.pread(fd, end - begin, begin)
        if not part:
            raise ValueError(f"the file ends at {begin}, before {end}")
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def write(fd: int, data: bytes, begin: int, end: int, offset: int) -> None:
    """Write `data[begin:end]` at `offset`; blocks of zeros are left out.

    So it is only right where the file has holes, or the same bytes already.
    """
    view = memoryview(data)
    shift = offset - begin
    start = position = begin
    while position < end:
        stop = min(position + _BLOCK - (position + shift) % _BLOCK, end)
        length = stop - position
        if data.startswith(_ZEROS if length == _BLOCK else _ZEROS[:length], position):
            if start < position:
                _write_all(fd, view[start:position], start + shift)
            start = stop
        position = stop
    if start < end:
        _write_all(fd, view[start:end], start + shift)


def wipe(fd: int, begin: int, end: int) -> None:
    """Write zeros over all that is no hole from `begin` to `end`, or to the file's end."""
    for start, stop in _data_extents(fd, begin, min(end, os.fstat(fd).st_size)):
        for at in range(start, stop, _STEP):
            _write_all(fd, memoryview(bytes(min(_STEP, stop - at))), at)


def _data_extents(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every stretch between both that is not a hole."""
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
