"""What the backends that keep a disk in one file have in common.

Where the file stands, whether it is there already, and how it goes away.
"""

import logging
import os
import re
import stat
from pathlib import Path
from typing import Final

from agent import process
from agent.base import Base
from agent.confinement import Confinement
from agent.disk import Disk, Home
from agent.errors import BackendError
from agent.files import free_bytes, fsync_directory, no_space

LOG = logging.getLogger(__name__)

# ext4 and xfs only note that the blocks are taken: 10 ms for 100 GiB.
_FALLOCATE_LIMIT_S: Final = 300.0

# Not hidden either: such names belong to files that are being written.
_NAME: Final = re.compile(r"[a-z][a-z0-9.]*")


def path_of(home: Home, name: str) -> Path:
    """Return where the disk `name` of an instance stands.

    Raises:
        BackendError: `name` is not the name of a file in its directory.
    """
    if not _NAME.fullmatch(name):
        raise BackendError(f"{name!r} is not the name of a disk in {home.directory}")
    return home.directory / name


def check_holds(virtual_size: int, base: Base) -> None:
    """Raises: BackendError, if a disk of that many bytes cannot hold `base`."""
    if virtual_size < base.virtual_size:
        raise BackendError(
            f"a disk of {virtual_size} bytes cannot hold the {base.virtual_size} bytes of "
            f"base {base.name}",
            "ask for a larger disk",
        )


def check_raw(base: Base, kind: str) -> None:
    """Raises: BackendError, if `kind`, such as "a flat disk", cannot be made of `base`."""
    if base.format != "raw":
        raise BackendError(
            f"base {base.name} is {base.format}, and {kind} is a copy of a raw one",
            "set force_raw_images = true and fetch the image anew, or use images_type qcow2",
        )


def check_grows(disk: Disk, virtual_size: int) -> None:
    """Raises: BackendError, if `disk` would lose bytes."""
    if virtual_size < disk.virtual_size:
        raise BackendError(
            f"{disk.path} has {disk.virtual_size} bytes and would shrink to {virtual_size}",
            "disks only ever grow: what is beyond the end would be lost",
        )


def exists(disk: Disk) -> bool:
    """Whether the disk is there.

    Raises:
        BackendError: something is there that is not a disk.
    """
    try:
        mode = disk.path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise BackendError(
            f"{disk.path} is in the way: it is not a regular file",
            "look what put it there and remove it by hand",
        )
    return True


def preallocate(disk: Disk) -> None:
    """Take the space that the disk may come to need, without a change to what it reads as.

    Where the file system cannot, that is a warning: the disk is as good without. One that
    is another user's by now is left alone.

    Raises:
        InsufficientFreeSpace: there is not so much; the disk is left as it was.
        BackendError
    """
    what = "preallocating"
    status = disk.path.lstat()
    missing = disk.virtual_size - status.st_blocks * 512
    if missing <= 0:
        return
    if status.st_uid != os.geteuid():
        # libvirt gives the disks of a domain to QEMU's user, or to root when it ends.
        LOG.info("%s is not preallocated: a guest has been given it already", disk.path)
        return
    # Asked for too much, the kernel takes all there is before it says so.
    if missing > (free := free_bytes(disk.path.parent)):
        raise no_space(disk.path, missing, free, what)
    try:
        # posix_fallocate(3) would write zeros where the file system cannot.
        process.run(
            ["fallocate", "--keep-size", "--length", str(disk.virtual_size), disk.path],
            timeout_s=_FALLOCATE_LIMIT_S,
            limits=process.Limits(cpu_s=int(_FALLOCATE_LIMIT_S), address_space=1 << 30),
            confinement=Confinement(writable=(disk.path,)),
        )
    except process.ProgramFailed as e:
        if "not supported" in e.stderr:
            LOG.warning("%s is not preallocated: its file system cannot", disk.path)
            return
        if "No space left" in e.stderr or "quota" in e.stderr:
            raise no_space(disk.path, missing, free, what) from e
        raise BackendError(f"{what} {disk.path}: {e}") from e


def remove(disk: Disk, home: Home) -> None:
    """Remove the disk's file durably. The contract is that of `Backend.remove`."""
    if disk.path != path_of(home, disk.path.name):
        raise BackendError(f"{disk.path} is not in {home.directory} and was not removed")
    # By its name in the opened directory: neither a link put in place of the
    # directory nor one in place of the file leads anywhere else.
    try:
        directory = os.open(home.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError as e:
        raise BackendError(f"removing {disk.path}: {e.strerror}") from e
    try:
        os.unlink(disk.path.name, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError as e:
        raise BackendError(f"removing {disk.path}: {e.strerror}") from e
    finally:
        os.close(directory)
    try:
        fsync_directory(home.directory)
    except OSError as e:
        raise BackendError(f"removing {disk.path} durably: {e.strerror}") from e
