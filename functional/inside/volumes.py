"""A place for disks on logical volumes, seen from outside of the backend."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

from agent.backends.lvm import Lvm
from agent.disk import Disk, Home
from agent.instance_keys import FileKeys
from functional.harness import uml
from functional.inside.conftest import GROUP, POOL, tool

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
DEVICES = Path("/dev", GROUP)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeSite:
    """See `tests.backend_contract.BackendSite`."""

    backend: Lvm
    home: Home
    bases: Path
    keys: FileKeys | None

    def read(self, disk: Disk) -> bytes:
        return disk.path.read_bytes()

    def write(self, disk: Disk, data: bytes, offset: int = 0) -> None:
        with disk.path.open("r+b") as device:
            device.seek(offset)
            device.write(data)
            device.flush()
            os.fsync(device.fileno())

    def found(self) -> set[str]:
        return {name for name in names() if name.startswith(self.home.uuid)}

    def occupy(self, disk: Disk) -> None:
        name = disk.path.name.removesuffix("-dmcrypt")
        tool("lvcreate", "--yes", "--wipesignatures=n", "--size=4M", f"--name={name}", GROUP)


def names() -> set[str]:
    """All volumes but the pool: each is active, so udev shows it."""
    return {path.name for path in DEVICES.iterdir()} - {POOL} if DEVICES.exists() else set()


@contextmanager
def site(directory: Path, *, thin: bool = False, encrypted: bool = False) -> Iterator[VolumeSite]:
    """A place with no disk; what is on it at the end is removed."""
    home = Home(uuid=UUID, directory=directory / UUID)
    home.directory.mkdir()
    bases = directory / "_base"
    bases.mkdir()
    keys = FileKeys(directory / "keys", bits=512) if encrypted else None
    cfg.CONF.set_override("images_thin_pool", POOL if thin else None, group="libvirt")
    backend = Lvm(GROUP, thin=thin, bases=bases, scratch=directory, keys=keys)
    try:
        yield VolumeSite(backend=backend, home=home, bases=bases, keys=keys)
    finally:
        for mapping in Path("/dev/mapper").glob("*-dmcrypt"):
            tool("cryptsetup", "close", mapping.name)
        if left := names():
            tool("lvremove", "--yes", *(f"{GROUP}/{name}" for name in left))


def on_the_blocks(data: bytes) -> bool:
    """Whether the bytes, which begin with a page, are anywhere on the disk below all volumes."""
    # Not through the page cache, which has what was read of it before.
    fd = os.open(uml.DISK, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4 * MIB) as buffer:
            while length := os.readv(fd, [buffer]):
                if buffer.find(data, 0, length) >= 0:
                    return True
    finally:
        os.close(fd)
    return False
