"""Changes to a domain that is there: what libvirt has of it, with some parts made anew.

All else stays as it is, also what others have changed since it was defined. The
disks are filled in again as into a template (`agent.domain_xml`), so that each
names its format and what it stands on.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lxml import etree

from agent import domain_xml
from agent.disk import Disk
from agent.domain_xml import DomainSpec
from agent.hardware import Hardware
from agent.host import Host
from agent.instances import InstanceRecord

_KERNEL = ("os/kernel", "os/initrd", "os/cmdline")
_SIZE = ("memory", "currentMemory", "vcpu", "cpu/topology")
_BOOT = ("os/boot", "devices/*/boot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What QEMU boots by itself; without a kernel the domain boots from its disks."""

    kernel: Path | None
    ramdisk: Path | None
    command_line: str | None
    """None for one that mounts the root disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    vcpus: int
    ram_mib: int


def changed(
    host: Host,
    record: InstanceRecord,
    xml: str,
    *,
    size: Size | None = None,
    kernel: Kernel | None = None,
    boots_from: Disk | None = None,
    limited: Mapping[str, int] | None = None,
) -> str:
    """Return the domain of `record` with its disks as they are now.

    Args:
        xml: the domain as libvirt has it.
        size, kernel: instead of what it has; None leaves that alone.
        boots_from: the disk that comes first, and alone, in the order of boot.
        limited: the limits that its disks had; those of `record` take their place. None if they
            are the same.

    Raises:
        BackendError: how network disks are reached cannot be found out.
    """
    domain = etree.fromstring(xml.encode(), etree.XMLParser(remove_blank_text=True))
    if size is not None:
        _drop(domain, _SIZE)
    if kernel is not None:
        _drop(domain, _KERNEL)
    if limited is not None:
        _drop_limits(domain, limited)
    disks = record.disks
    if boots_from is not None:
        _drop(domain, _BOOT)
        disks = tuple(replace(disk, boot_index=1 if disk == boots_from else None) for disk in disks)
    _make_room(domain, {disk.device_name for disk in disks if disk.device_name is not None})
    spec = DomainSpec(
        uuid=record.uuid,
        name=record.name,
        job_id=record.job_id,
        image_id=record.image_id,
        image_digest=record.image_digest,
        virt_type=host.defaults.virt_type,
        vcpus=0 if size is None else size.vcpus,
        ram_mib=0 if size is None else size.ram_mib,
        disks=disks,
        kernel=None if kernel is None else kernel.kernel,
        ramdisk=None if kernel is None else kernel.ramdisk,
        command_line=None if kernel is None else kernel.command_line,
        console_log=host.instances.console_of(record.uuid),
        hardware=Hardware(),
        rbd=host.backends.access(disks),
        cache_modes=host.defaults.cache_modes,
        discard=host.defaults.discard,
        iotune=record.iotune,
    )
    return domain_xml.fill_template(etree.tostring(domain, encoding="unicode"), spec)


def devices_of(xml: str) -> set[str]:
    """Return the names of all disks of a domain, such as `vda`."""
    targets = etree.fromstring(xml.encode()).iterfind("devices/disk/target")
    return {name for target in targets if (name := target.get("dev")) is not None}


def sources_of(xml: str) -> set[str]:
    """Return where the disks of a domain are: paths, or `pool/image` in a cluster."""
    return {
        found
        for source in etree.fromstring(xml.encode()).iterfind("devices/disk/source")
        for attribute in ("file", "dev", "name")
        if (found := source.get(attribute)) is not None
    }


def kernel_of(xml: str) -> Path | None:
    """Return the kernel that QEMU boots a domain with by itself."""
    text = etree.fromstring(xml.encode()).findtext("os/kernel")
    return None if text is None else Path(text)


def keeps_state(xml: str) -> bool:
    """Whether libvirt keeps something of a domain that is off: variables of firmware, a TPM."""
    domain = etree.fromstring(xml.encode())
    emulated = domain.find("devices/tpm/backend[@type='emulator']")
    stateless = domain.find("os/loader[@stateless='yes']")
    return emulated is not None or (
        domain.find("os/nvram") is not None
        or (domain.find("os[@firmware='efi']") is not None and stateless is None)
    )


def _drop(domain: etree._Element, paths: Collection[str]) -> None:
    for path in paths:
        for element in domain.findall(path):
            parent = element.getparent()
            if parent is not None:
                parent.remove(element)


def _drop_limits(domain: etree._Element, limits: Mapping[str, int]) -> None:
    """Take off what we have put on; limits of the domain's owner stay."""
    for disk in domain.findall("devices/disk"):
        found = disk.find("iotune")
        if found is not None and {limit.tag: limit.text for limit in found} == {
            name: str(value) for name, value in limits.items()
        }:
            disk.remove(found)


def _make_room(domain: etree._Element, names: Collection[str]) -> None:
    """Empty the places of our disks, for `fill_template` to fill."""
    for element in domain.findall("devices/disk"):
        target = element.find("target")
        if target is not None and target.get("dev") in names:
            _drop(element, ("source", "backingStore"))
