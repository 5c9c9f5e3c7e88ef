"""The hypervisor and the domains of domain_xml against a real libvirtd and QEMU."""

import contextlib
import dataclasses
import os
import pwd
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from agent import qcow2
from agent.devices import assign_devices
from agent.disk import Disk, DiskType, Link
from agent.domain_xml import DomainSpec, build
from agent.errors import HypervisorError, InstanceExists, InvalidJob
from agent.hardware import Hardware
from agent.hypervisor import HostOffers, Hypervisor
from agent.job import ImagesType
from agent.report import Role
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd
from tests.waiting import AT_ONCE_S, until

MIB = 1 << 20


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Short and open to everybody on the way, which pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def libvirtd(root: Path) -> Iterator[PrivateLibvirtd]:
    with PrivateLibvirtd(root / "v") as libvirtd:
        yield libvirtd


@pytest.fixture
def hypervisor(libvirtd: PrivateLibvirtd) -> Iterator[Hypervisor]:
    hypervisor = Hypervisor(libvirtd.uri, virt_type="qemu")
    yield hypervisor
    for domain_uuid in libvirtd.domains():
        hypervisor.destroy(domain_uuid)
        hypervisor.undefine(domain_uuid)
    hypervisor.close()


def new_spec(root: Path, properties: dict[str, str] | None = None) -> DomainSpec:
    """A guest of which all four kinds of disk exist, and none has anything to boot."""
    domain_uuid = str(uuid.uuid4())
    directory = root / domain_uuid
    directory.mkdir(mode=0o711)
    base = directory / "base"
    sizes = {"base": MIB, "disk.eph0": MIB, "disk.config": MIB, "console.log": 0}
    for name, size in sizes.items():
        (directory / name).touch(mode=0o640)
        os.truncate(directory / name, size)
    qcow2.create_overlay(
        directory / "disk", virtual_size=4 * MIB, backing_file=base, backing_format="raw"
    )
    hardware = Hardware.wanted_by(properties or {})
    disks = (
        Disk(
            role=Role.ROOT,
            backend=ImagesType.QCOW2,
            path=directory / "disk",
            format="qcow2",
            virtual_size=4 * MIB,
            backing_chain=(Link(path=base, format="raw"),),
        ),
        *(
            Disk(
                device="cdrom" if fixed else "disk",
                role=role,
                backend=ImagesType.RAW,
                path=directory / name,
                format="raw",
                virtual_size=MIB,
                read_only=fixed,
            )
            for role, name, fixed in (
                (Role.EPHEMERAL, "disk.eph0", False),
                (Role.CONFIG_DRIVE, "disk.config", True),
            )
        ),
    )
    return DomainSpec(
        uuid=domain_uuid,
        name=f"guest-{domain_uuid[:8]}",
        job_id=str(uuid.uuid4()),
        image_id="image",
        image_digest=None,
        virt_type="qemu",
        vcpus=1,
        ram_mib=256,
        disks=assign_devices(disks, hardware, domain_uuid),
        hardware=hardware,
        console_log=directory / "console.log",
        cache_modes=dict.fromkeys(DiskType, "writeback"),
        discard="unmap",
    )


MORE = Disk(
    role=Role.EPHEMERAL,
    backend=ImagesType.RAW,
    path=Path("/"),
    format="raw",
    virtual_size=MIB,
)
GOLDEN = Path(__file__).parents[1] / "tests/golden"
GOLDEN_UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"hw_disk_bus": "scsi"},
        {"hw_disk_bus": "sata", "hw_tpm_version": "1.2"},
        {"hw_disk_bus": "ide"},
        {"hw_machine_type": "pc"},
        {"hw_cdrom_bus": "usb"},
    ],
    ids=str,
)
def test_qemu_runs_every_machine_an_image_may_ask_for(
    hypervisor: Hypervisor, root: Path, properties: dict[str, str]
) -> None:
    spec = new_spec(root, properties)
    hypervisor.define(build(spec))
    hypervisor.start(spec.uuid)
    hypervisor.start(spec.uuid)
    assert hypervisor.state(spec.uuid) == "running"
    hypervisor.destroy(spec.uuid)
    hypervisor.destroy(spec.uuid)
    assert hypervisor.state(spec.uuid) == "shut off"
    hypervisor.undefine(spec.uuid)
    assert hypervisor.state(spec.uuid) is None


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.xml")), ids=lambda path: path.stem)
def test_libvirt_defines_every_golden_domain(hypervisor: Hypervisor, golden: Path) -> None:
    domain_uuid = str(uuid.uuid4())
    xml = golden.read_text().replace(GOLDEN_UUID, domain_uuid).replace('type="kvm"', 'type="qemu"')
    # There is no host processor for it to be like.
    xml = xml.replace('mode="host-model"', 'mode="maximum"')
    hypervisor.define(xml)
    try:
        assert hypervisor.state(domain_uuid) == "shut off"
    finally:
        hypervisor.undefine(domain_uuid)


