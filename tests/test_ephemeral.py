"""Formatted disks, read back with the tools of their file systems."""

import subprocess
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.ephemeral import create, create_swap
from agent.errors import BackendError, Cancelled
from agent.job import GuestFormat
from agent.report import Role

MIB = 1 << 20
UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
OTHER = "1b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"

FORMATTED = [each for each in GuestFormat if each is not GuestFormat.NONE]
CHECKS = {
    GuestFormat.EXT4: ["fsck.ext4", "-f", "-n"],
    GuestFormat.XFS: ["xfs_repair", "-f", "-n"],
    GuestFormat.VFAT: ["fsck.vfat", "-n"],
}


def disk(directory: Path, name: str = "disk.eph0", size: int = 1024 * MIB) -> Disk:
    directory.mkdir(exist_ok=True)
    return Disk(role=Role.EPHEMERAL, path=directory / name, format="raw", virtual_size=size)


def made(
    disk: Disk,
    guest_format: GuestFormat = GuestFormat.EXT4,
    label: str = "ephemeral0",
    instance_uuid: str = UUID,
) -> Disk:
    create(
        disk,
        guest_format=guest_format,
        label=label,
        instance_uuid=instance_uuid,
        cancellation=Cancellation(),
    )
    return disk


def probed(disk: Disk) -> dict[str, str]:
    output = subprocess.run(
        ["blkid", "-p", "-o", "export", disk.path], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in output.splitlines())


@pytest.mark.parametrize("guest_format", FORMATTED)
def test_disk_has_the_file_system_label_and_size_asked_for(
    guest_format: GuestFormat, tmp_path: Path
) -> None:
    eph = made(disk(tmp_path), guest_format)
    found = probed(eph)
    assert (found["TYPE"], found["LABEL"]) == (guest_format, "ephemeral0")
    assert eph.path.stat().st_size == 1024 * MIB
    assert eph.path.stat().st_blocks * 512 < 100 * MIB
    assert eph.path.stat().st_mode & 0o777 == 0o640
    subprocess.run([*CHECKS[guest_format], eph.path], capture_output=True, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.eph0"]


@pytest.mark.parametrize("guest_format", FORMATTED)
def test_no_two_disks_have_the_same_identity(guest_format: GuestFormat, tmp_path: Path) -> None:
    first = made(disk(tmp_path), guest_format)
    second = made(disk(tmp_path, "disk.eph1"), guest_format)
    elsewhere = made(disk(tmp_path / "other"), guest_format, instance_uuid=OTHER)
    assert len({probed(each)["UUID"] for each in (first, second, elsewhere)}) == 3


def test_disk_made_again_after_a_crash_has_the_same_identity(tmp_path: Path) -> None:
    before = probed(made(disk(tmp_path)))["UUID"]
    (tmp_path / "disk.eph0").unlink()
    assert probed(made(disk(tmp_path)))["UUID"] == before


def test_unformatted_disk_is_all_hole(tmp_path: Path) -> None:
    eph = made(disk(tmp_path), GuestFormat.NONE)
    assert (eph.path.stat().st_size, eph.path.stat().st_blocks) == (1024 * MIB, 0)


def test_swap_disk_is_swap(tmp_path: Path) -> None:
    swap = disk(tmp_path, "disk.swap", 64 * MIB)
    create_swap(swap, instance_uuid=UUID, cancellation=Cancellation())
    found = probed(swap)
    assert (found["TYPE"], found["LABEL"]) == ("swap", "swap")
    assert swap.path.stat().st_size == 64 * MIB


def test_disk_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk.eph0").write_bytes(b"what the guest wrote")
    assert made(disk(tmp_path)).path.read_bytes() == b"what the guest wrote"


def test_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "disk.eph0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="in the way"):
        made(disk(tmp_path))
    assert not (tmp_path / "elsewhere").exists()


def test_disk_too_small_for_its_file_system_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"formatting .*mkfs\.xfs"):
        made(disk(tmp_path, size=MIB), GuestFormat.XFS)
    assert list(tmp_path.iterdir()) == []


def test_cancelled_job_leaves_nothing(tmp_path: Path) -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        create_swap(disk(tmp_path, "disk.swap"), instance_uuid=UUID, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []
