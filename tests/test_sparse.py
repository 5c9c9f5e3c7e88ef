"""Files with holes, written by both ways."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.sparse import SparseFile
from agent.write_path import TRIAL, Way, WritePath
from tests.small_file_system import mounted_file_system

MIB = 1 << 20

full_file_system = mounted_file_system("tmpfs")
# Its files cannot be opened with O_DIRECT.
plain_file_system = mounted_file_system("ramfs")

pieces = st.lists(
    st.tuples(
        st.sampled_from((b"\x00", b"\x01")),
        # From 256 KiB on a piece goes around the page cache.
        st.sampled_from((1, 511, 4095, 4096, 4097, 65_536, 300_000, 1_100_000)),
    ),
    max_size=8,
)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@given(pieces, st.sampled_from((1_000, 20_000, 262_144, 1_000_003, 3 * MIB)), st.integers(0, 9000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_sparsely_reads_back(
    tmp_path: Path, pieces: list[tuple[bytes, int]], step: int, offset: int
) -> None:
    path = tmp_path / "file"
    before = b"\x07" * (offset + 8192)  # all of it beyond offset must vanish
    path.write_bytes(before)
    content = b"".join(byte * count for byte, count in pieces)
    file = SparseFile(path, length=offset)
    for begin in range(0, len(content), step):
        file.write(content, begin, min(begin + step, len(content)), offset + begin)
    file.truncate(offset + len(content))
    file.flush()
    assert file.read(0, offset + len(content)) == before[:offset] + content
    file.close()
    assert path.read_bytes() == before[:offset] + content


def test_zeros_become_holes_however_the_chunks_fall(tmp_path: Path) -> None:
    content = b"\x01" * 4096 + bytes(64 * MIB) + b"\x02" * 4096
    path = tmp_path / "file"
    file = SparseFile(path, length=0)
    for begin in range(0, len(content), 1_000_003):
        file.write(content, begin, min(begin + 1_000_003, len(content)), begin)
    file.flush()
    file.close()
    assert path.stat().st_size == len(content)
    assert allocated(path) <= 16384


def test_what_was_wiped_is_zeros_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = os.urandom(4 * MIB)
    file = SparseFile(path, length=8 * MIB)
    file.write(data, 0, len(data), MIB)
    file.wipe(2 * MIB, 6 * MIB)
    file.write(data, 0, MIB, 3 * MIB)
    file.close()
    zeros = bytes(MIB)
    assert path.read_bytes() == zeros + data[:MIB] + zeros + data[:MIB] + 4 * zeros


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "file").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        SparseFile(tmp_path / "file", length=0)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_full_disk_is_an_error(full_file_system: Path) -> None:
    file = SparseFile(full_file_system / "file", length=0)
    with pytest.raises(OSError, match="No space") as caught:
        file.write(os.urandom(3 * MIB), 0, 3 * MIB, 0)
    file.close()
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_without_direct_writes_is_written_all_the_same(
    plain_file_system: Path,
) -> None:
    path = plain_file_system / "file"
    data = os.urandom(MIB + 5)
    with path.open("wb") as file:
        way = WritePath(path, file.fileno())
        assert way.chosen is Way.BUFFERED
        way.write(memoryview(data), 3)
        way.close()
    assert path.read_bytes() == bytes(3) + data


def ticking(*steps: float) -> Callable[[], float]:
    """Return a clock that is so much later each time it is looked at."""

    def times() -> Iterator[float]:
        now = 0.0
        for step in steps:
            now += step
            yield now

    return times().__next__


@pytest.mark.parametrize(
    ("direct_s", "buffered_s", "chosen"),
    [(1.0, 1.0, Way.DIRECT), (1.4, 1.0, Way.DIRECT), (1.6, 1.0, Way.BUFFERED)],
)
def test_the_rest_goes_the_way_that_was_faster(
    tmp_path: Path, direct_s: float, buffered_s: float, chosen: Way
) -> None:
    path = tmp_path / "file"
    data = os.urandom(TRIAL)
    with path.open("wb") as file:
        way = WritePath(path, file.fileno(), clock=ticking(0, direct_s, 0, buffered_s))
        for part in range(3):
            assert way.chosen is (None if part < 2 else chosen)
            way.write(memoryview(data), part * TRIAL)
        way.close()
    assert path.read_bytes() == data * 3


def in_page_cache(path: Path) -> bool:
    """Whether reading it would not need the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(mmap.PAGESIZE)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_large_writes_go_around_the_page_cache_and_small_ones_do_not(tmp_path: Path) -> None:
    for length, cached in ((MIB, False), (4096, True)):
        path = tmp_path / str(length)
        with path.open("wb") as file:
            way = WritePath(path, file.fileno())
            if way.chosen is Way.BUFFERED:
                pytest.skip("no direct writes here")
            way.write(memoryview(os.urandom(length)), 0)
            way.close()
        assert in_page_cache(path) is cached
