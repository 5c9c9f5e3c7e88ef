"""Names and addresses: a bus, a name and a serial for each disk, a MAC for each network card.

They follow from the instance's uuid and the order of its disks alone, so that a
domain that is defined again after a crash has the same ones.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from agent.disk import Disk
from agent.errors import ImageUnacceptable
from agent.hardware import Bus, Hardware, ScsiModel
from agent.job import ConfigDriveFormat, Network
from agent.properties import choice, refused
from agent.report import Role

# Two channels of two drives each, which is all that libvirt gives a machine.
_IDE_DISKS: Final = 4

# Of eight ids on its bus the controller has one itself.
_LSI_DISKS: Final = 7

_WRITABLE: Final = (Bus.SATA, Bus.IDE, Bus.USB)


def assign_devices(
    disks: Sequence[Disk], hardware: Hardware, instance_uuid: str
) -> tuple[Disk, ...]:
    """Give each disk bus, name and serial, and the root disk the first place in the boot order.

    The order of `disks` is the order in which the guest finds them; kernel and
    ramdisk, which are no devices, come back as they are. A root disk whose
    `device` is `cdrom` goes to the bus for CD-ROM drives.

    Raises:
        ImageUnacceptable: the image asks for a bus with fewer places than that.
    """
    names = {prefix: _names(prefix) for prefix in {bus.prefix for bus in Bus}}
    assigned = []
    places: collections.Counter[Bus] = collections.Counter()
    ephemerals = 0
    for disk in disks:
        if not disk.role.is_device:
            assigned.append(disk)
            continue
        bus, device = _place(disk, hardware)
        places[bus] += 1
        number = ephemerals
        ephemerals += disk.role is Role.EPHEMERAL
        assigned.append(
            dataclasses.replace(
                disk,
                device=device,
                bus=bus.value,
                device_name=next(names[bus.prefix]),
                serial=serial(disk.role, instance_uuid, number),
                boot_index=1 if disk.role is Role.ROOT else None,
                # QEMU has no write-protected hard disks on the older buses.
                read_only=device == "cdrom" or (disk.read_only and bus not in _WRITABLE),
            )
        )
    if places[Bus.IDE] > _IDE_DISKS:
        raise _too_many("hw_disk_bus", "ide", _IDE_DISKS, places[Bus.IDE])
    if hardware.scsi_model is ScsiModel.LSI and places[Bus.SCSI] > _LSI_DISKS:
        raise _too_many("hw_scsi_model", "lsilogic", _LSI_DISKS, places[Bus.SCSI])
    return tuple(assigned)


def _too_many(key: str, value: str, places: int, disks: int) -> ImageUnacceptable:
    return refused(key, value, f"it has {places} places for {disks} disks")


def reassign_devices(
    disks: Sequence[Disk], hardware: Hardware, instance_uuid: str
) -> tuple[Disk, ...]:
    """As `assign_devices`, for disks that other hardware may have given other places before.

    The `device` of a root disk counts as it is.
    """

    def planned(disk: Disk) -> Disk:
        if disk.role is Role.ROOT:
            return dataclasses.replace(disk, read_only=False)
        cdrom = disk.guest_format == ConfigDriveFormat.ISO9660
        return dataclasses.replace(
            disk,
            device="cdrom" if cdrom else "disk",
            read_only=disk.role is Role.CONFIG_DRIVE,
        )

    return assign_devices([planned(disk) for disk in disks], hardware, instance_uuid)


def rescue_bus(properties: Mapping[str, str], usual: str, machine: str) -> tuple[str, str]:
    """Return bus and device of a rescue disk, as the properties of its image ask for.

    `usual`: the bus without a word from the image, such as that of the root disk. `machine`: of
    the domain it shall be in.

    Raises:
        ImageUnacceptable: they ask for what cannot be provided.
    """
    bus = choice(properties, "hw_rescue_bus", Bus) or Bus(usual)
    if bus is Bus.IDE and "q35" in machine:
        raise refused("hw_rescue_bus", bus, f"the instance's machine, {machine}, has no IDE")
    device = properties.get("hw_rescue_device", "disk")
    if device not in ("disk", "cdrom"):
        raise refused("hw_rescue_device", device, "known are disk, cdrom")
    if device == "cdrom" and bus is Bus.VIRTIO:
        raise refused("hw_rescue_bus", bus, "there is no CD-ROM drive on that bus")
    return bus, device


def free_device_name(bus: str, taken: Collection[str]) -> str:
    """Return the first name on a bus that is not among `taken`.

    Raises:
        ImageUnacceptable: the bus is full.
    """
    names = _names(Bus(bus).prefix)
    if bus == Bus.IDE:
        names = itertools.islice(names, _IDE_DISKS)
    name = next((name for name in names if name not in taken), None)
    if name is None:
        raise _too_many("hw_disk_bus", "ide", _IDE_DISKS, len(taken) + 1)
    return name


def free_scsi_unit(model: str | None, taken: Collection[int]) -> int | None:
    """Return the first place on a SCSI controller that is not among `taken`; None if it is full.

    `model`: libvirt's, of the controller.
    """
    units: Iterator[int] = itertools.count()
    if model == ScsiModel.LSI:
        units = iter(range(_LSI_DISKS))
    return next((unit for unit in units if unit not in taken), None)


def serial(role: Role, instance_uuid: str, number: int = 0) -> str:
    """Return a serial number that no other disk of this or another instance has.

    The guest has it below /dev/disk/by-id, whatever its kernel calls the disk.
    `number`: of an ephemeral disk.
    """
    name = f"eph{number}" if role is Role.EPHEMERAL else role.removesuffix("_drive")
    return f"{instance_uuid.replace('-', '')[:12]}-{name}"


def assign_macs(networks: Sequence[Network], instance_uuid: str) -> tuple[Network, ...]:
    """Give each network card that has no MAC address its own.

    It follows from the instance's uuid and the card's place, so a domain that
    is defined again after a crash, and the config drive that describes it, have
    the same one. The prefix is QEMU's.
    """
    assigned = []
    for place, network in enumerate(networks):
        digest = hashlib.sha256(f"{instance_uuid}/{place}".encode()).digest()
        mac = network.mac or ":".join(["52:54:00", *(f"{byte:02x}" for byte in digest[:3])])
        assigned.append(network.model_copy(update={"mac": mac}))
    return tuple(assigned)


def _place(disk: Disk, hardware: Hardware) -> tuple[Bus, str]:
    if disk.role is Role.CONFIG_DRIVE and disk.device == "cdrom":
        # Without a word from the image the config drive stands on the root
        # disk's bus: that is the one driver the guest is sure to have. Kernels
        # made for clouds leave out AHCI, and would not see a SATA drive.
        bus = hardware.cdrom_bus or hardware.disk_bus
        return bus, "disk" if bus is Bus.VIRTIO else "cdrom"
    if disk.device == "cdrom":
        usual = Bus.SATA if "q35" in hardware.machine else Bus.IDE
        return hardware.cdrom_bus or usual, "cdrom"
    return hardware.disk_bus, "disk"


def _names(prefix: str) -> Iterator[str]:
    """vda … vdz, vdaa … vdzz and so on, as the Linux kernel counts them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for length in itertools.count(1):
        for suffix in itertools.product(letters, repeat=length):
            yield prefix + "".join(suffix)
