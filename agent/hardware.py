"""What the guest's machine is made of, as far as the image has a say.

An image tells by Nova's properties (`hw_*`, `os_*`, `img_*`) which machine,
firmware and devices its operating system has drivers for. Here they become one
value. Pure: no XML, no libvirt.
"""

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from agent.errors import ImageUnacceptable
from agent.properties import choice, count, flag, refused, require_possible


class Bus(enum.StrEnum):
    """The values of `hw_disk_bus`, `hw_cdrom_bus` and `hw_rescue_bus`."""

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


class SecureBoot(enum.StrEnum):
    """The values of `os_secure_boot`."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    DISABLED = "disabled"


class NicModel(enum.StrEnum):
    """The values of `hw_vif_model`."""

    VIRTIO = "virtio"
    E1000 = "e1000"
    E1000E = "e1000e"
    RTL8139 = "rtl8139"
    VMXNET3 = "vmxnet3"
    PCNET = "pcnet"
    NE2K = "ne2k_pci"


class ScsiModel(enum.StrEnum):
    """The values of `hw_scsi_model`; the others want one target for each disk."""

    VIRTIO = "virtio-scsi"
    LSI = "lsilogic"


class VideoModel(enum.StrEnum):
    """The values of `hw_video_model`."""

    VGA = "vga"
    VIRTIO = "virtio"
    BOCHS = "bochs"
    CIRRUS = "cirrus"
    QXL = "qxl"
    VMWARE = "vmvga"
    NONE = "none"


class PointerModel(enum.StrEnum):
    """The values of `hw_pointer_model`; a mouse is part of every machine."""

    TABLET = "usbtablet"
    MOUSE = "ps2mouse"


class InputBus(enum.StrEnum):
    """The values of `hw_input_bus`."""

    USB = "usb"
    VIRTIO = "virtio"


class TpmModel(enum.StrEnum):
    """The values of `hw_tpm_model`."""

    TIS = "tpm-tis"
    CRB = "tpm-crb"


class TpmVersion(enum.StrEnum):
    """The values of `hw_tpm_version`."""

    V1_2 = "1.2"
    V2_0 = "2.0"


class WatchdogAction(enum.StrEnum):
    """The values of `hw_watchdog_action`; disabled is none at all."""

    RESET = "reset"
    POWEROFF = "poweroff"
    PAUSE = "pause"
    NONE = "none"
    DISABLED = "disabled"


_MACHINES_OF_ALL: Final = ("q35", "pc")
"""The names under which every QEMU has its newest ones."""

_MACHINE_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Of the virtual processors: what the image would like, and what it can bear at most.

    Each is sockets, cores, threads; None is for any number.
    """

    preferred: tuple[int | None, int | None, int | None]
    most: tuple[int | None, int | None, int | None]

    def fit(self, vcpus: int) -> tuple[int, int, int]:
        """Return sockets, cores and threads for so many processors, chosen as Nova does it.

        What is preferred is met as far as it goes; then rather sockets than cores than threads.

        Raises:
            ImageUnacceptable: the image cannot bear that many.
        """

        def value(found: tuple[int, int, int]) -> tuple[int, int, int, int]:
            sockets, cores, threads = found
            met = sum(has == likes for has, likes in zip(found, self.preferred, strict=True))
            return met, sockets * cores, sockets, threads

        possible = [
            found
            for found in _factors(vcpus)
            if all(most is None or has <= most for has, most in zip(found, self.most, strict=True))
        ]
        if not possible:
            raise ImageUnacceptable(
                f"the image's hw_cpu_max_sockets, hw_cpu_max_cores and hw_cpu_max_threads leave no "
                f"room for the flavor's {vcpus} processors",
                "use a flavor with fewer processors, or correct the properties of the image",
            )
        return max(possible, key=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What the properties of one image ask for, with our defaults for the rest."""

    machine: str = "q35"
    firmware: Firmware = Firmware.BIOS
    secure_boot: SecureBoot = SecureBoot.DISABLED
    firmware_stateless: bool = False
    disk_bus: Bus = Bus.VIRTIO
    cdrom_bus: Bus | None = None
    """None: the image does not say."""
    scsi_model: ScsiModel = ScsiModel.VIRTIO
    nic_model: NicModel = NicModel.VIRTIO
    nic_multiqueue: bool = False
    video_model: VideoModel | None = None
    """None: no video card."""
    video_ram_mib: int | None = None
    input_bus: InputBus | None = None
    """Of a tablet and a keyboard; None for what the machine has."""
    tpm_model: TpmModel | None = None
    tpm_version: TpmVersion = TpmVersion.V2_0
    watchdog: WatchdogAction = WatchdogAction.DISABLED
    guest_agent: bool = False
    boot_menu: bool = False
    serial_ports: int = 1
    hpet: bool = False
    pmu: bool | None = None
    """None: as the hypervisor does it."""
    hidden_hypervisor: bool = False
    windows: bool = False
    huge_pages_kib: int | None = None
    """The size of the host's pages below its memory; 0 for the host's usual huge pages."""
    topology: Topology | None = None

    @classmethod
    def wanted_by(cls, properties: Mapping[str, str]) -> Self:
        """Read an image's properties; those that are not about hardware are ignored.

        Raises:
            ImageUnacceptable: a property has a value that we cannot provide.
        """
        require_possible(properties)
        disk_bus = choice(properties, "hw_disk_bus", Bus) or Bus.VIRTIO
        cdrom_bus = choice(properties, "hw_cdrom_bus", Bus)
        if cdrom_bus is Bus.VIRTIO:
            raise refused("hw_cdrom_bus", "virtio", "there is no CD-ROM drive on that bus")
        machine = _machine(properties, wants_ide=Bus.IDE in (disk_bus, cdrom_bus))
        firmware = choice(properties, "hw_firmware_type", Firmware) or Firmware.BIOS
        tpm_model, tpm_version = _tpm(properties)
        return cls(
            machine=machine,
            firmware=firmware,
            secure_boot=_secure_boot(properties, machine, firmware),
            firmware_stateless=flag(properties, "hw_firmware_stateless"),
            disk_bus=disk_bus,
            cdrom_bus=cdrom_bus,
            scsi_model=choice(properties, "hw_scsi_model", ScsiModel) or ScsiModel.VIRTIO,
            nic_model=choice(properties, "hw_vif_model", NicModel) or NicModel.VIRTIO,
            nic_multiqueue=flag(properties, "hw_vif_multiqueue_enabled"),
            video_model=choice(properties, "hw_video_model", VideoModel),
            video_ram_mib=count(properties, "hw_video_ram", most=1024),
            input_bus=_input_bus(properties),
            tpm_model=tpm_model,
            tpm_version=tpm_version,
            watchdog=choice(properties, "hw_watchdog_action", WatchdogAction)
            or WatchdogAction.DISABLED,
            guest_agent=flag(properties, "hw_qemu_guest_agent"),
            boot_menu=flag(properties, "hw_boot_menu"),
            serial_ports=count(properties, "hw_serial_port_count", most=4) or 1,
            hpet=flag(properties, "hw_time_hpet"),
            pmu=flag(properties, "hw_pmu") if properties.get("hw_pmu") else None,
            hidden_hypervisor=flag(properties, "img_hide_hypervisor_id"),
            windows=properties.get("os_type", "").lower() == "windows",
            huge_pages_kib=_huge_pages(properties),
            topology=topology_wanted_by(properties),
        )

    @property
    def asks_host(self) -> bool:
        """Whether it depends on what the host has; see `on`."""
        return (
            self.machine not in _MACHINES_OF_ALL
            or self.firmware is Firmware.UEFI
            or self.tpm_model is not None
        )

    @property
    def depends_on_host(self) -> bool:
        """Whether it cannot be told without the host what it will be."""
        return self.secure_boot is not SecureBoot.DISABLED or self.tpm_model is not None

    @property
    def nonvolatile(self) -> tuple[object, ...] | None:
        """What has to be the same for the variables of its firmware and its TPM to be of use to it.

        None if it has neither, and keeps nothing of its own while it is off.
        """
        uefi = self.firmware is Firmware.UEFI and not self.firmware_stateless
        if not uefi and self.tpm_model is None:
            return None
        return self.machine, uefi, self.secure_boot, self.tpm_model, self.tpm_version

    def on(self, *, uefi: bool, secure_boot: bool, tpm: bool) -> Self:
        """Return what becomes of it on a host with or without such firmware and an emulated TPM.

        Raises:
            ImageUnacceptable: it needs what the host does not have.
        """
        if self.tpm_model is not None and not tpm:
            raise refused("hw_tpm_model", self.tpm_model, "this host emulates none (install swtpm)")
        if self.firmware is Firmware.UEFI and not uefi:
            raise refused(
                "hw_firmware_type",
                self.firmware,
                f"this host has no such firmware for machine {self.machine} (install ovmf)",
            )
        if self.secure_boot is SecureBoot.REQUIRED and not secure_boot:
            raise refused(
                "os_secure_boot",
                self.secure_boot,
                f"this host has no such firmware for machine {self.machine} (install ovmf)",
            )
        if self.secure_boot is not SecureBoot.OPTIONAL:
            return self
        chosen = SecureBoot.REQUIRED if secure_boot else SecureBoot.DISABLED
        return replace(self, secure_boot=chosen)


def _machine(properties: Mapping[str, str], *, wants_ide: bool) -> str:
    # Only the older of the two PC machines has an IDE controller, so an image
    # that asks for IDE and names no machine can only mean that one.
    machine = properties.get("hw_machine_type") or ("pc" if wants_ide else "q35")
    if not _MACHINE_TYPE.fullmatch(machine):
        raise refused("hw_machine_type", machine, "that is no name of a machine type")
    if wants_ide and "q35" in machine:
        raise refused("hw_machine_type", machine, "it has no IDE; use sata, or machine pc")
    return machine


def _secure_boot(properties: Mapping[str, str], machine: str, firmware: Firmware) -> SecureBoot:
    wanted = choice(properties, "os_secure_boot", SecureBoot) or SecureBoot.DISABLED
    possible = firmware is Firmware.UEFI and "q35" in machine
    if wanted is SecureBoot.REQUIRED and not possible:
        raise refused(
            "os_secure_boot",
            wanted.value,
            f"it needs hw_firmware_type uefi and machine q35, not {firmware} and {machine}",
        )
    return wanted if possible else SecureBoot.DISABLED


def _tpm(properties: Mapping[str, str]) -> tuple[TpmModel | None, TpmVersion]:
    model = choice(properties, "hw_tpm_model", TpmModel)
    version = choice(properties, "hw_tpm_version", TpmVersion)
    if model is TpmModel.CRB and version is TpmVersion.V1_2:
        raise refused("hw_tpm_model", model, "a TPM of version 1.2 has none but tpm-tis")
    if model is None and version is not None:
        model = TpmModel.TIS
    return model, version or TpmVersion.V2_0


def _input_bus(properties: Mapping[str, str]) -> InputBus | None:
    bus = choice(properties, "hw_input_bus", InputBus)
    tablet = choice(properties, "hw_pointer_model", PointerModel) is PointerModel.TABLET
    return bus or (InputBus.USB if tablet else None)


_PAGES_KIB: Final = (4, 2 << 10, 1 << 20)
"""The sizes that an x86 processor knows."""

_PAGE_UNITS: Final = {"": 1, "kb": 1, "mb": 1 << 10, "gb": 1 << 20}


def _huge_pages(properties: Mapping[str, str]) -> int | None:
    """Read `hw_mem_page_size`: small, any, large, or a number of KiB, MB or GB."""
    text = properties.get("hw_mem_page_size", "").lower()
    if text in ("", "small", "any"):
        return None
    if text == "large":
        return 0
    size = re.fullmatch(r"([0-9]{1,9})\s*(kb|mb|gb|)", text)
    if size is None or (kib := int(size[1]) * _PAGE_UNITS[size[2]]) not in _PAGES_KIB:
        raise refused(
            "hw_mem_page_size", text, "known are small, any, large, 4, 2048 (or 2MB), 1GB"
        )
    return None if kib == 4 else kib


def topology_wanted_by(properties: Mapping[str, str]) -> Topology | None:
    """Read `hw_cpu_*` of an image; None if none is set.

    Raises:
        ImageUnacceptable: one of them is no number.
    """

    def read(prefix: str) -> tuple[int | None, int | None, int | None]:
        sockets, cores, threads = (
            count(properties, prefix + name, most=65536) for name in ("sockets", "cores", "threads")
        )
        return sockets, cores, threads

    topology = Topology(preferred=read("hw_cpu_"), most=read("hw_cpu_max_"))
    return topology if any((*topology.preferred, *topology.most)) else None


def _factors(vcpus: int) -> Iterator[tuple[int, int, int]]:
    """Every three numbers that multiply to that."""
    for sockets in range(1, vcpus + 1):
        if vcpus % sockets == 0:
            rest = vcpus // sockets
            yield from (
                (sockets, cores, rest // cores) for cores in range(1, rest + 1) if rest % cores == 0
            )
