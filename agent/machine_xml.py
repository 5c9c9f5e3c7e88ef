"""The machine of a domain, as XML: firmware, processor, clock, all devices but disks and cards.

What each image asks for of it is `agent.hardware`.
"""

from lxml import etree

from agent.elements import add
from agent.hardware import Firmware, Hardware, SecureBoot, WatchdogAction


def firmware(os: etree._Element, hardware: Hardware) -> None:
    if hardware.firmware is Firmware.UEFI:
        features = add(os, "firmware")
        # Left alone, libvirt may choose a firmware that refuses every kernel
        # Microsoft has not signed.
        secure = "yes" if hardware.secure_boot is SecureBoot.REQUIRED else "no"
        add(features, "feature", enabled=secure, name="secure-boot")
        if hardware.secure_boot is SecureBoot.REQUIRED:
            # Without keys nothing would be refused.
            add(features, "feature", enabled="yes", name="enrolled-keys")
        if hardware.firmware_stateless:
            add(os, "loader", stateless="yes")
    if hardware.boot_menu:
        add(os, "bootmenu", enable="yes")


def huge_pages(domain: etree._Element, hardware: Hardware) -> None:
    if hardware.huge_pages_kib is not None:
        pages = add(add(domain, "memoryBacking"), "hugepages")
        if hardware.huge_pages_kib:
            add(pages, "page", size=str(hardware.huge_pages_kib), unit="KiB")


def processor(domain: etree._Element, hardware: Hardware, *, vcpus: int, kvm: bool) -> None:
    """Write features, processor and clock, in the order of libvirt's schema."""
    features = add(domain, "features")
    add(features, "acpi")
    add(features, "apic")
    if hardware.pmu is not None:
        add(features, "pmu", state="on" if hardware.pmu else "off")
    if hardware.hidden_hypervisor:
        add(add(features, "kvm"), "hidden", state="on")
    if hardware.windows and kvm:
        hyperv = add(features, "hyperv")
        add(hyperv, "relaxed", state="on")
        add(hyperv, "vapic", state="on")
        add(hyperv, "spinlocks", state="on", retries="8191")
    if hardware.secure_boot is SecureBoot.REQUIRED:
        # The variables with the keys are out of reach for the guest's kernel.
        add(features, "smm", state="on")
    # Under TCG host-model describes a host that is not there; maximum is all
    # that the emulator can do, and guests built for x86-64-v2 need that.
    cpu = add(domain, "cpu", mode="host-model" if kvm else "maximum")
    if hardware.topology is not None:
        arrange(cpu, hardware.topology.fit(vcpus))
    # Windows takes the hardware clock for local time.
    clock = add(domain, "clock", offset="localtime" if hardware.windows else "utc")
    add(clock, "timer", name="pit", tickpolicy="delay")
    add(clock, "timer", name="rtc", tickpolicy="catchup")
    add(clock, "timer", name="hpet", present="yes" if hardware.hpet else "no")
    if hardware.windows and kvm:
        add(clock, "timer", name="hypervclock", present="yes")


def arrange(cpu: etree._Element, topology: tuple[int, int, int]) -> None:
    """Write sockets, cores and threads."""
    sockets, cores, threads = map(str, topology)
    add(cpu, "topology", sockets=sockets, cores=cores, threads=threads)


def extras(devices: etree._Element, hardware: Hardware) -> None:
    """Add the devices that an image may ask for."""
    for port in range(1, hardware.serial_ports):
        serial = add(devices, "serial", type="pty")
        add(serial, "target", port=str(port))
    if hardware.guest_agent:
        channel = add(devices, "channel", type="unix")
        add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    if hardware.input_bus is not None:
        for kind in ("tablet", "keyboard"):
            add(devices, "input", type=kind, bus=hardware.input_bus)
    if hardware.tpm_model is not None:
        tpm = add(devices, "tpm", model=hardware.tpm_model)
        add(tpm, "backend", type="emulator", version=hardware.tpm_version)
    if hardware.video_model is not None:
        # libvirt's unit is KiB. Not every card has memory of its own to be sized.
        ram = None if hardware.video_ram_mib is None else str(hardware.video_ram_mib << 10)
        add(add(devices, "video"), "model", type=hardware.video_model, vram=ram)
    if hardware.watchdog is not WatchdogAction.DISABLED:
        add(devices, "watchdog", model="i6300esb", action=hardware.watchdog)