@pytest.mark.parametrize(
    ("secure_boot", "said"), [("required", "Access Denied"), ("disabled", "BdsDxe: starting")]
)
def test_firmware_with_secure_boot_runs_no_loader_that_is_not_signed(
    hypervisor: Hypervisor, root: Path, guest: Guest, secure_boot: str, said: str
) -> None:
    offers = hypervisor.offers("q35")
    assert offers == HostOffers(uefi=True, secure_boot=True, tpm=True)
    assert not hypervisor.offers("pc").secure_boot
    assert not hypervisor.offers("pc-i440fx-0.1").machine
    wants = {"hw_firmware_type": "uefi", "os_secure_boot": secure_boot}
    if secure_boot == "required":  # and not always: measuring the kernel takes 10 s emulated
        wants["hw_tpm_version"] = "2.0"
    spec = new_spec(root, wants)
    # A kernel is a loader as well. Debian has signed this one, but no key of the firmware has.
    esp = spec.console_log.with_name("esp")
    esp.touch(mode=0o640)
    os.truncate(esp, 32 * MIB)
    subprocess.run(["/usr/sbin/mkfs.vfat", esp], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"], check=True)
    loader = "::/EFI/BOOT/BOOTX64.EFI"
    subprocess.run(["mcopy", "-i", esp, guest.kernel, loader], check=True)
    disk = dataclasses.replace(
        spec.disks[0], path=esp, format="raw", virtual_size=32 * MIB, backing_chain=()
    )
    hypervisor.define(build(dataclasses.replace(spec, disks=(disk,))))
    hypervisor.start(spec.uuid)
    running = hypervisor.xml(spec.uuid, live=True)
    assert ("secure='yes'" in running) is (secure_boot == "required")
    assert ("<tpm model='tpm-tis'>" in running) is (secure_boot == "required")
    deadline = time.monotonic() + 90
    while said not in (console := spec.console_log.read_text(errors="replace")):
        assert time.monotonic() < deadline, console
        time.sleep(0.1)


@pytest.mark.parametrize("bus", ["virtio", "scsi", "sata"])
def test_more_disks_than_the_alphabet_has_letters_run(
    hypervisor: Hypervisor, root: Path, bus: str
) -> None:
    spec = new_spec(root, {"hw_disk_bus": bus})
    ephemerals = []
    for number in range(30):
        path = spec.console_log.with_name(f"disk.more{number}")
        path.touch(mode=0o640)
        os.truncate(path, MIB)
        ephemerals.append(dataclasses.replace(MORE, path=path))
    disks = assign_devices((*spec.disks, *ephemerals), spec.hardware, spec.uuid)
    hypervisor.define(build(dataclasses.replace(spec, disks=disks)))
    hypervisor.start(spec.uuid)
    targets = etree.fromstring(hypervisor.xml(spec.uuid, live=True)).findall("devices/disk/target")
    assert [target.get("dev") for target in targets] == [disk.device_name for disk in disks]


def test_uefi_guest_is_undefined_with_its_nvram(
    hypervisor: Hypervisor, root: Path, libvirtd: PrivateLibvirtd
) -> None:
    if not Path("/usr/share/qemu/firmware").is_dir():
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse("there is no UEFI firmware (Debian package ovmf)")
    spec = new_spec(root, {"hw_firmware_type": "uefi"})
    hypervisor.define(build(spec))
    hypervisor.start(spec.uuid)
    nvram = root / "v/lib/qemu/nvram"
    assert [path.name for path in nvram.iterdir()] == [f"{spec.name}_VARS.fd"]
    hypervisor.destroy(spec.uuid)
    hypervisor.undefine(spec.uuid)
    assert list(nvram.iterdir()) == []


def test_group_of_qemu_may_read_the_console_of_a_running_guest(
    hypervisor: Hypervisor, root: Path
) -> None:
    spec = new_spec(root)
    hypervisor.define(build(spec))
    hypervisor.start(spec.uuid)
    # SeaBIOS says nothing on a serial port; what counts is who may look.
    assert spec.console_log.stat().st_mode & 0o777 == 0o640


def test_connection_is_opened_again_after_libvirtd_was_restarted(
    hypervisor: Hypervisor, root: Path, libvirtd: PrivateLibvirtd
) -> None:
    spec = new_spec(root)
    hypervisor.define(build(spec))
    hypervisor.start(spec.uuid)
    libvirtd.stop()
    try:
        for _ in range(2):
            with pytest.raises(HypervisorError) as caught:
                hypervisor.state(spec.uuid)
            assert libvirtd.uri in caught.value.message
            assert "systemctl status libvirtd" in caught.value.hint
    finally:
        libvirtd.start()
    assert hypervisor.state(spec.uuid) == "running"


def test_restart_between_two_calls_is_not_even_noticed(
    hypervisor: Hypervisor, libvirtd: PrivateLibvirtd
) -> None:
    hypervisor.version()
    libvirtd.stop()
    libvirtd.start()
    assert "QEMU" in hypervisor.version()


def test_libvirtd_that_hangs_costs_the_limit_and_no_more(
    root: Path, libvirtd: PrivateLibvirtd
) -> None:
    hypervisor = Hypervisor(libvirtd.uri, virt_type="qemu", look_limit_s=0.5)

    def answers() -> bool:
        with contextlib.suppress(HypervisorError):  # a busy libvirtd may take as long
            return "QEMU" in hypervisor.version()
        return False

    until(answers)
    pid = int((root / "v/libvirtd.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(HypervisorError, match="no answer"):
                hypervisor.version()
        assert time.monotonic() - began < AT_ONCE_S
    finally:
        os.kill(pid, signal.SIGCONT)
    until(answers)
    hypervisor.close()


def test_foreign_domain_keeps_its_name(hypervisor: Hypervisor, root: Path) -> None:
    spec = new_spec(root)
    hypervisor.define(build(spec))
    hypervisor.define(build(spec))
    with pytest.raises(InstanceExists, match=spec.uuid):
        hypervisor.define(build(dataclasses.replace(spec, uuid=str(uuid.uuid4()))))
    with pytest.raises(InstanceExists, match=spec.name):
        hypervisor.define(build(dataclasses.replace(spec, name="other")))


def test_domain_that_libvirt_cannot_read_is_told_in_its_words(
    hypervisor: Hypervisor, root: Path
) -> None:
    spec = new_spec(root)
    with pytest.raises(HypervisorError, match="unknown clock offset 'moon'"):
        hypervisor.define(build(spec).replace('offset="utc"', 'offset="moon"'))
    with pytest.raises(InvalidJob, match="libvirt does not accept"):
        hypervisor.define(build(spec).replace("<vcpu>1</vcpu>", "<vcpu>few</vcpu>"))


def test_missing_disk_fails_the_start_by_its_name(hypervisor: Hypervisor, root: Path) -> None:
    spec = new_spec(root)
    hypervisor.define(build(spec))
    (root / spec.uuid / "disk").unlink()
    with pytest.raises(HypervisorError, match=f"{spec.uuid}/disk"):
        hypervisor.start(spec.uuid)


def test_user_outside_the_group_is_told_about_it(libvirtd: PrivateLibvirtd) -> None:
    nobody = pwd.getpwnam("nobody")
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setgroups([])
        os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
        os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)
        try:
            Hypervisor(libvirtd.uri, virt_type="qemu").version()
        except HypervisorError as e:
            os.write(write_end, str(e).encode())
        os._exit(0)
    os.wait()
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8") as answer:
        text = answer.read()
    assert "Permission denied" in text
    assert "group libvirt" in text


def test_several_guests_start_at_once(hypervisor: Hypervisor, root: Path) -> None:
    specs = [new_spec(root) for _ in range(3)]

    def boot(spec: DomainSpec) -> None:
        hypervisor.define(build(spec))
        hypervisor.start(spec.uuid)

    threads = [threading.Thread(target=boot, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {spec.uuid: hypervisor.state(spec.uuid) for spec in specs} == {
        spec.uuid: "running" for spec in specs
    }
