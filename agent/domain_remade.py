"""A domain that is there, made anew to the wishes of another image.

What follows from an image (machine, firmware, processor, clock, controllers,
consoles and the other devices of `agent.machine_xml`) is the new one's alone.
What does not stays as libvirt has it: size, network cards, disks and other
devices that somebody has attached, limits, the rest of the metadata. Only their
addresses go, for those belong to the machine that was.
"""

import copy
from typing import Final

from lxml import etree

from agent import domain_facts, domain_xml
from agent.devices import free_device_name
from agent.domain_spec import Kernel, spec_of
from agent.domain_xml import DomainSpec
from agent.elements import child
from agent.hardware import Hardware
from agent.host import Host
from agent.instances import InstanceRecord

_OF_THE_IMAGE: Final = frozenset({"os", "features", "cpu", "clock", "memoryBacking", "devices"})
_DEVICES_OF_THE_IMAGE: Final = frozenset(
    {
        "emulator", "controller", "serial", "console", "input", "tpm", "video", "watchdog", "rng",
        "memballoon",
    }
)  # fmt: skip
_GUEST_AGENT: Final = "org.qemu.guest_agent.0"


def remade(
    host: Host,
    record: InstanceRecord,
    xml: str,
    *,
    hardware: Hardware,
    kernel: Kernel,
    replaced: frozenset[str],
) -> str:
    """Return the domain of `record` with that hardware.

    Args:
        xml: the domain as libvirt has it.
        replaced: the names of its disks that are ours; those of `record` take their place.

    Raises:
        ImageUnacceptable: the image cannot bear as many processors as it has.
        BackendError: how network disks are reached cannot be found out.
    """
    before = etree.fromstring(xml.encode(), etree.XMLParser(remove_blank_text=True))
    spec = spec_of(host, record, size=domain_facts.size_of(xml), kernel=kernel, hardware=hardware)
    after = etree.fromstring(
        domain_xml.build(spec).encode(), etree.XMLParser(remove_blank_text=True)
    )
    for element in before:
        if element.tag == "metadata":
            _keep_metadata(element, after)
        elif element.tag not in _OF_THE_IMAGE:
            for ours in after.findall(str(element.tag)):
                after.remove(ours)
            after.append(copy.deepcopy(element))
    for device in before.iterfind("devices/*"):
        if not _is_of_the_image(device, replaced):
            _keep(device, after, spec)
    etree.indent(after, space="  ")
    return etree.tostring(after, encoding="unicode", pretty_print=True)


def _keep_metadata(before: etree._Element, after: etree._Element) -> None:
    metadata = child(after, "metadata")
    for element in before:
        if etree.QName(element).namespace != domain_xml.NAMESPACE:
            metadata.append(copy.deepcopy(element))


def _is_of_the_image(device: etree._Element, replaced: frozenset[str]) -> bool:
    match device.tag:
        case "disk":
            return _target(device) in replaced
        case "channel":
            target = device.find("target")
            return target is not None and target.get("name") == _GUEST_AGENT
        case tag:
            return tag in _DEVICES_OF_THE_IMAGE


def _keep(device: etree._Element, after: etree._Element, spec: DomainSpec) -> None:
    kept = copy.deepcopy(device)
    # The guest's, that is: where a device of the host is stands below its <source>.
    for address in kept.findall("address"):
        kept.remove(address)
    if kept.tag == "interface" and kept.find("model") is not None:
        domain_xml.set_model(kept, spec.hardware, spec.vcpus)
    elif kept.tag == "disk" and (target := kept.find("target")) is not None:
        taken = {_target(disk) for disk in after.iterfind("devices/disk")}
        if _target(kept) in taken:
            # Ours come first. It is a name for libvirt's callers, the guest knows others.
            bus = target.get("bus", "virtio")
            target.set("dev", free_device_name(bus, taken))
    child(after, "devices").append(kept)


def _target(disk: etree._Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")
