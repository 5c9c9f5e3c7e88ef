"""Images cut off anywhere are refused, or nothing of their disks is missing; whole ones are not."""

import itertools
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import disk_bounds
from agent.cancellation import Cancellation
from agent.disk_tables import crc32c
from agent.errors import AgentStopping, DeadlineExceeded, ImageUnacceptable
from agent.inspection import Inspection
from tests.corpus import vmdk_images
from tests.corpus.case import CONTENT, GIB, KIB, MIB, VMDK_TYPES, converted, patched
from tests.qemu_images import VARIANTS, needs_qemu_img

pytestmark = needs_qemu_img

CLAIMS = {"vpc": "vhd"}


def check(data: bytes, format_: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "image"
        path.write_bytes(data)
        disk_bounds.check(path, format_, Cancellation(60))


def judge(data: bytes, format_: str) -> None:
    """What is asked of an image before QEMU opens it, but for its hash."""
    inspection = Inspection(
        "img-1", CLAIMS.get(format_, format_), size=len(data), vmdk_types=VMDK_TYPES
    )
    inspection.feed(data)
    inspection.finish()
    check(data, format_)


sizes = st.integers(1, 12 * MIB // 512).map(lambda sectors: sectors * 512)
pieces = st.lists(st.tuples(st.integers(0, 12 * MIB), st.integers(1, 200 * KIB)), max_size=4)


def disk(size: int, written: list[tuple[int, int]]) -> bytes:
    """Return a disk with noise in some places."""
    content = bytearray(size)
    for somewhere, length in written:
        at = somewhere % size
        content[at : at + length] = CONTENT[: min(length, size - at)]
    return bytes(content)


@given(variant=st.sampled_from(VARIANTS), size=sizes, written=pieces)
@settings(max_examples=60)
def test_what_qemu_img_makes_is_whole(
    variant: tuple[str, str], size: int, written: list[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        image = converted(Path(name), *variant, content=disk(size, written))
    judge(image, variant[0])


@given(
    variant=st.sampled_from(VARIANTS),
    size=sizes,
    written=pieces,
    kept=st.floats(0, 1) | st.integers(-3 * MIB, -1),
)
@settings(max_examples=60)
def test_what_was_cut_is_refused_or_all_there(
    variant: tuple[str, str], size: int, written: list[tuple[int, int]], kept: float
) -> None:
    content = disk(size, written)
    format_, options = variant
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        image = converted(work, *variant, content=content)
        cut = image[
            : max(0, len(image) + kept) if isinstance(kept, int) else int(len(image) * kept)
        ]
        try:
            judge(cut, format_)
        except (ImageUnacceptable, ValueError):
            return
        (work / "cut").write_bytes(cut)
        subprocess.run(
            ["qemu-img", "convert", "-f", format_, "-O", "raw", work / "cut", work / "raw"],
            check=True,
        )
        found = (work / "raw").read_bytes()
    if format_ == "qcow2":
        # Where its last cluster ends in the file nothing tells; the rest reads as zeros.
        missing = [i for i in range(size) if found[i] != content[i]]
        cluster = 2 * MIB if options == "cluster_size=2M" else 64 * KIB
        assert not missing or missing[-1] - missing[0] < cluster
        return
    assert found[:size] == content


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vdi", ""),
        ("vpc", ""),
        ("vhdx", ""),
        ("vhdx", "block_size=1M"),
        ("qcow2", ""),
    ],
)
def test_large_and_nearly_empty_disks_are_whole(format_: str, options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    words = ["-o", options] if options else []
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(130 * GIB + 512)
        for at in (0, 33 * GIB, 130 * GIB):
            file.seek(at)
            file.write(CONTENT[:512])
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format_, *words, raw, path],
        check=True,
    )
    disk_bounds.check(path, format_, Cancellation(60))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match="the file's"):
        disk_bounds.check(path, format_, Cancellation(60))


def _edited(format_: str, options: str, at: int, new: bytes) -> Callable[[Path], bytes]:
    return lambda work: patched(converted(work, format_, options), at, new)


