"""The real qemu-img, on real files, with real limits."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import BackendError, Cancelled, ImageUnacceptable, InsufficientFreeSpace
from agent.qemu_img import QemuImg
from tests.qemu_images import needs_qemu_img

pytestmark = needs_qemu_img

MIB = 1 << 20
FORMATS = ("qcow2", "vmdk", "vhdx", "vpc", "vdi")


def image(directory: Path, format_: str, content: bytes) -> Path:
    raw = directory / "content"
    raw.write_bytes(content)
    path = directory / f"image.{format_}"
    options = ["-o", "subformat=streamOptimized"] if format_ == "vmdk" else []
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format_, *options, raw, path], check=True
    )
    return path


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_becomes_the_same_sparse_raw_file(tmp_path: Path, format_: str) -> None:
    content = os.urandom(MIB) + bytes(30 * MIB) + os.urandom(MIB + 512 * 3)
    source, target = image(tmp_path, format_, content), tmp_path / "base"
    QemuImg().convert(source, format_, target, Cancellation(), virtual_size=40 * MIB)
    # vpc and vhdx round up to whole cylinders or sectors.
    assert target.read_bytes().rstrip(b"\0") == content.rstrip(b"\0")
    assert target.stat().st_blocks * 512 < 4 * MIB
    assert target.stat().st_mode & 0o007 == 0


def test_qcow2_keeps_its_exact_size(tmp_path: Path) -> None:
    source, target = image(tmp_path, "qcow2", os.urandom(5 * 512)), tmp_path / "base"
    QemuImg().convert(source, "qcow2", target, Cancellation(), virtual_size=5 * 512)
    assert target.stat().st_size == 5 * 512


def test_it_works_where_there_is_no_direct_io(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"bootwright-test-{os.getpid()}"
    elsewhere.mkdir()
    try:
        source = image(tmp_path, "qcow2", b"x" * MIB)
        QemuImg().convert(source, "qcow2", elsewhere / "base", Cancellation(), virtual_size=MIB)
        assert (elsewhere / "base").read_bytes() == b"x" * MIB
        assert [path.name for path in elsewhere.iterdir()] == ["base"]
    finally:
        shutil.rmtree(elsewhere)


def test_more_than_the_header_promised_is_not_written(tmp_path: Path) -> None:
    source, target = image(tmp_path, "qcow2", os.urandom(2 * MIB)), tmp_path / "base"
    with pytest.raises(ImageUnacceptable, match=f"larger than the {MIB + 65536} bytes"):
        QemuImg().convert(source, "qcow2", target, Cancellation(), virtual_size=MIB)
    assert not target.exists()


def test_the_other_limits_are_named(tmp_path: Path) -> None:
    source, target = image(tmp_path, "qcow2", os.urandom(2 * MIB)), tmp_path / "base"
    with pytest.raises(ImageUnacceptable, match="bytes of address space"):
        QemuImg(address_space=40 * MIB).convert(
            source, "qcow2", target, Cancellation(), virtual_size=2 * MIB
        )
    with pytest.raises(BackendError, match="time limit"):
        QemuImg(timeout_s=0.0).convert(
            source, "qcow2", target, Cancellation(), virtual_size=2 * MIB
        )
    assert not target.exists()


def test_a_damaged_image_is_refused_in_qemus_words(tmp_path: Path) -> None:
    source, target = image(tmp_path, "qcow2", os.urandom(2 * MIB)), tmp_path / "base"
    with source.open("r+b") as f:
        f.seek(40)
        f.write(b"\xff" * 8)
    with pytest.raises(ImageUnacceptable, match="L1 table"):
        QemuImg().convert(source, "qcow2", target, Cancellation(), virtual_size=2 * MIB)
    assert not target.exists()


def test_a_cancel_leaves_no_target(tmp_path: Path) -> None:
    source, target = image(tmp_path, "qcow2", os.urandom(2 * MIB)), tmp_path / "base"
    cancellation = Cancellation()
    threading.Timer(0.005, cancellation.cancel, [Cancelled("enough")]).start()

    def convert_again_and_again() -> None:
        while True:
            QemuImg().convert(source, "qcow2", target, cancellation, virtual_size=2 * MIB)

    with pytest.raises(Cancelled):
        convert_again_and_again()
    assert not target.exists()


def test_a_full_disk_is_not_the_images_fault(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "small", small], check=False
        ).returncode
    ):
        pytest.skip("no mounts here")
    try:
        source = image(tmp_path, "qcow2", os.urandom(3 * MIB))
        with pytest.raises(InsufficientFreeSpace, match="base"):
            QemuImg().convert(source, "qcow2", small / "base", Cancellation(), virtual_size=3 * MIB)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_missing_program_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="not installed"):
        QemuImg(program="no-such-qemu-img").convert(
            tmp_path / "image", "raw", tmp_path / "base", Cancellation(), virtual_size=MIB
        )
