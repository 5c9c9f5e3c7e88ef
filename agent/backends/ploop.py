"""Disks as ploop images: a directory with `root.hds` and the `DiskDescriptor.xml` that tells of it.

    <name>/root.hds               the data; what a domain gets
    <name>/DiskDescriptor.xml     for the tools of ploop, as they wrote it

Version 1 images, which all tools know. QEMU has written the whole structure of
`root.hds`, a guest only the clusters' content, so the tools may look at it.
"""

import contextlib
import dataclasses
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent import files, process
from agent.backends import Write, disk_file
from agent.backends.flat import Flat
from agent.base import Base
from agent.cancellation import Cancellation
from agent.confinement import Confinement
from agent.disk import Disk, Home, RbdAccess
from agent.errors import BackendError
from agent.image import Image
from agent.job import ImagesType
from agent.qemu_img import QemuImg
from agent.report import Role

_DATA: Final = "root.hds"
_DESCRIPTOR: Final = "DiskDescriptor.xml"

_CLUSTER: Final = 1 << 20
# Version 1 counts sectors with 32 bits; `ploop init` takes more and makes less.
_MAX_VIRTUAL_SIZE: Final = (1 << 32) * 512 - _CLUSTER

# Magic, and the number of sectors: the header's bytes 0 to 15 and 36 to 39.
_HEADER: Final = struct.Struct("<16s20xI")
_MAGIC: Final = b"WithoutFreeSpace"

_LIMIT_S: Final = 60.0
_LOCKS: Final = Path("/var/lock")  # where they keep each other off, in a directory they make
_DEVICES: Final = Path("/sys/block")  # where they look whether a device has the image
_LIMITS: Final = process.Limits(
    cpu_s=60, address_space=1 << 30, file_size=_MAX_VIRTUAL_SIZE + (1 << 30)
)
# `ploop init` copies 4,077 bytes from where its last argument begins, whatever
# its length, and what lies beyond the environment is not its to read.
_PADDING: Final = {"PLOOP_PADDING": "0" * 8192}


class Ploop:
    """See `Backend`. A disk that stands on no base is a flat one."""

    def __init__(self, qemu_img: QemuImg) -> None:
        self._qemu_img = qemu_img
        self._flat = Flat()

    def direct(self, _image: Image, _cancellation: Cancellation, /) -> Base | None:
        return None

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        """Return what a disk will be; its size is rounded up to whole MiB, as ploop counts."""
        if base is None:
            return self._flat.plan(home, role, name, None, virtual_size)
        disk_file.check_holds(virtual_size, base)
        disk_file.check_raw(base, "a ploop image")
        return Disk(
            role=role,
            backend=ImagesType.PLOOP,
            path=disk_file.path_of(home, name) / _DATA,
            format="ploop",
            virtual_size=_rounded(virtual_size),
            base_name=base.name,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        cancellation.check()
        if _exists(disk):
            return
        with _reporting(f"making the ploop image {disk.path}"), _appearing(disk) as directory:
            data = directory / _DATA
            size = f"{disk.virtual_size // _CLUSTER}M"
            words = ("init", "-s", size, "-v", "1", "-t", "none", data)
            _ploop(*words, directory=directory, cancellation=cancellation)
            data.chmod(0o640)
            self._qemu_img.fill(
                base.path, data, "parallels", cancellation, virtual_size=disk.virtual_size
            )

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        self._flat.generate(disk, write, cancellation)

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        with _reporting(f"growing {disk.path} to {virtual_size} bytes"):
            found = dataclasses.replace(disk, virtual_size=_virtual_size(disk.path))
            disk_file.check_grows(found, virtual_size)
            size = _rounded(virtual_size)
            # QEMU leaves a hole in the last cluster it took, which they do not like.
            directory = disk.path.parent
            _ploop("check", "--repair-sparse", disk.path, directory=directory)
            descriptor = directory / _DESCRIPTOR
            _ploop("grow", "-s", f"{size // _CLUSTER}M", descriptor, directory=directory)
            _sync(directory)
        return dataclasses.replace(disk, virtual_size=size)

    def remove(self, disk: Disk, home: Home, _cancellation: Cancellation, /) -> None:
        directory = disk.path.parent
        if disk.path.name != _DATA or directory != disk_file.path_of(home, directory.name):
            raise BackendError(f"{disk.path} is not in {home.directory} and was not removed")
        if home.directory.is_symlink():
            raise BackendError(f"{home.directory} is a link, and nothing behind it was removed")
        files.remove_tree(directory)

    def access(self) -> RbdAccess | None:
        return None


def _rounded(virtual_size: int) -> int:
    if virtual_size > _MAX_VIRTUAL_SIZE:
        raise BackendError(
            f"a ploop image holds at most {_MAX_VIRTUAL_SIZE} bytes, not {virtual_size}",
            "use another images_type, or a flavor with a smaller disk",
        )
    return -(-virtual_size // _CLUSTER) * _CLUSTER


def _exists(disk: Disk) -> bool:
    """Whether the disk is there. Raises: BackendError: something is that is not a disk."""
    try:
        directory = disk.path.parent.lstat().st_mode
        data = disk.path.lstat().st_mode
    except FileNotFoundError:
        if not os.path.lexists(disk.path.parent):
            return False
    else:
        if stat.S_ISDIR(directory) and stat.S_ISREG(data):
            return True
    raise BackendError(
        f"{disk.path.parent} is in the way: it is not the directory of a ploop image",
        "look what put it there and remove it by hand",
    )


@contextlib.contextmanager
def _appearing(disk: Disk) -> Iterator[Path]:
    """Give a directory that becomes the disk's when the block ends well, durably; else it goes."""
    final = disk.path.parent
    aside = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.mkdir(mode=0o711)
        # The hypervisor's user has to pass through to the data.
        aside.chmod(0o711)
        yield aside
        _sync(aside)
        aside.rename(final)
        files.fsync_directory(final.parent)
    except BaseException:  # a cancel and a stop of the agent leave nothing either
        files.remove_tree(aside)
        raise


def _sync(directory: Path) -> None:
    for name in (_DATA, _DESCRIPTOR):
        files.fsync(directory / name)
    files.fsync_directory(directory)


def _virtual_size(data: Path) -> int:
    with data.open("rb") as file:
        magic, sectors = _HEADER.unpack(file.read(_HEADER.size).ljust(_HEADER.size))
    if magic != _MAGIC:
        raise BackendError(f"{data} does not begin with {_MAGIC.decode()}: it is no ploop image")
    return int(sectors) * 512


def _ploop(*words: str | Path, directory: Path, cancellation: Cancellation | None = None) -> None:
    """Run a tool of ploop on the image in `directory`."""
    process.run(
        ["ploop", *words],
        timeout_s=_LIMIT_S,
        cancellation=cancellation,
        environment=_PADDING,
        limits=_LIMITS,
        confinement=Confinement(readable=(_DEVICES,), workplaces=(directory, _LOCKS)),
    )


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[None]:
    try:
        yield
    except process.ProgramFailed as e:
        raise BackendError(f"{what}: {e}") from e
    except OSError as e:
        raise BackendError(f"{what}: {e}") from e
