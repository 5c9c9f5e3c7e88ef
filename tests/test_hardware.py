"""Buses, names and addresses: what follows from an image's properties."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.devices import assign_devices, assign_macs, reassign_devices
from agent.disk import Disk
from agent.errors import HypervisorError, ImageUnacceptable
from agent.hardware import Bus, Firmware, Hardware, InputBus, NicModel, SecureBoot, Topology
from agent.hypervisor import HostOffers, Hypervisor
from agent.image_hardware import on_host
from agent.job import ImagesType, Network
from agent.properties import unknown
from agent.report import Role

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"


def disk(role: Role, *, device: str = "disk") -> Disk:
    return Disk(
        role=role,
        backend=ImagesType.RAW,
        path=Path("/i", role),
        format="raw",
        virtual_size=1,
        device=device,
    )


def names(*disks: Disk, **properties: str) -> list[tuple[str | None, str | None, str]]:
    assigned = assign_devices(disks, Hardware.wanted_by(properties), UUID)
    return [(disk.bus, disk.device_name, disk.device) for disk in assigned]


def test_image_that_says_nothing_gets_virtio_on_q35() -> None:
    assert Hardware.wanted_by({"os_distro": "debian", "hw_disk_bus": ""}) == Hardware(
        machine="q35",
        firmware=Firmware.BIOS,
        disk_bus=Bus.VIRTIO,
        cdrom_bus=None,
        nic_model=NicModel.VIRTIO,
    )


def test_properties_are_read_without_regard_to_case() -> None:
    hardware = Hardware.wanted_by({"hw_firmware_type": "UEFI", "hw_disk_bus": "SCSI"})
    assert (hardware.firmware, hardware.disk_bus) == (Firmware.UEFI, Bus.SCSI)


@pytest.mark.parametrize(
    "properties",
    [
        {"hw_disk_bus": "floppy"},
        {"hw_cdrom_bus": "virtio"},
        {"hw_firmware_type": "coreboot"},
        {"hw_vif_model": "ne2k"},
        {"hw_machine_type": "q35' onload='"},
        {"hw_disk_bus": "ide", "hw_machine_type": "pc-q35-7.2"},
        {"os_secure_boot": "required"},
        {"os_secure_boot": "required", "hw_firmware_type": "uefi", "hw_machine_type": "pc"},
        {"os_secure_boot": "perhaps"},
        {"hw_boot_menu": "maybe"},
        {"hw_serial_port_count": "0"},
        {"hw_cpu_cores": "-1"},
        {"hw_tpm_model": "tpm-spapr"},
        {"hw_tpm_model": "tpm-crb", "hw_tpm_version": "1.2"},
        {"hw_video_model": "gop"},
        {"hw_watchdog_action": "explode"},
        {"hw_scsi_model": "lsisas1068"},
        {"hw_architecture": "aarch64"},
        {"hw_vm_mode": "xen"},
        {"hw_mem_encryption": "True"},
        {"hw_ephemeral_encryption": "true"},
        {"hw_rng_model": "egd"},
        {"hw_pointer_model": "joystick"},
        {"hw_input_bus": "ps2"},
        {"hw_mem_page_size": "2"},
        {"hw_mem_page_size": "huge"},
        {"hw_mem_page_size": "4MB"},
        {"hw_video_ram": "lots"},
    ],
)
def test_wish_that_cannot_be_met_is_refused_by_its_name(properties: dict[str, str]) -> None:
    with pytest.raises(ImageUnacceptable, match=r"the image property (hw|os)_"):
        Hardware.wanted_by(properties)


def test_image_that_wants_ide_gets_the_machine_that_has_it() -> None:
    assert Hardware.wanted_by({"hw_disk_bus": "ide"}).machine == "pc"
    assert Hardware.wanted_by({"hw_cdrom_bus": "ide"}).machine == "pc"


def test_disks_are_named_in_order() -> None:
    assert names(disk(Role.ROOT), disk(Role.EPHEMERAL), disk(Role.SWAP)) == [
        ("virtio", "vda", "disk"),
        ("virtio", "vdb", "disk"),
        ("virtio", "vdc", "disk"),
    ]


def test_kernel_and_ramdisk_are_no_devices() -> None:
    assert names(disk(Role.KERNEL), disk(Role.RAMDISK), disk(Role.ROOT)) == [
        (None, None, "disk"),
        (None, None, "disk"),
        ("virtio", "vda", "disk"),
    ]


def test_config_drive_is_on_the_bus_of_the_root_disk() -> None:
    disks = disk(Role.ROOT), disk(Role.CONFIG_DRIVE, device="cdrom")
    assert names(*disks)[1] == ("virtio", "vdb", "disk")
    assert names(*disks, hw_disk_bus="scsi")[1] == ("scsi", "sdb", "cdrom")
    assert names(*disks, hw_cdrom_bus="sata")[1] == ("sata", "sda", "cdrom")


def test_config_drive_that_is_no_cdrom_is_a_disk_like_the_others() -> None:
    disks = disk(Role.ROOT), disk(Role.CONFIG_DRIVE)
    assert names(*disks, hw_disk_bus="scsi", hw_cdrom_bus="sata")[1] == ("scsi", "sdb", "disk")


def test_image_of_a_cdrom_is_a_read_only_cdrom() -> None:
    iso = disk(Role.ROOT, device="cdrom")
    assert names(iso) == [("sata", "sda", "cdrom")]
    assert names(iso, hw_machine_type="pc") == [("ide", "hda", "cdrom")]
    assert names(iso, hw_cdrom_bus="scsi") == [("scsi", "sda", "cdrom")]
    assert assign_devices([iso], Hardware(), UUID)[0].read_only


def test_buses_that_share_a_prefix_share_its_names() -> None:
    disks = disk(Role.ROOT, device="cdrom"), disk(Role.EPHEMERAL), disk(Role.SWAP)
    assert [name for _, name, _ in names(*disks, hw_disk_bus="scsi")] == ["sda", "sdb", "sdc"]


def test_only_the_root_disk_has_a_place_in_the_boot_order() -> None:
    assigned = assign_devices([disk(Role.ROOT), disk(Role.EPHEMERAL)], Hardware(), UUID)
    assert [disk.boot_index for disk in assigned] == [1, None]


def test_fifth_disk_on_ide_is_refused() -> None:
    disks = [disk(Role.ROOT), *[disk(Role.EPHEMERAL)] * 3]
    assert [name for _, name, _ in names(*disks, hw_disk_bus="ide")][3] == "hdd"
    with pytest.raises(ImageUnacceptable, match="4 places for 5 disks"):
        names(*disks, disk(Role.SWAP), hw_disk_bus="ide")


def test_disk_that_would_take_the_scsi_controllers_own_place_is_refused() -> None:
    wishes = {"hw_disk_bus": "scsi", "hw_scsi_model": "lsilogic"}
    disks = [disk(Role.ROOT), *[disk(Role.EPHEMERAL)] * 6]
    assert names(*disks, **wishes)[6] == ("scsi", "sdg", "disk")
    with pytest.raises(ImageUnacceptable, match="7 places for 8 disks"):
        names(*disks, disk(Role.SWAP), **wishes)


@given(st.integers(min_value=1, max_value=1000))
def test_names_are_unique_and_go_on_after_the_26th(count: int) -> None:
    found = [name for _, name, _ in names(*[disk(Role.EPHEMERAL)] * count)]
    assert len(set(found)) == count
    expected = ["vda", "vdz", "vdaa", "vdaz", "vdba", "vdzz", "vdaaa"]
    for place, name in zip([0, 25, 26, 51, 52, 701, 702], expected, strict=True):
        if place < count:
            assert found[place] == name


def test_mac_address_follows_from_the_instance_and_is_kept_if_given() -> None:
    networks = (
        Network(network="default"),
        Network(bridge="br0", mac="52:54:00:00:00:01"),
        Network(network="default"),
    )
    first, second, third = assign_macs(networks, UUID)
    assert second.mac == "52:54:00:00:00:01"
    assert first.mac is not None
    assert first.mac.startswith("52:54:00:")
    assert first.mac != third.mac
    assert assign_macs(networks, UUID) == (first, second, third)
    assert assign_macs(networks, UUID.replace("0", "1"))[0].mac != first.mac


def test_properties_nobody_reads_are_told() -> None:
    properties = {"hw_disk_bus": "scsi", "hw_cpu_policy": "dedicated", "os_type": "linux"}
    assert unknown(properties) == ["hw_cpu_policy"]


def test_optional_secure_boot_is_not_asked_of_a_machine_that_has_none() -> None:
    assert Hardware.wanted_by({"os_secure_boot": "optional"}).secure_boot is SecureBoot.DISABLED
    uefi = {"os_secure_boot": "optional", "hw_firmware_type": "uefi"}
    assert Hardware.wanted_by(uefi).secure_boot is SecureBoot.OPTIONAL


def test_every_disk_has_a_serial_of_its_own() -> None:
    roles = (Role.ROOT, *[Role.EPHEMERAL] * 200, Role.SWAP, Role.CONFIG_DRIVE)
    disks = [disk(role) for role in roles]
    serials = [each.serial for each in assign_devices(disks, Hardware(), UUID)]
    assert serials == [
        "0b46a3c625a5-root",
        *(f"0b46a3c625a5-eph{number}" for number in range(200)),
        "0b46a3c625a5-swap",
        "0b46a3c625a5-config",
    ]
    # What virtio has for it.
    assert all(len(serial or "") <= 20 for serial in serials)


def topology(vcpus: int, **properties: str) -> tuple[int, int, int]:
    found = Hardware.wanted_by(properties).topology
    assert found is not None
    return found.fit(vcpus)


def test_processors_are_arranged_as_nova_does_it() -> None:
    assert topology(4, hw_cpu_sockets="1") == (1, 4, 1)
    assert topology(4, hw_cpu_cores="2") == (2, 2, 1)
    assert topology(8, hw_cpu_sockets="2", hw_cpu_cores="2", hw_cpu_threads="2") == (2, 2, 2)
    # A wish that does not divide is met as far as it goes, a limit is kept.
    assert topology(2, hw_cpu_cores="4") == (2, 1, 1)
    assert topology(8, hw_cpu_max_sockets="2") == (2, 4, 1)
    assert topology(8, hw_cpu_max_sockets="2", hw_cpu_max_cores="2") == (2, 2, 2)
    with pytest.raises(ImageUnacceptable, match="leave no room for the flavor's 8 processors"):
        topology(8, hw_cpu_max_sockets="2", hw_cpu_max_cores="2", hw_cpu_max_threads="1")


@given(st.integers(1, 512), st.tuples(*[st.none() | st.integers(1, 16)] * 3))
def test_processors_always_multiply_to_the_flavors(
    vcpus: int, preferred: tuple[int | None, int | None, int | None]
) -> None:
    sockets, cores, threads = Topology(preferred=preferred, most=(None, None, None)).fit(vcpus)
    assert sockets * cores * threads == vcpus


@pytest.mark.parametrize(
    ("text", "kib"),
    [("small", None), ("any", None), ("4", None), ("large", 0), ("2048", 2048), ("1GB", 1 << 20)],
)
def test_size_of_pages_is_read_as_nova_reads_it(text: str, kib: int | None) -> None:
    assert Hardware.wanted_by({"hw_mem_page_size": text}).huge_pages_kib == kib


def test_tpm_is_the_one_nova_would_give_it() -> None:
    def tpm(**properties: str) -> tuple[str | None, str]:
        hardware = Hardware.wanted_by(properties)
        return hardware.tpm_model, hardware.tpm_version

    assert tpm()[0] is None
    assert tpm(hw_tpm_version="2.0") == ("tpm-tis", "2.0")
    assert tpm(hw_tpm_version="1.2") == ("tpm-tis", "1.2")
    assert tpm(hw_tpm_version="2.0", hw_tpm_model="tpm-crb") == ("tpm-crb", "2.0")
    assert tpm(hw_tpm_model="tpm-crb") == ("tpm-crb", "2.0")


def test_tablet_and_keyboard_are_on_the_bus_the_image_names() -> None:
    assert Hardware.wanted_by({"hw_pointer_model": "usbtablet"}).input_bus is InputBus.USB
    assert Hardware.wanted_by({"hw_pointer_model": "ps2mouse"}).input_bus is None
    both = {"hw_pointer_model": "usbtablet", "hw_input_bus": "virtio"}
    assert Hardware.wanted_by(both).input_bus is InputBus.VIRTIO


def test_what_the_host_lacks_is_refused_unless_it_is_optional() -> None:
    uefi = {"hw_firmware_type": "uefi"}
    required = Hardware.wanted_by({**uefi, "os_secure_boot": "required"})
    optional = Hardware.wanted_by({**uefi, "os_secure_boot": "optional"})
    tpm = Hardware.wanted_by({"hw_tpm_version": "2.0"})
    assert required.asks_host
    assert optional.asks_host
    assert tpm.asks_host
    assert Hardware.wanted_by(uefi).asks_host
    assert Hardware.wanted_by({"hw_machine_type": "pc-q35-7.2"}).asks_host
    assert not Hardware.wanted_by({"hw_machine_type": "pc"}).asks_host
    assert not Hardware.wanted_by({}).asks_host
    assert required.on(uefi=True, secure_boot=True, tpm=False) == required
    assert optional.on(uefi=True, secure_boot=True, tpm=False) == required
    assert optional.on(uefi=True, secure_boot=False, tpm=False) == Hardware.wanted_by(uefi)
    assert tpm.on(uefi=False, secure_boot=False, tpm=True) == tpm
    with pytest.raises(ImageUnacceptable, match=r"hw_firmware_type .*install ovmf"):
        Hardware.wanted_by(uefi).on(uefi=False, secure_boot=False, tpm=True)
    with pytest.raises(ImageUnacceptable, match=r"os_secure_boot .*install ovmf"):
        required.on(uefi=True, secure_boot=False, tpm=True)
    with pytest.raises(ImageUnacceptable, match=r"hw_tpm_model .*install swtpm"):
        tpm.on(uefi=True, secure_boot=True, tpm=False)


def test_disks_can_be_made_for_a_machine_while_libvirt_is_away(tmp_path: Path) -> None:
    away = Hypervisor(f"qemu:///system?socket={tmp_path}/sock", virt_type="qemu")
    for wishes in ({"hw_firmware_type": "uefi"}, {"hw_machine_type": "pc-q35-7.2"}):
        assert on_host(wishes, away) == Hardware.wanted_by(wishes)
    for wishes in (
        {"hw_tpm_version": "2.0"},
        {"hw_firmware_type": "uefi", "os_secure_boot": "optional"},
    ):
        with pytest.raises(HypervisorError):
            on_host(wishes, away)


class Without(Hypervisor):
    """A host whose QEMU knows one machine alone, and has no firmware."""

    def offers(self, machine: str) -> HostOffers:
        return HostOffers(machine=machine == "pc-q35-7.2", uefi=False, secure_boot=False, tpm=True)


def test_machine_and_firmware_that_the_host_does_not_have_are_refused() -> None:
    host = Without("test:///default", virt_type="test")
    on_host({"hw_machine_type": "pc-q35-7.2"}, host)
    on_host({"hw_machine_type": "pc"}, host)
    with pytest.raises(ImageUnacceptable, match=r"hw_machine_type .* has no such machine"):
        on_host({"hw_machine_type": "pc-q35-99.0"}, host)
    with pytest.raises(ImageUnacceptable, match=r"hw_firmware_type .*install ovmf"):
        on_host({"hw_machine_type": "pc-q35-7.2", "hw_firmware_type": "uefi"}, host)


def test_disks_that_are_reassigned_get_the_places_they_would_have_had_at_first() -> None:
    config_drive = dataclasses.replace(
        disk(Role.CONFIG_DRIVE, device="cdrom"), guest_format="iso9660", read_only=True
    )
    disks = (disk(Role.ROOT), disk(Role.SWAP), config_drive)
    wishes = [Hardware.wanted_by({"hw_disk_bus": bus}) for bus in ("virtio", "sata", "ide", "scsi")]
    for before in wishes:
        for after in wishes:
            known = assign_devices(disks, before, UUID)
            assert reassign_devices(known, after, UUID) == assign_devices(disks, after, UUID)


@pytest.mark.parametrize(
    ("before", "after", "keeps"),
    [
        ({}, {"hw_firmware_type": "uefi"}, False),
        ({"hw_firmware_type": "uefi"}, {"hw_firmware_type": "uefi", "hw_disk_bus": "scsi"}, True),
        ({"hw_firmware_type": "uefi"}, {}, False),
        (
            {"hw_firmware_type": "uefi"},
            {"hw_firmware_type": "uefi", "os_secure_boot": "required"},
            False,
        ),
        ({"hw_tpm_version": "2.0"}, {"hw_tpm_version": "1.2"}, False),
        ({"hw_tpm_version": "2.0"}, {"hw_tpm_version": "2.0", "os_type": "windows"}, True),
    ],
)
def test_what_firmware_and_tpm_have_kept_is_for_the_same_ones_alone(
    before: dict[str, str], after: dict[str, str], keeps: bool
) -> None:
    had, has = Hardware.wanted_by(before).nonvolatile, Hardware.wanted_by(after).nonvolatile
    assert (had is not None and had == has) is keeps
