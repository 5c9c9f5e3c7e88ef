"""The domain: what libvirt is told about one instance, as XML.

`build` writes a whole domain, `fill_template` puts an instance's disks into the
domain its owner wrote. Every disk names its format and every file below it, so
that neither libvirt nor QEMU ever looks into a file that a guest can write to
find out what it is. Knows nothing of a running libvirt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, assert_never, cast

from lxml import etree

from agent import machine_xml
from agent.devices import free_scsi_unit
from agent.disk import Disk, DiskType, RbdAccess
from agent.elements import add, child, offer, put
from agent.errors import InvalidJob
from agent.hardware import Bus, Firmware, Hardware
from agent.job import Network
from agent.report import Role

NAMESPACE: Final = "urn:bootwright:domain:1"
"""Of the element in `<metadata>` by which a domain tells whose it is."""

# As much as the job's schema lets through. libxml2's own limits on depth and
# on single texts stay in force below that.
_TEMPLATE_LIMIT: Final = 1 << 20

# MAX_TAP_QUEUES of Linux.
_MOST_QUEUES: Final = 256

# With any other mode QEMU refuses io='native'.
_PAST_THE_PAGE_CACHE: Final = ("none", "directsync")

_TEMPLATE_HINT: Final = "correct libvirt.domain_xml of the job; try it with virt-xml-validate"


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSpec:
    """All that a domain's XML says."""

    uuid: str
    name: str
    job_id: str
    image_id: str
    image_digest: str | None
    """`algorithm:hex`."""
    virt_type: str
    """kvm or qemu."""
    vcpus: int
    ram_mib: int
    disks: tuple[Disk, ...]
    """With bus and device name; kernel and ramdisk among them are for `kernel` and `ramdisk`."""
    kernel: Path | None = None
    ramdisk: Path | None = None
    command_line: str | None = None
    """The kernel's; None for one that mounts the root disk and talks to the serial console."""
    networks: tuple[Network, ...] = ()
    console_log: Path
    """Receives what the guest writes to its first serial port."""
    hardware: Hardware
    rbd: RbdAccess | None = None
    """Needed by disks of type network."""
    cache_modes: Mapping[DiskType, str]
    """libvirt's: none, writeback …"""
    discard: str
    """libvirt's: unmap or ignore."""
    iotune: Mapping[str, int] = field(default_factory=dict)
    """What each disk may do, by libvirt's name: `read_bytes_sec` …"""


