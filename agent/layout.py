"""Which disks an instance has, and how each of them is made.

    kernel, ramdisk          flat files, copied to the byte
    root                     by the backend that the job or the host asks for
    ephemeral, swap          by the same, with a file system of their own
    config drive             a flat file that only its owner may read

Planned first, all of them, as values; made one by one, each of which appears
whole or not at all. What a plan says is kept in `instance.json` and counts from
then on.
"""

import itertools
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from agent import config_drive, ephemeral
from agent.backends import Backends, Write
from agent.base import GIB, Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.job import Flavor, GuestFormat, ImagesType, Instance, Network
from agent.report import Role

MIB = 1 << 20
SECTOR = 512


class Layout:
    """The disks of one instance; used by one thread."""

    def __init__(
        self,
        backends: Backends,
        home: Home,
        *,
        instance: Instance,
        flavor: Flavor,
        networks: Sequence[Network],
        ephemeral_format: GuestFormat,
    ) -> None:
        """`networks` have their MAC addresses; `ephemeral_format` is for disks that name none."""
        self._backends = backends
        self._home = home
        self._instance = instance
        self._flavor = flavor
        self._networks = networks
        self._ephemeral_format = ephemeral_format

    def plan(self, bases: Mapping[Role, Base], images_type: ImagesType) -> list[Disk]:
        """Return every disk of the instance; what it will be, not yet made.

        Raises:
            BackendError: a base does not fit its disk.
            InvalidJob: this host keeps no disks of that type.
        """
        flat = self._backends[ImagesType.RAW]
        backend = self._backends[images_type]
        disks = [
            flat.plan(self._home, role, role.value, bases[role], bases[role].virtual_size)
            for role in (Role.KERNEL, Role.RAMDISK)
            if role in bases
        ]
        root = bases[Role.ROOT]
        # A raw image may end anywhere; a disk ends with a sector.
        size = self._flavor.disk * GIB or -(-root.virtual_size // SECTOR) * SECTOR
        disk = backend.plan(self._home, Role.ROOT, "disk", root, size)
        disks.append(replace(disk, device="cdrom") if root.image.disk_format == "iso" else disk)
        disks += [
            backend.plan(self._home, Role.EPHEMERAL, f"disk.eph{number}", None, wanted.size * GIB)
            for number, wanted in enumerate(self._flavor.ephemeral)
        ]
        if self._flavor.swap:
            swap = self._flavor.swap * MIB
            disks.append(backend.plan(self._home, Role.SWAP, "disk.swap", None, swap))
        if self._instance.config_drive or self._instance.user_data is not None:
            size = len(self._config_drive())
            drive = flat.plan(self._home, Role.CONFIG_DRIVE, "disk.config", None, size)
            disks.append(replace(drive, read_only=True))
        return disks

    def prepare(
        self, disks: Sequence[Disk], bases: Mapping[Role, Base], cancellation: Cancellation
    ) -> None:
        """Make the disks that are not there yet.

        Raises:
            BackendError, InsufficientFreeSpace: one could not be made; those before it are there.
            BootwrightError: the reason of the cancellation.
        """
        numbers = itertools.count()
        for disk in disks:
            cancellation.check()
            backend = self._backends[disk.backend]
            match disk.role:
                case Role.KERNEL | Role.RAMDISK | Role.ROOT:
                    backend.prepare(disk, bases[disk.role], cancellation)
                case Role.EPHEMERAL:
                    write = self._file_system(disk, next(numbers), cancellation)
                    backend.generate(disk, write, cancellation)
                case Role.SWAP:
                    write = ephemeral.swap(self._identity(disk), cancellation)
                    backend.generate(disk, write, cancellation)
                case Role.CONFIG_DRIVE:
                    backend.generate(disk, self._write_config_drive, cancellation)

    def _file_system(self, disk: Disk, number: int, cancellation: Cancellation) -> Write:
        return ephemeral.file_system(
            self._flavor.ephemeral[number].guest_format or self._ephemeral_format,
            f"ephemeral{number}",
            self._identity(disk),
            cancellation,
        )

    def _identity(self, disk: Disk) -> uuid.UUID:
        """The same for the same disk however often a crash has it made again."""
        return uuid.uuid5(uuid.UUID(self._home.uuid), disk.path.name)

    def _write_config_drive(self, fd: int) -> None:
        image = memoryview(self._config_drive())
        while image:
            image = image[os.write(fd, image) :]

    def _config_drive(self) -> bytes:
        return config_drive.image(
            config_drive.content(
                instance_uuid=self._home.uuid,
                name=str(self._instance.name),
                metadata=self._instance.metadata,
                user_data=self._instance.user_data,
                networks=self._networks,
            )
        )
