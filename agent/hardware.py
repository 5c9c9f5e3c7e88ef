"""What the guest's machine is made of, as far as the image has a say.

An image tells by Nova's `hw_*` properties which machine, firmware and buses
its operating system has drivers for. Here that becomes a bus and a name for
each disk and an address for each network card. Pure: no XML, no libvirt.
"""

import dataclasses
import enum
import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from agent.disk import Disk
from agent.errors import ImageUnacceptable
from agent.job import Network
from agent.report import Role


class Bus(enum.StrEnum):
    """The values of `hw_disk_bus` and `hw_cdrom_bus`."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    USB = "usb"
    IDE = "ide"

    @property
    def prefix(self) -> str:
        """What the names of its devices begin with, in libvirt."""
        match self:
            case Bus.VIRTIO:
                return "vd"
            case Bus.SCSI | Bus.SATA | Bus.USB:
                return "sd"
            case Bus.IDE:
                return "hd"


class Firmware(enum.StrEnum):
    """The values of `hw_firmware_type`."""

    BIOS = "bios"
    UEFI = "uefi"


class NicModel(enum.StrEnum):
    """The values of `hw_vif_model`."""

    VIRTIO = "virtio"
    E1000 = "e1000"
    E1000E = "e1000e"
    RTL8139 = "rtl8139"


# Two channels of two drives each, which is all that libvirt gives a machine.
_IDE_DISKS: Final = 4

_MACHINE_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What the properties of one image ask for, with our defaults for the rest."""

    machine: str = "q35"
    firmware: Firmware = Firmware.BIOS
    disk_bus: Bus = Bus.VIRTIO
    cdrom_bus: Bus | None = None
    """None: the image does not say."""
    nic_model: NicModel = NicModel.VIRTIO

    @classmethod
    def wanted_by(cls, properties: Mapping[str, str]) -> Self:
        """Read an image's properties; those that are not about hardware are ignored.

        Raises:
            ImageUnacceptable: a property has a value that we cannot provide.
        """
        disk_bus = _choice(properties, "hw_disk_bus", Bus) or Bus.VIRTIO
        cdrom_bus = _choice(properties, "hw_cdrom_bus", Bus)
        if cdrom_bus is Bus.VIRTIO:
            raise _refused("hw_cdrom_bus", "virtio", "there is no CD-ROM drive on that bus")
        # Only the older of the two PC machines has an IDE controller, so an
        # image that asks for IDE and names no machine can only mean that one.
        wants_ide = Bus.IDE in (disk_bus, cdrom_bus)
        machine = properties.get("hw_machine_type") or ("pc" if wants_ide else "q35")
        if not _MACHINE_TYPE.fullmatch(machine):
            raise _refused("hw_machine_type", machine, "that is no name of a machine type")
        if wants_ide and "q35" in machine:
            raise _refused("hw_machine_type", machine, "it has no IDE; use sata, or machine pc")
        return cls(
            machine=machine,
            firmware=_choice(properties, "hw_firmware_type", Firmware) or Firmware.BIOS,
            disk_bus=disk_bus,
            cdrom_bus=cdrom_bus,
            nic_model=_choice(properties, "hw_vif_model", NicModel) or NicModel.VIRTIO,
        )


def assign_devices(disks: Sequence[Disk], hardware: Hardware) -> tuple[Disk, ...]:
    """Give each disk its bus and name, and the root disk the first place in the boot order.

    The order of `disks` is the order in which the guest finds them; kernel and
    ramdisk, which are no devices, come back as they are. A root disk whose
    `device` is `cdrom` goes to the bus for CD-ROM drives.

    Raises:
        ImageUnacceptable: the image asks for a bus with fewer places than that.
    """
    names = {prefix: _names(prefix) for prefix in {bus.prefix for bus in Bus}}
    assigned = []
    on_ide = 0
    for disk in disks:
        if not disk.role.is_device:
            assigned.append(disk)
            continue
        bus, device = _place(disk, hardware)
        on_ide += bus is Bus.IDE
        assigned.append(
            dataclasses.replace(
                disk,
                device=device,
                bus=bus.value,
                device_name=next(names[bus.prefix]),
                boot_index=1 if disk.role is Role.ROOT else None,
                read_only=disk.read_only or device == "cdrom",
            )
        )
    if on_ide > _IDE_DISKS:
        raise _refused("hw_disk_bus", "ide", f"it has {_IDE_DISKS} places for {on_ide} disks")
    return tuple(assigned)


def rescue_bus(properties: Mapping[str, str], usual: str) -> tuple[str, str]:
    """Return bus and device of a rescue disk, as the properties of its image ask for.

    `usual`: the bus without a word from the image, such as that of the root disk.

    Raises:
        ImageUnacceptable: they ask for what cannot be provided.
    """
    bus = _choice(properties, "hw_rescue_bus", Bus) or Bus(usual)
    device = properties.get("hw_rescue_device", "disk")
    if device not in ("disk", "cdrom"):
        raise _refused("hw_rescue_device", device, "known are disk, cdrom")
    if device == "cdrom" and bus is Bus.VIRTIO:
        raise _refused("hw_rescue_bus", bus, "there is no CD-ROM drive on that bus")
    return bus, device


def free_device_name(bus: str, taken: Collection[str]) -> str:
    """Return the first name on a bus that is not among `taken`."""
    return next(name for name in _names(Bus(bus).prefix) if name not in taken)


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


_Choice = TypeVar("_Choice", bound=enum.StrEnum)


def _choice(properties: Mapping[str, str], key: str, values: type[_Choice]) -> _Choice | None:
    text = properties.get(key)
    if not text:
        return None
    try:
        return values(text.lower())
    except ValueError:
        raise _refused(key, text, f"known are {', '.join(values)}") from None


def _refused(key: str, value: str, reason: str) -> ImageUnacceptable:
    return ImageUnacceptable(
        f"the image property {key} is {value!r:.80}: {reason}",
        f"set {key} to a value this host can provide, or remove it from the image",
    )