def build(spec: DomainSpec) -> str:
    """Return the XML of a domain that is all ours.

    Raises:
        InvalidJob: a text in it cannot be written in XML.
    """
    domain = etree.Element("domain", type=spec.virt_type)
    _identify(domain, spec)
    _size(domain, spec)
    os = add(domain, "os", firmware="efi" if spec.hardware.firmware is Firmware.UEFI else None)
    add(os, "type", "hvm", machine=spec.hardware.machine)
    machine_xml.firmware(os, spec.hardware)
    _kernel(os, spec)
    machine_xml.huge_pages(domain, spec.hardware)
    machine_xml.processor(domain, spec.hardware, vcpus=spec.vcpus, kvm=spec.virt_type == "kvm")
    devices = add(domain, "devices")
    _controllers(devices, spec)
    for disk in _attached(spec):
        _describe(add(devices, "disk"), disk, spec)
    for network in spec.networks:
        _interface(devices, network, spec)
    _console(devices, spec)
    machine_xml.extras(devices, spec.hardware)
    add(add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    add(devices, "memballoon", model="virtio")
    return _text(domain)


def fill_template(xml: str, spec: DomainSpec) -> str:
    """Return the domain of `xml` with the instance's disks in it.

    All that the template says stays. What it leaves out is filled in: name,
    uuid, size, type of machine, kernel, order of boot, serial console; network cards
    are added, but not to those of its own. A
    `<disk>` that has the target of one of our disks and no source of its own
    becomes that disk, with whatever else it says (`<iotune>`, `<driver io=…>`);
    disks that have no such place are added.

    Raises:
        InvalidJob: it is no domain, or contradicts the job; with the line.
    """
    domain = _parse(xml)
    if "type" not in domain.attrib:
        domain.set("type", spec.virt_type)
    _agree(domain, "name", spec.name)
    _agree(domain, "uuid", spec.uuid)
    _identify(domain, spec)
    _size(domain, spec)
    os = child(domain, "os")
    if os.find("type") is None:
        add(os, "type", "hvm", machine=spec.hardware.machine)
        if spec.hardware.firmware is Firmware.UEFI and "firmware" not in os.attrib:
            # Machine and firmware belong together: the template left both to the image.
            os.set("firmware", "efi")
            machine_xml.firmware(os, spec.hardware)
    _kernel(os, spec)
    devices = child(domain, "devices")
    places = _places(devices)
    if os.find("boot") is not None or devices.find("*/boot") is not None:
        # libvirt takes an order of boot in one way only, and each place in it once.
        spec = replace(spec, disks=tuple(replace(disk, boot_index=None) for disk in spec.disks))
    if not devices.xpath("controller[@type='scsi']"):
        _controllers(devices, spec)
    for disk in _attached(spec):
        place = places.get(disk.device_name or "")
        _describe(add(devices, "disk") if place is None else place, disk, spec)
    card = devices.find("interface")
    if card is not None and spec.networks:
        raise _wrong(
            _line(card), "an <interface> is there already, and the job has networks of its own"
        )
    for network in spec.networks:
        _interface(devices, network, spec)
    if devices.find("serial") is None and devices.find("console") is None:
        _console(devices, spec)
    return _text(domain)


def has_interface(template: str) -> bool:
    """Whether a template has a network card of its own. Raises: InvalidJob: it is no domain."""
    return _parse(template).find("devices/interface") is not None


def job_of(metadata: str) -> str | None:
    """Return the id of the job that made a domain, from its element of our NAMESPACE.

    None if the element does not say.
    """
    try:
        job = etree.fromstring(metadata.encode(), _parser()).find("{*}job")
    except etree.XMLSyntaxError:
        return None
    return None if job is None else job.get("id")


def _parse(xml: str) -> etree._Element:
    if len(xml) > _TEMPLATE_LIMIT:
        raise InvalidJob(
            f"the domain template has {len(xml)} characters, {_TEMPLATE_LIMIT} are allowed",
            _TEMPLATE_HINT,
        )
    # A domain needs no document type, and everything dangerous in XML (entities
    # that grow, that read files, that call hosts) is declared in one.
    before, doctype, _ = xml.partition("<!DOCTYPE")
    if doctype:
        raise _wrong(before.count("\n") + 1, "a document type (<!DOCTYPE …>) is not allowed")
    try:
        root = etree.fromstring(xml.encode(errors="surrogatepass"), _parser())
    except etree.XMLSyntaxError as e:
        raise _wrong(e.lineno or 1, e.msg or "it is not XML") from e
    if root.tag != "domain":
        raise _wrong(_line(root), f"it describes a <{root.tag}>, not a <domain>")
    return root


def _parser() -> etree.XMLParser:
    return etree.XMLParser(
        # Over a declared encoding: what was searched above is what is parsed.
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_blank_text=True,
    )


def _wrong(line: int, what: str) -> InvalidJob:
    return InvalidJob(f"the domain template, line {line}: {what}", _TEMPLATE_HINT)


def _line(element: etree._Element) -> int:
    # lxml-stubs leave this one attribute without a type.
    return cast("int | None", element.sourceline) or 1


def _agree(domain: etree._Element, tag: str, value: str) -> None:
    """A template may repeat who the instance is, not say otherwise."""
    element = domain.find(tag)
    given = "" if element is None else (element.text or "").strip()
    if element is not None and given.lower() != value.lower():
        raise _wrong(
            _line(element), f"<{tag}> is {given!r:.80}, but the instance's {tag} is {value!r}"
        )


def _places(devices: etree._Element) -> Mapping[str, etree._Element]:
    """The template's disks by the name of their device."""
    places: dict[str, etree._Element] = {}
    for element in devices.findall("disk"):
        target = element.find("target")
        name = None if target is None else target.get("dev")
        if name is None:
            continue
        if name in places:
            raise _wrong(_line(element), f"{name} is the target of two disks")
        places[name] = element
    return places


def _identify(domain: etree._Element, spec: DomainSpec) -> None:
    put(domain, "name", spec.name)
    put(domain, "uuid", spec.uuid)
    metadata = child(domain, "metadata")
    # libvirt keeps one element of each namespace: the first.
    for previous in metadata.findall(f"{{{NAMESPACE}}}*"):
        metadata.remove(previous)
    instance = etree.SubElement(
        metadata, f"{{{NAMESPACE}}}instance", nsmap={"bootwright": NAMESPACE}
    )
    add(instance, f"{{{NAMESPACE}}}job", id=spec.job_id)
    add(instance, f"{{{NAMESPACE}}}image", id=spec.image_id, digest=spec.image_digest)


def _size(domain: etree._Element, spec: DomainSpec) -> None:
    if domain.find("memory") is None:
        add(domain, "memory", str(spec.ram_mib), unit="MiB")
    if domain.find("vcpu") is None:
        add(domain, "vcpu", str(spec.vcpus))


def _kernel(os: etree._Element, spec: DomainSpec) -> None:
    if spec.kernel is None:
        return
    for tag, path in (("kernel", spec.kernel), ("initrd", spec.ramdisk)):
        present = os.find(tag)
        if present is not None:
            raise _wrong(_line(present), f"<{tag}> is there already, and the job brings its own")
        if path is not None:
            add(os, tag, str(path))
    if os.find("cmdline") is None:
        root = next(disk for disk in spec.disks if disk.role is Role.ROOT)
        usual = usual_command_line(root, spec.virt_type)
        add(os, "cmdline", usual if spec.command_line is None else spec.command_line)


def usual_command_line(root: Disk, virt_type: str) -> str:
    """Return what a kernel is told that nobody has words for: its root disk, and where to talk."""
    # libvirt names disks on IDE as Linux did until 2.6.18.
    name = f"sd{str(root.device_name)[2:]}" if root.bus == Bus.IDE else root.device_name
    words = f"root=/dev/{name} console=ttyS0"
    # On a busy host an emulated timer ticks too late for the kernel's check, which then panics.
    return f"{words} no_timer_check" if virt_type == "qemu" else words


def _attached(spec: DomainSpec) -> list[Disk]:
    return [disk for disk in spec.disks if disk.device_name is not None]


def _controllers(devices: etree._Element, spec: DomainSpec) -> None:
    if any(disk.bus == Bus.SCSI for disk in spec.disks):
        # libvirt's own choice is the LSI controller of 1995, which newer
        # guests have no driver for and which takes seven disks.
        add(devices, "controller", type="scsi", index="0", model=spec.hardware.scsi_model)


def _describe(element: etree._Element, disk: Disk, spec: DomainSpec) -> None:
    """Make `element`, new or a place in a template, the description of `disk`."""
    for tag in ("source", "backingStore"):
        present = element.find(tag)
        if present is not None:
            raise _wrong(
                _line(present),
                f"{disk.device_name} has a <{tag}>; leave out what the job fills in",
            )
    offer(element, "device", disk.device)
    if element.get("device") != disk.device:
        raise _wrong(_line(element), f"{disk.device_name} is a {disk.device} in this job")
    driver = child(element, "driver")
    driver.set("name", "qemu")
    driver.set("type", disk.format)
    offer(driver, "cache", spec.cache_modes[disk.type])
    if disk.native_io and driver.get("cache") in _PAST_THE_PAGE_CACHE:
        offer(driver, "io", "native")
    offer(driver, "discard", spec.discard)
    _source(element, disk, spec)
    _backing_chain(element, disk)
    target = child(element, "target")
    target.set("dev", disk.device_name or "")
    offer(target, "bus", disk.bus or "")
    if target.get("bus") != disk.bus:
        raise _wrong(
            _line(target),
            f"{disk.device_name} is on bus {target.get('bus')!r}, the image asks for {disk.bus!r}",
        )
    if spec.iotune and element.find("iotune") is None:
        limits = add(element, "iotune")
        for name, value in spec.iotune.items():
            add(limits, name, str(value))
    if disk.serial is not None and element.find("serial") is None:
        add(element, "serial", disk.serial)
    if disk.read_only and element.find("readonly") is None:
        add(element, "readonly")
    if disk.boot_index is not None and element.find("boot") is None:
        add(element, "boot", order=str(disk.boot_index))
    if disk.bus == Bus.SCSI and element.find("address") is None:
        # All on one controller: from the name alone libvirt would put seven
        # on each and add controllers of its own choice.
        add(element, "address", type="drive", controller="0", unit=str(_scsi_unit(element)))


def _scsi_unit(element: etree._Element) -> int:
    """Return a place on the first SCSI controller that no other disk has, whoever attached it."""
    devices = element.getparent()
    if devices is None:
        raise AssertionError("a disk is described where it belongs")
    taken = {
        int(address.get("unit", "0"))
        for disk in devices.findall("disk")
        if disk.find("target[@bus='scsi']") is not None
        and (address := disk.find("address")) is not None
        and address.get("controller", "0") == "0"
    }
    controller = devices.find("controller[@type='scsi']")
    model = None if controller is None else controller.get("model")
    unit = free_scsi_unit(model, taken)
    if unit is None:
        raise InvalidJob(
            f"the SCSI controller of the domain, {model}, has no place left for one more disk",
            "detach a disk, or use an image that asks for another bus or controller",
        )
    return unit


def _source(element: etree._Element, disk: Disk, spec: DomainSpec) -> None:
    element.set("type", disk.type)
    match disk.type:
        case DiskType.FILE:
            add(element, "source", file=str(disk.path))
        case DiskType.BLOCK:
            add(element, "source", dev=str(disk.path))
        case DiskType.NETWORK:
            if spec.rbd is None:
                raise AssertionError("whoever plans network disks tells how they are reached")
            source = add(element, "source", protocol="rbd", name=str(disk.path))
            for address, port in spec.rbd.monitors:
                add(source, "host", name=address, port=str(port))
            auth = add(source, "auth", username=spec.rbd.user)
            add(auth, "secret", type="ceph", uuid=spec.rbd.secret_uuid)
        case _:
            assert_never(disk.type)


def _backing_chain(element: etree._Element, disk: Disk) -> None:
    """Write the whole chain; the empty element at its end says that it ends there."""
    for link in disk.backing_chain:
        element = add(element, "backingStore", type="file")
        add(element, "format", type=link.format)
        add(element, "source", file=str(link.path))
    add(element, "backingStore")


def _interface(devices: etree._Element, network: Network, spec: DomainSpec) -> None:
    kind = "network" if network.network is not None else "bridge"
    interface = add(devices, "interface", type=kind)
    if network.mac is not None:
        add(interface, "mac", address=network.mac)
    if network.network is not None:
        add(interface, "source", network=network.network)
    else:
        add(interface, "source", bridge=network.bridge)
    set_model(interface, spec.hardware, spec.vcpus)


def set_model(interface: etree._Element, hardware: Hardware, vcpus: int) -> None:
    """Make a network card, new or with a model of its own, one that the image asks for."""
    for tag in ("model", "driver"):
        for present in interface.findall(tag):
            interface.remove(present)
    add(interface, "model", type=hardware.nic_model)
    if hardware.nic_multiqueue:
        set_queues(interface, vcpus)


def set_queues(interface: etree._Element, vcpus: int) -> None:
    """Give a card that can have several queues as many as processors, up to what a tap has."""
    if interface.find("model[@type='virtio']") is None:
        return
    if vcpus > 1:
        child(interface, "driver").set("queues", str(min(vcpus, _MOST_QUEUES)))
    elif (driver := interface.find("driver")) is not None:
        driver.attrib.pop("queues", "")


def _console(devices: etree._Element, spec: DomainSpec) -> None:
    for tag, target in (("serial", {"port": "0"}), ("console", {"type": "serial", "port": "0"})):
        element = add(devices, tag, type="file")
        # Kept over a restart of the guest: the last words before it are what one looks for.
        add(element, "source", path=str(spec.console_log), append="on")
        add(element, "target", **target)


def _text(domain: etree._Element) -> str:
    etree.indent(domain, space="  ")
    return etree.tostring(domain, encoding="unicode", pretty_print=True)
