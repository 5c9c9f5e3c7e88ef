"""What a domain that is there says of itself, in the XML that libvirt has of it."""

from pathlib import Path

from lxml import etree

from agent.domain_spec import Size


def devices_of(xml: str) -> set[str]:
    """Return the names of all disks of a domain, such as `vda`."""
    targets = etree.fromstring(xml.encode()).iterfind("devices/disk/target")
    return {name for target in targets if (name := target.get("dev")) is not None}


def sources_by_device(xml: str) -> dict[str, str]:
    """Return where the disks of a domain are by their names: paths, or `pool/image` in a cluster.

    Drives without a medium are not among them.
    """
    return {
        target.get("dev", ""): found
        for disk in etree.fromstring(xml.encode()).iterfind("devices/disk")
        if (source := disk.find("source")) is not None
        and (target := disk.find("target")) is not None
        for attribute in ("file", "dev", "name")
        if (found := source.get(attribute)) is not None
    }


def sources_of(xml: str) -> set[str]:
    """Return where the disks of a domain are."""
    return set(sources_by_device(xml).values())


def machine_of(xml: str) -> str:
    """Return the type of machine, such as pc-q35-7.2; empty if the domain does not say."""
    element = etree.fromstring(xml.encode()).find("os/type")
    return "" if element is None else element.get("machine", "")


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


def size_of(xml: str) -> Size:
    """Return the processors and the memory of a domain, of one as libvirt shows it, in KiB."""
    domain = etree.fromstring(xml.encode())
    return Size(
        vcpus=int(domain.findtext("vcpu", "1")), ram_mib=int(domain.findtext("memory", "0")) >> 10
    )
