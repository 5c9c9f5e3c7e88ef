"""The XML of a domain: golden files for whole domains, single rules for templates.

`BOOTWRIGHT_WRITE_GOLDEN=1 pytest tests/test_domain_xml.py` writes the golden
files anew; read the difference before you commit it.
"""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from agent.devices import assign_devices
from agent.disk import Disk, DiskType, Link, RbdAccess
from agent.domain_xml import NAMESPACE, DomainSpec, build, fill_template
from agent.errors import InvalidJob
from agent.hardware import Hardware
from agent.job import ImagesType, Network
from agent.report import Role

GOLDEN = Path(__file__).parent / "golden"
UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
DIRECTORY = Path("/var/lib/bootwright/instances") / UUID
BASE = DIRECTORY.parent / "_base/0d5e6b61602d758984b3bf038267614d6016eb2a"
GIB = 1 << 30

OVERLAY = Disk(
    role=Role.ROOT,
    backend=ImagesType.QCOW2,
    path=DIRECTORY / "disk",
    format="qcow2",
    virtual_size=20 * GIB,
    backing_chain=(Link(path=BASE, format="raw"),),
)
FLAT = Disk(
    role=Role.ROOT,
    backend=ImagesType.RAW,
    path=DIRECTORY / "disk",
    format="raw",
    virtual_size=20 * GIB,
)
EPHEMERAL = Disk(
    role=Role.EPHEMERAL,
    backend=ImagesType.RAW,
    path=DIRECTORY / "disk.eph0",
    format="raw",
    virtual_size=10 * GIB,
)
SWAP = Disk(
    role=Role.SWAP,
    backend=ImagesType.RAW,
    path=DIRECTORY / "disk.swap",
    format="raw",
    virtual_size=GIB,
)
CONFIG_DRIVE = Disk(
    role=Role.CONFIG_DRIVE,
    backend=ImagesType.RAW,
    device="cdrom",
    path=DIRECTORY / "disk.config",
    format="raw",
    virtual_size=1 << 20,
    read_only=True,
)
KERNEL = Disk(
    role=Role.KERNEL,
    backend=ImagesType.RAW,
    path=DIRECTORY / "kernel",
    format="raw",
    virtual_size=1 << 23,
)


def domain_spec(*disks: Disk, properties: dict[str, str] | None = None) -> DomainSpec:
    hardware = Hardware.wanted_by(properties or {})
    return DomainSpec(
        uuid=UUID,
        name="web-1",
        job_id="7f0c6d5e-0f38-4cc5-9d39-4a4c4b9d1d2a",
        image_id="fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0",
        image_digest="sha512:cafe",
        virt_type="kvm",
        vcpus=2,
        ram_mib=2048,
        disks=assign_devices(disks or (OVERLAY,), hardware, UUID),
        hardware=hardware,
        console_log=DIRECTORY / "console.log",
        cache_modes=dict.fromkeys(DiskType, "none"),
        discard="unmap",
    )


NETWORKS = (
    Network(network="default", mac="52:54:00:12:34:56"),
    Network(bridge="br0", mac="52:54:00:12:34:57"),
)

TEMPLATE = """<?xml version="1.0" encoding="utf-8"?>
<domain type="qemu">
  <!-- ours -->
  <memory unit="GiB">4</memory>
  <os><type machine="pc">hvm</type></os>
  <devices>
    <disk type="file">
      <driver name="qemu" io="threads" cache="unsafe"/>
      <target dev="vda"/>
      <iotune><total_iops_sec>1000</total_iops_sec></iotune>
    </disk>
    <disk type="block" device="disk">
      <source dev="/dev/mapper/data"/>
      <target dev="vdx" bus="virtio"/>
    </disk>
    <video><model type="virtio"/></video>
  </devices>
</domain>
"""