def _vmdk_directory(work: Path) -> tuple[bytes, int]:
    data = converted(work, "vmdk", "subformat=monolithicSparse")
    (directory,) = struct.unpack_from("<Q", data, 56)
    return data, directory * 512


def _far_vmdk_table(work: Path) -> bytes:
    data, directory = _vmdk_directory(work)
    return patched(data, directory, struct.pack("<I", 1 << 30))


def _far_vmdk_grain(work: Path) -> bytes:
    data, directory = _vmdk_directory(work)
    (table,) = struct.unpack_from("<I", data, directory)
    return patched(data, table * 512 + 4, struct.pack("<I", (1 << 32) - 1))


def _last_vmdk_grain_twice(work: Path) -> bytes:
    data = converted(work, "vmdk", "subformat=streamOptimized")
    (directory,) = struct.unpack_from("<Q", data, 56)
    (table,) = struct.unpack_from("<I", data, directory * 512)
    grains = struct.unpack_from("<512I", data, table * 512)
    return patched(data, table * 512, struct.pack("<I", max(grains)))


def _qcow2_table_twice(work: Path) -> bytes:
    data = converted(work, "qcow2", "cluster_size=512")
    (l1,) = struct.unpack_from(">Q", data, 40)
    return patched(data, l1 + 8, data[l1 : l1 + 8])


def _far_vhdx_block(entry: int, index: int = 1) -> Callable[[Path], bytes]:
    def make(work: Path) -> bytes:
        data = converted(work, "vhdx", "block_size=1M")
        region = data.index(bytes.fromhex("6677c22d23f600429d64115e9bfd4a08"), 192 * KIB)
        (bat,) = struct.unpack_from("<Q", data, region + 16)
        return patched(data, bat + 8 * index, struct.pack("<Q", entry))

    return make


@pytest.mark.parametrize(
    ("format_", "make", "why"),
    [
        ("vmdk", vmdk_images.aliasing, "grain table 1 is at 0x[0-9a-f]+, which is another table's"),
        ("vmdk", _last_vmdk_grain_twice, r"grain \d+ is at 0x[0-9a-f]+, which is another grain's"),
        ("qcow2", _qcow2_table_twice, "L2 table 1 at 0x[0-9a-f]+ overlaps something else: a table"),
    ],
)
def test_what_would_have_to_be_looked_at_again_is_an_error(
    format_: str, make: Callable[[Path], bytes], why: str, tmp_path: Path
) -> None:
    data = make(tmp_path)
    with pytest.raises(ValueError, match=why):
        check(data, format_)


@pytest.mark.parametrize(
    ("format_", "options", "tables"),
    [("vmdk", "subformat=monolithicSparse", 65), ("qcow2", "cluster_size=512", 65)],
)
def test_a_deadline_can_end_it_after_each_table(
    format_: str, options: str, tables: int, tmp_path: Path
) -> None:
    # A table of VMDK is about 32 MiB, one of this qcow2 about 32 KiB.
    size = (tables - 1) * (32 * MIB if format_ == "vmdk" else 32 * KIB) + 512
    raw, path = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, size // (tables - 1)):
            file.seek(at)
            file.write(CONTENT[:512])
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format_, "-o", options, raw, path], check=True
    )
    # The time is how often it was asked for.
    disk_bounds.check(path, format_, Cancellation(10 * tables, clock=itertools.count().__next__))
    with pytest.raises(DeadlineExceeded):
        disk_bounds.check(path, format_, Cancellation(tables - 5, clock=itertools.count().__next__))


def _with_vhdx_headers(data: bytes, first: bytes, second: bytes) -> bytes:
    return patched(patched(data, 64 * KIB, first), 128 * KIB, second)


def _vhdx_header(
    sequence: int, identity: bytes = bytes(16), offset: int = MIB, *, checksum: bool = True
) -> bytes:
    """Return a header that tells of a log of 1 MiB."""
    header = struct.pack(
        "<4sIQ16s16s16sHHIQ",
        b"head", 0, sequence, b"f" * 16, b"d" * 16, identity, 0, 1, MIB, offset,
    ).ljust(4096, b"\0")  # fmt: skip
    return patched(header, 4, struct.pack("<I", crc32c(header))) if checksum else header


