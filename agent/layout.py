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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from agent import ephemeral
from agent.backends import Backend, Backends, OverlayBackend
from agent.base import GIB, Base
from agent.cancellation import Cancellation
from agent.config_drive import ConfigDrive
from agent.disk import Disk, Home
from agent.files import Together
from agent.image import Image
from agent.job import ConfigDriveFormat, Flavor, GuestFormat, ImagesType, Instance, Network
from agent.report import Role

MIB = 1 << 20
SECTOR = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """What the configuration says of disks that no base is for."""

    ephemeral: GuestFormat
    """Of ephemeral disks whose job names none."""
    config_drive: ConfigDriveFormat
    force_config_drive: bool
    """Every instance has one."""


class Layout:
    """The disks of one instance; used by one thread."""

    def __init__(
        self,
        backends: Backends,
        home: Home,
        *,
        instance: Instance,
        flavor: Flavor,
        networks: Sequence[Network] | None,
        formats: Formats,
    ) -> None:
        """`networks` have their MAC addresses; None if nobody knows them."""
        self._backends = backends
        self._home = home
        self._instance = instance
        self._flavor = flavor
        self._formats = formats
        self._config_drive = ConfigDrive(
            datasource=instance.datasource,
            instance_uuid=home.uuid,
            name=str(instance.name),
            metadata=instance.metadata,
            user_data=instance.user_data,
            networks=networks,
        )

    def plan(self, bases: Mapping[Role, Base], images_type: ImagesType) -> list[Disk]:
        """Return every disk of the instance; what it will be, not yet made.

        Raises:
            BackendError: a base does not fit its disk.
            InvalidJob: this host keeps no disks of that type.
        """
        disks = [
            self._flat.plan(self._home, role, role.value, bases[role], bases[role].virtual_size)
            for role in (Role.KERNEL, Role.RAMDISK)
            if role in bases
        ]
        root = bases[Role.ROOT]
        disks.append(self._root(root, self._backends[images_type]))
        disks += self._blank(self._backends[images_type])
        if self._has_config_drive(root.image):
            disks.append(self._planned_config_drive())
        return disks

    @property
    def _flat(self) -> Backend:
        return self._backends[ImagesType.RAW]

    def _root(self, base: Base, backend: Backend) -> Disk:
        # A raw image may end anywhere; a disk ends with a sector.
        size = self._flavor.disk * GIB or -(-base.virtual_size // SECTOR) * SECTOR
        disk = backend.plan(self._home, Role.ROOT, "disk", base, size)
        return replace(disk, device="cdrom") if base.image.disk_format == "iso" else disk

    def _blank(self, backend: Backend) -> Iterator[Disk]:
        for number, wanted in enumerate(self._flavor.ephemeral):
            name = f"disk.eph{number}"
            disk = backend.plan(self._home, Role.EPHEMERAL, name, None, wanted.size * GIB)
            yield replace(disk, guest_format=wanted.guest_format or self._formats.ephemeral)
        if self._flavor.swap:
            yield backend.plan(self._home, Role.SWAP, "disk.swap", None, self._flavor.swap * MIB)

    def _has_config_drive(self, image: Image) -> bool:
        return (
            self._instance.config_drive
            or self._instance.user_data is not None
            or self._formats.force_config_drive
            or image.properties.get("img_config_drive") == "mandatory"
        )

    def _planned_config_drive(self) -> Disk:
        format_ = self._formats.config_drive
        size = self._config_drive.size(format_)
        disk = self._flat.plan(self._home, Role.CONFIG_DRIVE, "disk.config", None, size)
        device = "cdrom" if format_ is ConfigDriveFormat.ISO9660 else "disk"
        return replace(disk, guest_format=format_, device=device, read_only=True)

    def prepare(
        self,
        disks: Sequence[Disk],
        bases: Mapping[Role, Base],
        together: Together,
        cancellation: Cancellation,
    ) -> None:
        """Make the disks that are not there yet.

        They are all there, and durable, when `together` is published; none of them is before
        what that has now.

        Raises:
            BackendError, InsufficientFreeSpace: one could not be made; those before it are there.
            BootwrightError: the reason of the cancellation.
        """
        numbers = itertools.count()
        for disk in disks:
            cancellation.check()
            backend = self._backends[disk.backend]
            if disk.role is Role.ROOT and isinstance(backend, OverlayBackend):
                backend.overlay(disk, bases[disk.role], together, cancellation)
                continue
            together.publish()
            match disk.role:
                case Role.KERNEL | Role.RAMDISK | Role.ROOT:
                    backend.prepare(disk, bases[disk.role], cancellation)
                case Role.RESCUE | Role.RESCUE_KERNEL | Role.RESCUE_RAMDISK:
                    raise AssertionError("a rescue is of an instance that is there already")
                case Role.EPHEMERAL:
                    write = ephemeral.file_system(
                        GuestFormat(disk.guest_format or GuestFormat.NONE),
                        f"ephemeral{next(numbers)}",
                        self._identity(disk),
                        cancellation,
                    )
                    backend.generate(disk, write, cancellation)
                case Role.SWAP:
                    write = ephemeral.swap(self._identity(disk), cancellation)
                    backend.generate(disk, write, cancellation)
                case Role.CONFIG_DRIVE:
                    format_ = ConfigDriveFormat(disk.guest_format or ConfigDriveFormat.ISO9660)
                    write = self._config_drive.writing(format_, cancellation)
                    backend.generate(disk, write, cancellation)

    def _identity(self, disk: Disk) -> uuid.UUID:
        """The same for the same disk however often a crash has it made again."""
        return uuid.uuid5(uuid.UUID(self._home.uuid), disk.path.name)
