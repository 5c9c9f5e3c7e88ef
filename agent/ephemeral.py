"""Ephemeral and swap disks: empty when the guest first sees them, but formatted.

Each file system is made for one disk, with an identity of its own; none is
ever copied, for two guests with one file system UUID confuse each other's
hosts. The programs only ever see a file that no guest has written to.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, assert_never

from agent import files, process
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import BackendError
from agent.job import GuestFormat

# mkfs of a sparse file takes 0.1 s at any size; this is for a disk that hangs.
_MKFS_LIMIT_S: Final = 300.0

_SWAP_LABEL: Final = "swap"


def create(
    disk: Disk,
    *,
    guest_format: GuestFormat,
    label: str,
    instance_uuid: str,
    cancellation: Cancellation,
) -> None:
    """Make a raw disk with a file system, durably; one that exists is kept.

    Args:
        label: at most 11 characters, the limit of vfat: `ephemeral0` …

    Raises:
        BackendError: the program is missing or failed, or something else
            stands at the disk's path. Nothing is left behind.
        InsufficientFreeSpace
        BootwrightError: the reason of the cancellation.
    """
    identity = _identity(instance_uuid, disk)

    def command(path: Path) -> list[str | Path] | None:
        match guest_format:
            case GuestFormat.EXT4:
                return [
                    *("mkfs.ext4", "-q", "-F", "-L", label, "-U", str(identity)),
                    # The guest's kernel zeroes the tables when it has time:
                    # here they are holes already.
                    *("-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"),
                    path,
                ]
            case GuestFormat.XFS:
                return ["mkfs.xfs", "-q", "-K", "-L", label, "-m", f"uuid={identity}", path]
            case GuestFormat.VFAT:
                # It has 32 bits for an identity, and takes the time if not told.
                volume = f"{identity.fields[0]:08x}"
                return ["mkfs.vfat", "-F", "32", "-n", label, "-i", volume, path]
            case GuestFormat.NONE:
                return None
            case _:
                assert_never(guest_format)

    _create(disk, command, cancellation)


def create_swap(disk: Disk, *, instance_uuid: str, cancellation: Cancellation) -> None:
    """Make a raw disk that a guest can `swapon`. The rest is as with `create`."""
    identity = str(_identity(instance_uuid, disk))
    _create(disk, lambda path: ["mkswap", "-L", _SWAP_LABEL, "-U", identity, path], cancellation)


def _create(
    disk: Disk, command: Callable[[Path], list[str | Path] | None], cancellation: Cancellation
) -> None:
    what = "formatting"
    if disk.path.is_file() and not disk.path.is_symlink():
        return
    if os.path.lexists(disk.path):
        raise BackendError(f"{disk.path} is in the way: it is not a regular file")
    try:
        with files.replacing(disk.path, needed=disk.virtual_size, what=what) as fd:
            os.ftruncate(fd, disk.virtual_size)
            # By its descriptor: the name it has until it is whole is no business of ours.
            argv = command(Path(f"/proc/self/fd/{fd}"))
            if argv is not None:
                process.run(
                    argv, timeout_s=_MKFS_LIMIT_S, cancellation=cancellation, pass_fds=(fd,)
                )
    except process.ProgramFailed as e:
        if "No space left on device" in e.stderr:
            free = files.free_bytes(disk.path.parent)
            raise files.no_space(disk.path, disk.virtual_size, free, what) from e
        raise BackendError(f"formatting {disk.path}: {e}") from e
    except OSError as e:
        raise BackendError(f"creating {disk.path}: {e}") from e


def _identity(instance_uuid: str, disk: Disk) -> uuid.UUID:
    """The same for the same disk however often a crash has it made again."""
    return uuid.uuid5(uuid.UUID(instance_uuid), disk.path.name)