DOMAINS = {
    "overlay": build(dataclasses.replace(domain_spec(), networks=NETWORKS)),
    "all_roles": build(domain_spec(OVERLAY, EPHEMERAL, SWAP, CONFIG_DRIVE)),
    "kernel": build(
        dataclasses.replace(
            domain_spec(KERNEL, FLAT),
            kernel=DIRECTORY / "kernel",
            ramdisk=DIRECTORY / "ramdisk",
            virt_type="qemu",
            image_digest=None,
        )
    ),
    "scsi_uefi": build(
        domain_spec(
            OVERLAY,
            EPHEMERAL,
            CONFIG_DRIVE,
            properties={"hw_disk_bus": "scsi", "hw_firmware_type": "uefi"},
        )
    ),
    "iso_on_pc": build(
        domain_spec(
            dataclasses.replace(FLAT, device="cdrom"),
            EPHEMERAL,
            properties={"hw_machine_type": "pc", "hw_vif_model": "e1000"},
        )
    ),
    "block": build(
        domain_spec(
            dataclasses.replace(
                FLAT,
                backend=ImagesType.LVM,
                type=DiskType.BLOCK,
                path=Path("/dev/vg", f"{UUID}_disk"),
            )
        )
    ),
    "network": build(
        dataclasses.replace(
            domain_spec(
                dataclasses.replace(
                    FLAT,
                    backend=ImagesType.RBD,
                    type=DiskType.NETWORK,
                    path=Path(f"vms/{UUID}_disk"),
                )
            ),
            rbd=RbdAccess(
                monitors=(("192.0.2.1", 6789), ("2001:db8::1", 6789)),
                user="bootwright",
                secret_uuid="5ba0edde-461d-411f-95b4-60d89a0516f6",
            ),
        )
    ),
    "thirty_scsi_disks": build(
        domain_spec(
            OVERLAY,
            *(
                dataclasses.replace(EPHEMERAL, path=DIRECTORY / f"disk.eph{number}")
                for number in range(29)
            ),
            properties={"hw_disk_bus": "scsi"},
        )
    ),
    "limits": build(
        dataclasses.replace(
            domain_spec(OVERLAY, SWAP),
            iotune={"read_bytes_sec": 10 << 20, "total_iops_sec": 500},
        )
    ),
    "secure_boot": build(
        domain_spec(
            properties={
                "hw_firmware_type": "uefi",
                "os_secure_boot": "required",
                "hw_machine_type": "q35",
            }
        )
    ),
    "windows": build(
        domain_spec(
            properties={
                "os_type": "windows",
                "hw_disk_bus": "sata",
                "hw_cdrom_bus": "sata",
                "hw_vif_model": "e1000e",
                "hw_video_model": "vga",
                "hw_pointer_model": "usbtablet",
                "hw_tpm_version": "2.0",
                "hw_time_hpet": "true",
                "img_hide_hypervisor_id": "true",
            }
        )
    ),
    "every_device": build(
        dataclasses.replace(
            domain_spec(
                properties={
                    "hw_qemu_guest_agent": "yes",
                    "hw_boot_menu": "true",
                    "hw_watchdog_action": "reset",
                    "hw_serial_port_count": "2",
                    "hw_scsi_model": "virtio-scsi",
                    "hw_disk_bus": "scsi",
                    "hw_vif_multiqueue_enabled": "true",
                    "hw_cpu_cores": "2",
                    "hw_pmu": "false",
                    "hw_firmware_type": "uefi",
                    "hw_firmware_stateless": "true",
                    "hw_video_model": "qxl",
                    "hw_video_ram": "64",
                    "hw_input_bus": "virtio",
                    "hw_mem_page_size": "2MB",
                }
            ),
            networks=NETWORKS,
        )
    ),
    "template": fill_template(TEMPLATE, domain_spec(OVERLAY, EPHEMERAL)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_is_the_golden_one(name: str) -> None:
    golden = GOLDEN / f"{name}.xml"
    if os.environ.get("BOOTWRIGHT_WRITE_GOLDEN"):
        golden.write_text(DOMAINS[name])
    assert DOMAINS[name] == golden.read_text()


@pytest.mark.parametrize("name", DOMAINS)
def test_libvirts_schema_accepts_the_domain(name: str, tmp_path: Path) -> None:
    for tool, package in (("virt-xml-validate", "libvirt-clients"), ("xmllint", "libxml2-utils")):
        if shutil.which(tool) is None:
            refuse = pytest.fail if os.environ.get("CI") else pytest.skip
            refuse(f"{tool} is missing (Debian package {package})")
    path = tmp_path / "domain.xml"
    path.write_text(DOMAINS[name])
    result = subprocess.run(
        ["virt-xml-validate", path, "domain"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def find(xml: str, path: str) -> list[etree._Element]:
    found = etree.fromstring(xml).xpath(path, namespaces={"bootwright": NAMESPACE})
    assert isinstance(found, list)
    return [element for element in found if isinstance(element, etree._Element)]


def test_chain_of_a_disk_is_written_to_its_end() -> None:
    chain = tuple(Link(path=Path(f"/b/{number}"), format="qcow2") for number in range(3))
    xml = build(domain_spec(dataclasses.replace(OVERLAY, backing_chain=chain)))
    links = find(xml, "//disk//backingStore/source")
    assert [link.get("file") for link in links] == ["/b/0", "/b/1", "/b/2"]
    assert find(xml, "//disk/backingStore/backingStore/backingStore/backingStore[not(*)]")


def test_every_disk_ends_its_chain_so_that_libvirt_never_looks() -> None:
    for xml in DOMAINS.values():
        own = find(
            xml, f"//disk[contains(source/@*, '{UUID}') or contains(source/@name, '{UUID}')]"
        )
        assert own
        assert all(disk.findall(".//backingStore")[-1].find("*") is None for disk in own)
        assert all(disk.find("driver") is not None for disk in own)


def test_serial_number_of_a_disk_is_passed_on() -> None:
    xml = build(domain_spec(OVERLAY))
    assert [serial.text for serial in find(xml, "//disk/serial")] == ["0b46a3c625a5-root"]


def test_command_line_of_the_job_replaces_the_usual_one() -> None:
    spec = dataclasses.replace(
        domain_spec(KERNEL, OVERLAY), kernel=KERNEL.path, command_line="root=LABEL=/ & <quiet>"
    )
    assert [line.text for line in find(build(spec), "//cmdline")] == ["root=LABEL=/ & <quiet>"]


@pytest.mark.parametrize(("bus", "name"), [("virtio", "vda"), ("ide", "sda"), ("scsi", "sda")])
def test_usual_command_line_names_the_root_disk_as_the_guest_does(bus: str, name: str) -> None:
    spec = domain_spec(KERNEL, OVERLAY, properties={"hw_disk_bus": bus})
    spec = dataclasses.replace(spec, kernel=KERNEL.path)
    usual = f"root=/dev/{name} console=ttyS0"
    assert [line.text for line in find(build(spec), "//cmdline")] == [usual]
    emulated = find(build(dataclasses.replace(spec, virt_type="qemu")), "//cmdline")
    assert [line.text for line in emulated] == [f"{usual} no_timer_check"]


@pytest.mark.parametrize("text", ["a\x00b", "a\x1bb", "a\ud800"])
def test_command_line_that_xml_cannot_hold_is_the_jobs_fault(text: str) -> None:
    spec = dataclasses.replace(domain_spec(KERNEL, OVERLAY), kernel=KERNEL.path, command_line=text)
    with pytest.raises(InvalidJob, match="<cmdline>"):
        build(spec)


def test_template_keeps_what_it_says() -> None:
    xml = DOMAINS["template"]
    assert "<!-- ours -->" in xml
    assert find(xml, "/domain[@type='qemu']/memory[@unit='GiB' and .='4']")
    assert find(xml, "//disk[target/@dev='vda']/driver[@cache='unsafe' and @io='threads']")
    assert find(xml, "//disk[target/@dev='vda']/iotune")
    assert find(xml, "//disk[target/@dev='vdx']/source[@dev='/dev/mapper/data']")
    assert find(xml, "//video")


def test_template_gets_what_it_leaves_out() -> None:
    xml = DOMAINS["template"]
    assert [name.text for name in find(xml, "/domain/name")] == ["web-1"]
    assert [uuid.text for uuid in find(xml, "/domain/uuid")] == [UUID]
    assert find(xml, f"//disk[target/@dev='vda']/source[@file='{DIRECTORY}/disk']")
    assert find(xml, f"//disk[target/@dev='vdb']/source[@file='{DIRECTORY}/disk.eph0']")
    assert find(xml, f"//disk[target/@dev='vda']/backingStore/source[@file='{BASE}']")
    assert find(xml, "//serial")
    assert find(xml, "//metadata/bootwright:instance/bootwright:job")


def test_template_that_is_filled_twice_has_one_mark_of_ours() -> None:
    xml = fill_template(
        f"<domain><metadata><b:instance xmlns:b='{NAMESPACE}'/></metadata></domain>",
        domain_spec(),
    )
    assert len(find(xml, "//bootwright:instance")) == 1


@pytest.mark.parametrize(
    "template",
    [
        "<domain><os><boot dev='hd'/></os></domain>",
        "<domain><devices><interface type='user'><boot order='1'/></interface></devices></domain>",
    ],
)
def test_template_with_an_order_of_boot_keeps_to_it(template: str) -> None:
    xml = fill_template(template, domain_spec(OVERLAY))
    assert not find(xml, "//disk/boot")
    assert len(find(xml, "//boot")) == 1
    assert find(fill_template("<domain/>", domain_spec(OVERLAY)), "//disk/boot")


def test_template_has_network_cards_or_the_job_has() -> None:
    template = "<domain><devices>\n<interface type='user'/></devices></domain>"
    spec = dataclasses.replace(domain_spec(), networks=NETWORKS)
    assert len(find(fill_template(template, domain_spec()), "//interface")) == 1
    assert len(find(fill_template("<domain/>", spec), "//interface")) == 2
    with pytest.raises(InvalidJob, match=r"line 2: an <interface> .* networks of its own"):
        fill_template(template, spec)


def test_limits_are_on_every_disk_that_has_none_of_its_own() -> None:
    rescue = dataclasses.replace(EPHEMERAL, role=Role.RESCUE, path=DIRECTORY / "disk.rescue")
    spec = dataclasses.replace(domain_spec(OVERLAY, SWAP, rescue), iotune={"read_iops_sec": 7})
    assert len(find(build(spec), "//disk/iotune[read_iops_sec='7']")) == 3
    filled = find(fill_template(TEMPLATE, spec), "//disk[iotune/total_iops_sec]")
    assert [len(disk.findall("iotune/*")) for disk in filled] == [1]


def test_scsi_disk_goes_where_no_other_one_is() -> None:
    theirs = (
        "<disk><source file='/x'/><target dev='{}' bus='{}'/>"
        "<address type='drive' controller='{}' unit='{}'/></disk>"
    )
    places = [("sdx", "scsi", 0, 1), ("sdy", "sata", 0, 0), ("sdz", "scsi", 1, 2)]
    disks = "".join(theirs.format(*place) for place in places)
    spec = domain_spec(OVERLAY, EPHEMERAL, SWAP, properties={"hw_disk_bus": "scsi"})
    xml = fill_template(f"<domain><devices>{disks}</devices></domain>", spec)
    units = find(xml, f"//disk[contains(source/@file, '{UUID}')]/address[@controller='0']")
    assert [unit.get("unit") for unit in units] == ["0", "2", "3"]


def test_scsi_controller_of_a_template_without_a_place_is_told() -> None:
    spec = domain_spec(OVERLAY, *[EPHEMERAL] * 7, properties={"hw_disk_bus": "scsi"})
    template = "<domain><devices><controller type='scsi' model='{}'/></devices></domain>"
    fill_template(template.format("virtio-scsi"), spec)
    with pytest.raises(InvalidJob, match="lsilogic, has no place left"):
        fill_template(template.format("lsilogic"), spec)


def test_template_without_a_machine_gets_the_firmware_that_goes_with_it() -> None:
    spec = domain_spec(properties={"hw_firmware_type": "uefi"})
    filled = fill_template("<domain/>", spec)
    assert find(filled, "/domain/os[@firmware='efi']/firmware/feature[@name='secure-boot']")
    own = fill_template("<domain><os><type machine='pc'>hvm</type></os></domain>", spec)
    assert not find(own, "/domain/os[@firmware]")


def test_several_queues_are_for_cards_that_have_them() -> None:
    wanted = {"hw_vif_multiqueue_enabled": "true"}
    spec = dataclasses.replace(domain_spec(properties=wanted), networks=NETWORKS)
    assert len(find(build(spec), "//interface/driver[@queues='2']")) == 2
    for other in (
        dataclasses.replace(spec, vcpus=1),
        dataclasses.replace(spec, hardware=Hardware.wanted_by({**wanted, "hw_vif_model": "e1000"})),
    ):
        assert not find(build(other), "//interface/driver")


DISK = "<domain>\n<devices>\n<disk>\n{}\n</disk></devices></domain>"


@pytest.mark.parametrize(
    ("template", "line", "reason"),
    [
        ("", 1, ""),
        ("<domain>\n<devices>\n</domain>", 3, "mismatch"),
        ("<domain>\n&nbsp;</domain>", 2, "nbsp"),
        ("\n<network/>", 2, "not a <domain>"),
        ("<domain>\n<name>other</name></domain>", 2, "web-1"),
        (f"<domain>\n\n<uuid>{UUID[::-1]}</uuid></domain>", 3, UUID),
        (DISK.format("<source file='/x'/><target dev='vda'/>"), 4, "<source>"),
        (DISK.format("<backingStore/><target dev='vda'/>"), 4, "<backingStore>"),
        (DISK.format("<target dev='vda' bus='sata'/>"), 4, "'virtio'"),
        (DISK.format("</disk><disk device='cdrom'><target dev='vda'/>"), 4, "is a disk"),
        (DISK.format("<target dev='vdq'/></disk>\n<disk><target dev='vdq'/>"), 5, "two disks"),
        ("<domain><os>\n<kernel>/k</kernel></os></domain>", 2, "<kernel>"),
        (
            '<?xml version="1.0"?>\n<!DOCTYPE d [<!ENTITY e SYSTEM "/etc/passwd">]><domain/>',
            2,
            "<!DOCTYPE",
        ),
        ("<domain><name>web\ud800</name></domain>", 1, ""),
    ],
)
def test_template_that_will_not_do_is_refused_with_its_line(
    template: str, line: int, reason: str
) -> None:
    spec = dataclasses.replace(domain_spec(KERNEL, OVERLAY), kernel=KERNEL.path)
    with pytest.raises(InvalidJob) as caught:
        fill_template(template, spec)
    assert f"line {line}: " in caught.value.message
    assert reason in caught.value.message


def test_encoding_that_a_template_declares_does_not_hide_a_document_type() -> None:
    hidden = "+ADwAIQ-DOCTYPE d+AD4-"
    with pytest.raises(InvalidJob):
        fill_template(f"<?xml version='1.0' encoding='utf-7'?>{hidden}<domain/>", domain_spec())


def test_template_too_large_is_refused_unread() -> None:
    with pytest.raises(InvalidJob, match="1048576 are allowed"):
        fill_template("<" * (1 << 20) + "!", domain_spec())


def test_template_nested_too_deep_is_refused() -> None:
    with pytest.raises(InvalidJob, match="line 1"):
        fill_template("<domain>" * 10_000 + "</domain>" * 10_000, domain_spec())


@pytest.mark.parametrize(
    ("native", "cache", "io"),
    [
        (True, "none", "native"),
        (True, "directsync", "native"),
        (True, "writeback", None),  # QEMU refuses it
        (False, "none", None),
    ],
)
def test_input_and_output_of_a_whole_volume_is_native(
    native: bool, cache: str, io: str | None
) -> None:
    volume = dataclasses.replace(
        FLAT, type=DiskType.BLOCK, path=Path("/dev/vg/x_disk"), native_io=native
    )
    spec = dataclasses.replace(domain_spec(volume), cache_modes=dict.fromkeys(DiskType, cache))
    driver = etree.fromstring(build(spec)).find("devices/disk/driver")
    assert driver is not None
    assert driver.get("io") == io
