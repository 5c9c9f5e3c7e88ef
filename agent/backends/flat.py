"""Disks as plain files: a raw copy of the base, shared extents where the file system can.

Kernels and ramdisks are made by this backend whatever `images_type` is, and
so are ephemeral and swap disks: a sparse raw file is what mkfs formats
directly, and standing on no base it has nothing to gain from being an overlay.
"""

import dataclasses
import os
from pathlib import Path
from typing import Final

from agent import files
from agent.backends import Write, disk_file
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home, RbdAccess
from agent.image import Image
from agent.job import ImagesType
from agent.report import Role

_MODE: Final = 0o640
# It holds passwords, and nobody of the agent's group has to read it.
_MODES: Final = {Role.CONFIG_DRIVE: 0o600}


class Flat:
    """See `Backend`."""

    def __init__(self, *, preallocate: bool = False) -> None:
        """`preallocate`: take the space of a whole disk when it is made."""
        self._preallocate = preallocate

    def direct(self, _image: Image, _cancellation: Cancellation, /) -> Base | None:
        return None

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        if base is not None:
            disk_file.check_holds(virtual_size, base)
            disk_file.check_raw(base, "a flat disk")
        return Disk(
            role=role,
            backend=ImagesType.RAW,
            path=disk_file.path_of(home, name),
            format="raw",
            virtual_size=virtual_size,
            base_name=None if base is None else base.name,
            # Where all of it is there the kernel seldom has to wait before it begins to write.
            native_io=self._preallocate,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        cancellation.check()
        with files.reporting(f"copying base {base.name} to", disk.path):
            if not disk_file.exists(disk):
                # A shared block is nothing the guest may count on: it needs another one as
                # soon as it writes there.
                files.copy_sparse(
                    base.path, disk.path, share=not self._preallocate, cancellation=cancellation
                )
            # Also for one that exists: a crash may have come between the two.
            if disk.path.lstat().st_size < disk.virtual_size:
                _lengthen(disk.path, disk.virtual_size)
            if self._preallocate:
                disk_file.preallocate(disk)

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        cancellation.check()
        with files.reporting("creating", disk.path):
            if not disk_file.exists(disk):
                with files.replacing(
                    disk.path,
                    needed=disk.virtual_size,
                    what="creating",
                    mode=_MODES.get(disk.role, _MODE),
                ) as fd:
                    os.ftruncate(fd, disk.virtual_size)
                    write(fd)
            if self._preallocate:
                disk_file.preallocate(disk)

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        with files.reporting("growing", disk.path):
            # The file itself has the last word: ftruncate would cut it.
            found = dataclasses.replace(disk, virtual_size=disk.path.lstat().st_size)
            disk_file.check_grows(found, virtual_size)
            grown = dataclasses.replace(disk, virtual_size=virtual_size)
            if self._preallocate:
                disk_file.preallocate(grown)  # while the disk still is as it was if that fails
            _lengthen(disk.path, virtual_size)
        return grown

    def remove(self, disk: Disk, home: Home, _cancellation: Cancellation, /) -> None:
        disk_file.remove(disk, home)

    def access(self) -> RbdAccess | None:
        return None


def _lengthen(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)
