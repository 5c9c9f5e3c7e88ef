"""What the guest's machine is made of, as far as the image has a say.

An image tells by Nova's properties (`hw_*`, `os_*`, `img_*`) which machine,
firmware and devices its operating system has drivers for. Here they become one
value. Pure: no XML, no libvirt.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from agent.errors import ImageUnacceptable


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


class ScsiModel(enum.StrEnum):
    """The values of `hw_scsi_model`."""

    VIRTIO = "virtio-scsi"
    LSI = "lsilogic"
    LSI_SAS = "lsisas1068"
    VMWARE = "vmpvscsi"


class VideoModel(enum.StrEnum):
    """The values of `hw_video_model`."""

    VGA = "vga"
    VIRTIO = "virtio"
    BOCHS = "bochs"
    CIRRUS = "cirrus"
    QXL = "qxl"
    NONE = "none"


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


_MACHINE_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_KNOWN: Final = frozenset(
    {
        "hw_disk_bus", "hw_cdrom_bus", "hw_machine_type", "hw_firmware_type",
        "hw_firmware_stateless", "hw_scsi_model", "hw_vif_model", "hw_vif_multiqueue_enabled",
        "hw_video_model", "hw_pointer_model", "hw_tpm_model", "hw_tpm_version",
        "hw_watchdog_action", "hw_qemu_guest_agent", "hw_boot_menu", "hw_serial_port_count",
        "hw_time_hpet", "hw_pmu", "hw_cpu_sockets", "hw_cpu_cores", "hw_cpu_threads",
        # Every domain has such a device.
        "hw_rng_model",
        # Of the image of a rescue, see `agent.devices`.
        "hw_rescue_bus", "hw_rescue_device",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Of the virtual processors, as far as the image says."""

    sockets: int | None = None
    cores: int | None = None
    threads: int | None = None

    def complete(self, vcpus: int) -> tuple[int, int, int]:
        """Return sockets, cores and threads for so many processors.

        Raises:
            ImageUnacceptable: they do not multiply to that.
        """
        cores, threads = self.cores or 1, self.threads or 1
        sockets = self.sockets or max(1, vcpus // (cores * threads))
        if sockets * cores * threads != vcpus:
            raise ImageUnacceptable(
                f"the image asks for {sockets} sockets of {cores} cores of {threads} threads "
                f"(hw_cpu_*), which are not the flavor's {vcpus} processors",
                "use a flavor with as many processors, or correct the properties of the image",
            )
        return sockets, cores, threads


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
    tablet: bool = False
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
    topology: Topology | None = None

    @classmethod
    def wanted_by(cls, properties: Mapping[str, str]) -> Self:
        """Read an image's properties; those that are not about hardware are ignored.

        Raises:
            ImageUnacceptable: a property has a value that we cannot provide.
        """
        disk_bus = choice(properties, "hw_disk_bus", Bus) or Bus.VIRTIO
        cdrom_bus = choice(properties, "hw_cdrom_bus", Bus)
        if cdrom_bus is Bus.VIRTIO:
            raise refused("hw_cdrom_bus", "virtio", "there is no CD-ROM drive on that bus")
        machine = _machine(properties, wants_ide=Bus.IDE in (disk_bus, cdrom_bus))
        firmware = choice(properties, "hw_firmware_type", Firmware) or Firmware.BIOS
        return cls(
            machine=machine,
            firmware=firmware,
            secure_boot=_secure_boot(properties, machine, firmware),
            firmware_stateless=_flag(properties, "hw_firmware_stateless"),
            disk_bus=disk_bus,
            cdrom_bus=cdrom_bus,
            scsi_model=choice(properties, "hw_scsi_model", ScsiModel) or ScsiModel.VIRTIO,
            nic_model=choice(properties, "hw_vif_model", NicModel) or NicModel.VIRTIO,
            nic_multiqueue=_flag(properties, "hw_vif_multiqueue_enabled"),
            video_model=choice(properties, "hw_video_model", VideoModel),
            tablet=properties.get("hw_pointer_model") == "usbtablet",
            tpm_model=choice(properties, "hw_tpm_model", TpmModel)
            or (TpmModel.CRB if properties.get("hw_tpm_version") else None),
            tpm_version=choice(properties, "hw_tpm_version", TpmVersion) or TpmVersion.V2_0,
            watchdog=choice(properties, "hw_watchdog_action", WatchdogAction)
            or WatchdogAction.DISABLED,
            guest_agent=_flag(properties, "hw_qemu_guest_agent"),
            boot_menu=_flag(properties, "hw_boot_menu"),
            serial_ports=_count(properties, "hw_serial_port_count", most=4) or 1,
            hpet=_flag(properties, "hw_time_hpet"),
            pmu=_flag(properties, "hw_pmu") if properties.get("hw_pmu") else None,
            hidden_hypervisor=_flag(properties, "img_hide_hypervisor_id"),
            windows=properties.get("os_type", "").lower() == "windows",
            topology=_topology(properties),
        )


def unknown(properties: Mapping[str, str]) -> list[str]:
    """Return the `hw_*` properties that nothing here reads: the guest does without them."""
    return sorted(name for name in properties if name.startswith("hw_") and name not in _KNOWN)


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


def _topology(properties: Mapping[str, str]) -> Topology | None:
    counts = {
        name: _count(properties, f"hw_cpu_{name}", most=4096)
        for name in ("sockets", "cores", "threads")
    }
    return Topology(**counts) if any(counts.values()) else None


Choice = TypeVar("Choice", bound=enum.StrEnum)


def choice(properties: Mapping[str, str], key: str, values: type[Choice]) -> Choice | None:
    """Return the value of a property; None if it is not set.

    Raises:
        ImageUnacceptable: it is none of `values`.
    """
    text = properties.get(key)
    if not text:
        return None
    try:
        return values(text.lower())
    except ValueError:
        raise refused(key, text, f"known are {', '.join(values)}") from None


def refused(key: str, value: str, reason: str) -> ImageUnacceptable:
    """Return the error for a property that cannot be honoured."""
    return ImageUnacceptable(
        f"the image property {key} is {value!r:.80}: {reason}",
        f"set {key} to a value this host can provide, or remove it from the image",
    )


def _flag(properties: Mapping[str, str], key: str) -> bool:
    text = properties.get(key, "").lower()
    if text in ("", "0", "f", "false", "off", "n", "no"):
        return False
    if text in ("1", "t", "true", "on", "y", "yes"):
        return True
    raise refused(key, text, "it is either true or false")


def _count(properties: Mapping[str, str], key: str, *, most: int) -> int | None:
    text = properties.get(key)
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise refused(key, text, f"it is a number from 1 to {most}")
    return int(text)
