"""What ephemeral and swap disks are born with: empty when the guest first sees them, but formatted.

Each file system is made for one disk, with an identity of its own; none is
ever copied, for two guests with one file system UUID confuse each other's
hosts. The programs only ever see a file that no guest has written to.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, assert_never

from agent import process
from agent.backends import Write
from agent.cancellation import Cancellation
from agent.confinement import Confinement
from agent.errors import BackendError, InsufficientFreeSpace
from agent.job import GuestFormat

# mkfs of a sparse file takes 0.1 s at any size; this is for a disk that hangs.
_MKFS_LIMIT_S: Final = 300.0

# Measured: 64 MiB are enough for a disk of 15 TiB, whatever the format.
_ADDRESS_SPACE: Final = 256 << 20
_CPU_S: Final = 60
# Debian's defaults for file systems, and what XFS seeds its identities with.
_READABLE: Final = tuple(Path(name) for name in ("/etc/mke2fs.conf", "/dev/urandom"))

_SWAP_LABEL: Final = "swap"


def file_system(
    guest_format: GuestFormat, label: str, identity: uuid.UUID, cancellation: Cancellation
) -> Write:
    """Return what formats a disk.

    Args:
        label: at most 11 characters, the limit of vfat: `ephemeral0` …
        identity: the file system's UUID.

    What is returned raises:
        BackendError: the program is missing or failed.
        InsufficientFreeSpace
        BootwrightError: the reason of the cancellation.
    """

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

    return _formatting(label, command, cancellation)


def swap(identity: uuid.UUID, cancellation: Cancellation) -> Write:
    """Return what makes a disk one that a guest can `swapon`; it raises as for `file_system`."""
    return _formatting(
        _SWAP_LABEL,
        lambda path: ["mkswap", "-L", _SWAP_LABEL, "-U", str(identity), path],
        cancellation,
    )


def _formatting(
    label: str,
    command: Callable[[Path], list[str | Path] | None],
    cancellation: Cancellation,
) -> Write:
    def write(fd: int) -> None:
        # By its descriptor: the name it has until it is whole is no business of theirs.
        target = Path(f"/proc/self/fd/{fd}")
        argv = command(target)
        if argv is None:
            return
        try:
            process.run(
                argv,
                timeout_s=_MKFS_LIMIT_S,
                cancellation=cancellation,
                pass_fds=(fd,),
                limits=process.Limits(
                    cpu_s=_CPU_S,
                    address_space=_ADDRESS_SPACE,
                    file_size=os.fstat(fd).st_size or None,
                ),
                confinement=Confinement(
                    readable=tuple(path for path in _READABLE if path.exists()),
                    writable=(target,),
                ),
            )
        except process.ProgramFailed as e:
            if "No space left on device" in e.stderr:
                raise InsufficientFreeSpace(
                    f"formatting {label}: {e}",
                    "free space below instances_path; 'bootwright cache gc' removes bases nobody "
                    "uses",
                ) from e
            raise BackendError(f"formatting {label}: {e}") from e

    return write
