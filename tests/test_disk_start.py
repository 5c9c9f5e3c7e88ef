"""The first bytes of disks within images, held against what QEMU reads there."""

import contextlib
import functools
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import disk_bounds, disk_start
from agent.cancellation import Cancellation
from agent.inspection import HEAD
from tests.corpus import vmdk_images
from tests.corpus.case import CONTENT, MIB, converted, patched
from tests.qemu_images import VARIANTS, needs_qemu_img

pytestmark = needs_qemu_img

DISKS = {
    "data": CONTENT,
    "a hole first": bytes(64 << 10) + CONTENT[: MIB - 1024],
    "a hole, then an odd end": bytes(200 << 10) + CONTENT[: 3 * 512],
    "nothing": bytes(MIB),
    "one sector": CONTENT[:512],
}


def start_of(data: bytes, format_: str, length: int = HEAD) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "image"
        path.write_bytes(data)
        return disk_start.read(path, format_, length)


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize(("format_", "options"), VARIANTS)
def test_it_is_what_qemu_was_given(format_: str, options: str, disk: str, tmp_path: Path) -> None:
    content = DISKS[disk]
    length = min(HEAD, len(content))
    image = converted(tmp_path, format_, options, content=content)
    assert start_of(image, format_, length) == content[:length]


@pytest.mark.parametrize("options", ["", "compression_type=zstd"])
def test_compressed_clusters_are_read(options: str, tmp_path: Path) -> None:
    image = converted(tmp_path, "qcow2", options, compress=True)
    assert len(image) < len(CONTENT) + MIB
    assert start_of(image, "qcow2") == CONTENT[:HEAD]


def test_a_vmdk_with_a_footer_is_read(tmp_path: Path) -> None:
    assert start_of(vmdk_images.with_footer(tmp_path), "vmdk") == CONTENT[:HEAD]


def _with_other_footer(at: int, new: bytes) -> Callable[[Path], bytes]:
    def make(work: Path) -> bytes:
        data = vmdk_images.with_footer(work)
        return patched(data, len(data) - 1024 + at, new)

    return make


@pytest.mark.parametrize(
    ("format_", "make", "why"),
    [
        # QEMU goes by the footer and inspection by the header.
        ("vmdk", _with_other_footer(12, b"\1" * 8), "footer differs from its header in bytes 0"),
        ("vmdk", _with_other_footer(77, b"\0"), "footer differs from its header in bytes 77"),
        ("vmdk", lambda w: vmdk_images.with_footer(w) + b"\0", "no multiple of 512"),
        (
            "vpc",
            lambda w: patched(converted(w, "vpc"), 16, struct.pack(">Q", 1 << 62)),
            "vhd dynamic header is at 0x4000000000000000 .* beyond the file's",
        ),
        ("vpc", lambda w: patched(converted(w, "vpc"), 512, b"CX"), "no dynamic header"),
        (
            "vpc",
            lambda w: patched(converted(w, "vpc"), 512 + 28, bytes(4)),
            "has 0 entries, too few",
        ),
        (
            "vdi",
            lambda w: patched(converted(w, "vdi"), 0x154, b"\xff" * 4),
            "entry of the vdi block 0 is at 0xffffffff",
        ),
        (
            "vhdx",
            lambda w: patched(converted(w, "vhdx"), (192 << 10) + 8, struct.pack("<I", 2048)),
            "region table has 2048 entries",
        ),
    ],
)
def test_what_leads_astray_is_an_error(
    format_: str, make: Callable[[Path], bytes], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        start_of(make(tmp_path), format_)


_SOMETHING = re.compile(rb"[^\0]")


@functools.cache
def _image(format_: str, options: str) -> bytes:
    """Return an image of one sector and nothing more: what is not zero in it, mostly misleads."""
    with tempfile.TemporaryDirectory() as name:
        content = CONTENT[:512].ljust(64 << 10, b"\0")
        return converted(Path(name), format_, options, content=content)


@given(
    variant=st.sampled_from(VARIANTS),
    edits=st.lists(
        st.tuples(
            st.integers(0, 3 * MIB),
            st.sampled_from([bytes(4), b"\xff" * 4, b"\xff" * 8, b"\1\0\0\0", b"\0\0\0\x80"]),
        ),
        max_size=6,
    ),
    missing=st.integers(0, MIB),
)
@settings(max_examples=200)
def test_no_bytes_make_it_stumble(
    variant: tuple[str, str],
    edits: list[tuple[int, bytes]],
    missing: int,
) -> None:
    image = bytearray(_image(*variant))
    for somewhere, new in edits:
        # Where there is something, there is something to be misled by.
        place = somewhere % (len(image) - 8)
        something = _SOMETHING.search(image, place, len(image) - 8)
        place = place if something is None else something.start()
        image[place : place + len(new)] = new
    data = bytes(image[: max(512, len(image) - missing)])
    with contextlib.suppress(ValueError):
        assert len(start_of(data, variant[0], 64 << 10)) == 64 << 10
    with contextlib.suppress(ValueError), tempfile.TemporaryDirectory() as name:
        (Path(name) / "image").write_bytes(data)
        disk_bounds.check(Path(name) / "image", variant[0], Cancellation())