IDENTITY = b"an identity of 1"


def _vhdx(first: bytes, second: bytes, *, logged: bytes) -> Callable[[Path], bytes]:
    """Make an image with these headers, and with an entry of that identity in its log."""

    def make(work: Path) -> bytes:
        data = _with_vhdx_headers(converted(work, "vhdx"), first, second)
        return patched(data, MIB + 8192, b"loge".ljust(32, b"\0") + logged)

    return make


@pytest.mark.parametrize(
    ("format_", "make", "why"),
    [
        ("vmdk", _far_vmdk_table, "vmdk grain table 0 is at 0x8000000000 .* beyond the file's"),
        ("vmdk", _far_vmdk_grain, "vmdk grain 1 is at 0x1fffffffe00 .* beyond the file's"),
        (
            "vmdk",
            _edited("vmdk", "subformat=monolithicSparse", 48, struct.pack("<Q", 1 << 40)),
            "second grain directory is at 0x2000000000000",
        ),
        (
            "vmdk",
            _edited("vmdk", "subformat=streamOptimized", 64, struct.pack("<Q", 1 << 20)),
            "before the grains of the vmdk is at 0x0 to 0x20000000, beyond the file's",
        ),
        (
            "vdi",
            _edited("vdi", "", 0x200 + 4, struct.pack("<I", 1000)),
            "vdi block 1000 is at .* beyond the file's",
        ),
        (
            "vpc",
            _edited("vpc", "", 1536, struct.pack(">I", 0x7FFFFFFF)),
            "vhd block is at 0xfffffffe00 .* beyond the file's",
        ),
        ("vhdx", _far_vhdx_block(1 << 40 | 6), "vhdx block 1 is at 0x10000000000 .* beyond"),
        ("vhdx", _far_vhdx_block(7), "vhdx block 1 has the state 7, which needs a parent"),
        (
            "vhdx",
            _vhdx(_vhdx_header(8, IDENTITY), _vhdx_header(7), logged=IDENTITY),
            r"was not closed: its log has changes \(at 0x102000\)",
        ),
        (
            "vhdx",
            _vhdx(_vhdx_header(8, IDENTITY, 1 << 40), _vhdx_header(7), logged=IDENTITY),
            "vhdx log is at 0x10000000000 to .* beyond the file's",
        ),
        (
            "vhdx",
            _vhdx(
                _vhdx_header(8, checksum=False), _vhdx_header(9, checksum=False), logged=IDENTITY
            ),
            "no header whose checksum is right",
        ),
    ],
)
def test_what_points_out_of_the_file_is_an_error(
    format_: str, make: Callable[[Path], bytes], why: str, tmp_path: Path
) -> None:
    data = make(tmp_path)
    with pytest.raises(ValueError, match=why):
        check(data, format_)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The log was replayed, and what is in it is of before.
        (_vhdx_header(8), _vhdx_header(7, IDENTITY)),
        (_vhdx_header(7, IDENTITY), _vhdx_header(8)),
        (_vhdx_header(8, b"another identity"), _vhdx_header(7, IDENTITY)),
        # While a header is written, the other one counts.
        (_vhdx_header(8, IDENTITY, checksum=False), _vhdx_header(7)),
    ],
)
def test_a_log_that_is_over_does_not_matter(first: bytes, second: bytes, tmp_path: Path) -> None:
    data = _vhdx(first, second, logged=IDENTITY)(tmp_path)
    check(data, "vhdx")
    # The checksums and all else are as QEMU wants them.
    path = tmp_path / "image"
    path.write_bytes(data)
    subprocess.run(["qemu-img", "info", "-f", "vhdx", path], check=True, capture_output=True)


def test_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_looking_at_tables_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(converted(tmp_path, "vdi"))
    cancellation = Cancellation(60)
    cancellation.cancel(AgentStopping("the agent stops"))
    with pytest.raises(AgentStopping):
        disk_bounds.check(path, "vdi", cancellation)
