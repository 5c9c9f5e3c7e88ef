"""Changes to a domain that is there: what libvirt has of it, with some parts made anew.

All else stays as it is, also what others have changed since it was defined. The
disks are filled in again as into a template (`agent.domain_xml`), so that each
names its format and what it stands on.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from lxml import etree

from agent import domain_xml
from agent.disk import Disk
from agent.domain_spec import NO_KERNEL, Kernel, Size, spec_of
from agent.elements import child
from agent.hardware import Hardware
from agent.host import Host
from agent.instances import InstanceRecord
from agent.machine_xml import arrange

_KERNEL = ("os/kernel", "os/initrd", "os/cmdline")
_BOOT = ("os/boot", "devices/*/boot")

# Of no consequence: a template that has a size keeps it.
_AS_IT_IS: Final = Size(vcpus=0, ram_mib=0)


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
        _resize(domain, size)
    if kernel is not None:
        _drop(domain, _KERNEL)
    if limited is not None:
        _drop_limits(domain, limited)
    disks = record.disks
    if boots_from is not None:
        _drop(domain, _BOOT)
        disks = tuple(replace(disk, boot_index=1 if disk == boots_from else None) for disk in disks)
    _make_room(domain, {disk.device_name for disk in disks if disk.device_name is not None})
    spec = spec_of(
        host,
        replace(record, disks=disks),
        size=size or _AS_IT_IS,
        kernel=kernel or NO_KERNEL,
        hardware=Hardware(),
    )
    return domain_xml.fill_template(etree.tostring(domain, encoding="unicode"), spec)


def _drop(domain: etree._Element, paths: Collection[str]) -> None:
    for path in paths:
        for element in domain.findall(path):
            parent = element.getparent()
            if parent is not None:
                parent.remove(element)


def _resize(domain: etree._Element, size: Size) -> None:
    """Give it that size; what does not depend on that stays, such as who placed its processors."""
    _drop(domain, ("memory", "currentMemory"))
    processors = child(domain, "vcpu")
    # All of them shall be there from the start.
    _drop(domain, ("vcpus",))
    processors.attrib.pop("current", "")
    if processors.text == str(size.vcpus):
        return
    _drop(domain, ("cpu/topology",))
    processors.text = str(size.vcpus)
    if size.topology is not None:
        arrange(child(domain, "cpu"), size.topology)
    if size.queues:
        for interface in domain.findall("devices/interface"):
            domain_xml.set_queues(interface, size.vcpus)


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
