"""Formatted disks, read back with the tools of their file systems."""

import subprocess
import uuid
from pathlib import Path

import pytest

from agent import ephemeral
from agent.backends import Write
from agent.backends.flat import Flat
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import BackendError, Cancelled
from agent.job import GuestFormat
from agent.report import Role

MIB = 1 << 20
IDENTITY = uuid.UUID("0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1")

FORMATTED = [each for each in GuestFormat if each is not GuestFormat.NONE]
CHECKS = {
    GuestFormat.EXT4: ["fsck.ext4", "-f", "-n"],
    GuestFormat.XFS: ["xfs_repair", "-f", "-n"],
    GuestFormat.VFAT: ["fsck.vfat", "-n"],
}


def made(directory: Path, write: Write, size: int = 1024 * MIB) -> Disk:
    home = Home(uuid=str(IDENTITY), directory=directory)
    disk = Flat().plan(home, Role.EPHEMERAL, "disk.eph0", None, size)
    Flat().generate(disk, write, Cancellation())
    return disk


def formatting(guest_format: GuestFormat, cancellation: Cancellation | None = None) -> Write:
    return ephemeral.file_system(
        guest_format, "ephemeral0", IDENTITY, cancellation or Cancellation()
    )


def probed(disk: Disk) -> dict[str, str]:
    output = subprocess.run(
        ["blkid", "-p", "-o", "export", disk.path], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in output.splitlines())


@pytest.mark.parametrize("guest_format", FORMATTED)
def test_disk_has_the_file_system_label_and_size_asked_for(
    guest_format: GuestFormat, tmp_path: Path
) -> None:
    eph = made(tmp_path, formatting(guest_format))
    found = probed(eph)
    assert (found["TYPE"], found["LABEL"]) == (guest_format, "ephemeral0")
    expected = "0B46-A3C6" if guest_format is GuestFormat.VFAT else str(IDENTITY)
    assert found["UUID"] == expected
    assert eph.path.stat().st_size == 1024 * MIB
    assert eph.path.stat().st_blocks * 512 < 100 * MIB
    subprocess.run([*CHECKS[guest_format], eph.path], capture_output=True, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.eph0"]


def test_unformatted_disk_is_all_hole(tmp_path: Path) -> None:
    eph = made(tmp_path, formatting(GuestFormat.NONE))
    assert (eph.path.stat().st_size, eph.path.stat().st_blocks) == (1024 * MIB, 0)


def test_swap_disk_is_swap(tmp_path: Path) -> None:
    swap = made(tmp_path, ephemeral.swap(IDENTITY, Cancellation()), 64 * MIB)
    found = probed(swap)
    assert (found["TYPE"], found["LABEL"], found["UUID"]) == ("swap", "swap", str(IDENTITY))


def test_disk_too_small_for_its_file_system_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"formatting .*mkfs\.xfs"):
        made(tmp_path, formatting(GuestFormat.XFS), MIB)
    assert list(tmp_path.iterdir()) == []


def test_cancelled_job_leaves_nothing(tmp_path: Path) -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        made(tmp_path, formatting(GuestFormat.EXT4, cancellation))
    assert list(tmp_path.iterdir()) == []
