"""An instance is changed: it grows, is rescued by another image, gets a new root disk."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from functional.conftest import Images, boot_files
from functional.harness import guest as guests
from functional.harness.agent import USER, Agent
from functional.harness.console import Seen, wait_ready
from functional.harness.glance import Glance
from functional.harness.guest import CONSOLE_PREFIX, Guest, Variant
from functional.harness.libvirtd import PrivateLibvirtd
from tests.waiting import until

GIB = 1 << 30
NAME = "web-1"


@pytest.fixture(scope="module")
def other(work: Path) -> Variant:
    """A root with other content, of another size."""
    return guests.variant(work, seed="other", extra_mib=8)


@pytest.fixture(scope="module")
def rescue_image(glance: Glance, images: Images, other: Variant) -> str:
    """The same kernel and ramdisk, with the root named by its device: two disks have the label."""
    properties = {
        "kernel_id": images.kernel,
        "ramdisk_id": images.ramdisk,
        "os_command_line": "root=/dev/vdb console=ttyS0 quiet",
    }
    return glance.upload(other.root, disk_format="raw", properties=properties)


def boot(agent: Agent, image_id: str, **fields: object) -> dict[str, Any]:
    result = agent.boot(
        {
            "instance": {"name": NAME},
            "flavor": {"vcpus": 1, "ram": 192, "disk": 1},
            "image": {"id": image_id},
            "networks": [],
            **fields,
        }
    )
    return dict(result)


def console(agent: Agent) -> str:
    return str(agent.run("instance", "console", NAME).stdout)


def ready(agent: Agent, *, boots: int = 1) -> Seen:
    """Return what the guest says when it has got ready for the nth time."""

    def read() -> str:
        text = console(agent)
        begun = text.count(f"{CONSOLE_PREFIX}guest")
        return text if begun == boots else text.replace(f"{CONSOLE_PREFIX}ready", "")

    return wait_ready(read, timeout_s=90)


def roles(agent: Agent) -> dict[str, dict[str, Any]]:
    return {disk["role"]: disk for disk in agent.json("instance", "show", NAME)["disks"]}


def domain(libvirtd: PrivateLibvirtd) -> etree._Element:
    return etree.fromstring(libvirtd.virsh("dumpxml", NAME))


def test_a_running_guest_sees_its_disk_grow_at_once_and_the_rest_at_its_next_start(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    boot(agent, images.root)
    assert ready(agent).disks == {"vda": GIB}

    libvirtd.virsh("blockresize", NAME, "vda", "2G")  # of which the agent knows nothing
    assert "would shrink" in agent.run("instance", "resize", NAME, "--flavor", "2x256x1").stderr
    result = agent.json("instance", "resize", NAME, "--flavor", "2x256x3")

    assert (result["action"], result["status"]) == ("resize", "DONE")
    assert roles(agent)["root"]["virtual_size"] == 3 * GIB
    info = libvirtd.virsh("domblkinfo", NAME, "vda").splitlines()
    assert next(line for line in info if "Capacity" in line).split()[-1] == str(3 * GIB)
    assert domain(libvirtd).findtext("vcpu") == "1"
    libvirtd.virsh("destroy", NAME)
    # Nobody runs on it now, but a guest has: libvirt may have kept it.
    agent.json("instance", "resize", NAME, "--flavor", "2x256x4")
    libvirtd.virsh("start", NAME)
    again = ready(agent, boots=2)
    assert (again.disks, again.bootcount) == ({"vda": 4 * GIB}, 2)
    assert again.filesystem > 3.7 * GIB
    assert domain(libvirtd).findtext("vcpu") == "2"
    assert domain(libvirtd).findtext("memory") == str(256 * 1024)
    # What it runs on then is not the disk it had, and no change may lose what it writes there.
    libvirtd.virsh("snapshot-create-as", NAME, "--disk-only", "--no-metadata", "--name", "one")
    xml = libvirtd.virsh("dumpxml", NAME, "--inactive")
    for change in (["resize", NAME, "--flavor", "1x192x0"], ["rescue", NAME]):
        assert "somebody has made a snapshot" in agent.run("instance", *change).stderr
    assert libvirtd.virsh("dumpxml", NAME, "--inactive") == xml
    base = agent.base(images.root).read_bytes()
    with pytest.raises(RuntimeError, match="Permission denied"):  # that were into the base
        libvirtd.virsh("blockcommit", NAME, "vda", "--active", "--pivot", "--wait")
    assert agent.base(images.root).read_bytes() == base
    libvirtd.virsh("blockcommit", NAME, "vda", "--shallow", "--active", "--pivot", "--wait")
    agent.json("instance", "resize", NAME, "--flavor", "1x192x0")


@pytest.fixture
def ploop_lock() -> None:
    """As etc/bootwright.tmpfiles makes it."""
    lock = Path("/run/lock/ploop/ploop.lck")
    lock.parent.mkdir(exist_ok=True)
    lock.touch(mode=0o660)
    lock.chmod(0o660)
    shutil.chown(lock, "root", USER)


@pytest.mark.usefixtures("ploop_lock")
@pytest.mark.parametrize("images_type", ["qcow2", "raw", "ploop"])
def test_a_disk_at_rest_grows_and_never_shrinks(
    agent: Agent, images: Images, images_type: str
) -> None:
    boot(agent, images.root, action="prepare", images_type=images_type)

    agent.json("instance", "resize", NAME, "--flavor", "1x192x2")
    refused = agent.run("instance", "resize", NAME, "--flavor", "1x192x1")

    root = roles(agent)["root"]
    assert root["virtual_size"] == 2 * GIB
    driver = {"ploop": "parallels"}.get(root["format"], root["format"])
    info = subprocess.run(
        ["qemu-img", "info", "-f", driver, root["path"]], capture_output=True, text=True, check=True
    )
    assert f"({2 * GIB} bytes)" in info.stdout
    assert refused.returncode == 2
    assert f"would shrink to {GIB}" in refused.stderr
    assert "InvalidJob" in refused.stderr


def test_rescue_boots_another_image_with_the_original_disks_and_unrescue_brings_all_back(
    agent: Agent, images: Images, other: Variant, rescue_image: str, libvirtd: PrivateLibvirtd
) -> None:
    uuid = boot(agent, images.root)["instance"]["uuid"]
    first = ready(agent)
    xml = libvirtd.virsh("dumpxml", NAME, "--inactive")

    result = agent.json("instance", "rescue", NAME, "--image", rescue_image)

    assert (result["action"], result["status"]) == ("rescue", "ACTIVE")
    seen = ready(agent, boots=2)
    assert (seen.content_sha256, seen.root_device) == (other.content_sha256, "vdb")
    assert seen.disks["vda"] == GIB
    assert domain(libvirtd).xpath("devices/disk[boot]/target/@dev") == ["vdb"]
    assert uuid in str(agent.json("image", "show", rescue_image)["instances"])
    assert "is being rescued" in agent.run("instance", "rescue", NAME).stderr

    # As a host may leave it that has gone down meanwhile: nobody wants to wake that.
    libvirtd.virsh("managedsave", NAME)
    ended = agent.json("instance", "unrescue", NAME)

    assert (ended["action"], ended["status"]) == ("unrescue", "ACTIVE")
    again = ready(agent, boots=3)
    assert (again.content_sha256, again.bootcount) == (first.content_sha256, 2)
    assert set(again.disks) == {"vda"}
    assert libvirtd.virsh("dumpxml", NAME, "--inactive") == xml
    files = {path.name for path in (agent.instances / uuid).iterdir()}
    assert files == {"console.log", "disk", "instance.json", "kernel", "ramdisk"}
    assert "is not being rescued" in agent.run("instance", "unrescue", NAME).stderr


def test_a_rescue_that_fails_leaves_the_instance_as_it_was(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    boot(agent, images.root)
    pid = libvirtd.qemu_pid(NAME)

    failed = agent.run("instance", "rescue", NAME, "--image", "no-such-image")

    assert "ImageNotFound" in failed.stderr
    assert libvirtd.qemu_pid(NAME) == pid
    assert set(roles(agent)) == {"kernel", "ramdisk", "root"}


def test_an_agent_that_is_killed_in_a_rescue_goes_on_with_it(
    agent: Agent, images: Images, rescue_image: str, libvirtd: PrivateLibvirtd
) -> None:
    boot(agent, images.root)
    ready(agent)
    with libvirtd.frozen("virtlogd"):
        document = ("instance", "rescue", NAME, "--image", rescue_image, "--no-wait")
        job_id = agent.json(*document)["id"]
        until(lambda: libvirtd.is_starting(NAME))
        # What waits for it need not wait to be told to end.
        resize = agent.json("instance", "resize", NAME, "--flavor", "1x192x2", "--no-wait")["id"]
        agent.run("job", "cancel", resize)
        assert agent.json("job", "show", resize)["status"] == "CANCELLED"
        agent.kill()
    agent.start()

    result = agent.json("job", "wait", job_id)

    assert result["status"] == "ACTIVE"
    assert set(roles(agent)) == {
        "kernel", "ramdisk", "root", "rescue", "rescue_kernel", "rescue_ramdisk"
    }  # fmt: skip
    agent.json("instance", "unrescue", NAME)
    assert set(roles(agent)) == {"kernel", "ramdisk", "root"}


def test_rebuild_replaces_the_root_disk_and_keeps_the_others(
    agent: Agent, images: Images, glance: Glance, other: Variant, libvirtd: PrivateLibvirtd
) -> None:
    properties = {
        "kernel_id": images.kernel,
        "ramdisk_id": images.ramdisk,
        "os_command_line": guests.COMMAND_LINE,
    }
    image_id = glance.upload(other.root, disk_format="raw", properties=properties)
    flavor = {"vcpus": 1, "ram": 192, "disk": 1, "ephemeral": [{"size": 1}]}
    before = boot(agent, images.root, flavor=flavor)
    ready(agent)
    ephemeral = Path(next(d["path"] for d in before["disks"] if d["role"] == "ephemeral"))
    inode = ephemeral.stat().st_ino

    result = agent.json("instance", "rebuild", NAME, "--image", image_id)

    assert (result["action"], result["status"]) == ("rebuild", "ACTIVE")
    assert result["domain"]["uuid"] == before["domain"]["uuid"]
    seen = ready(agent, boots=2)
    assert (seen.content_sha256, seen.bootcount) == (other.content_sha256, 1)
    assert seen.disks == {"vda": GIB, "vdb": GIB}
    assert ephemeral.stat().st_ino == inode
    assert agent.json("instance", "show", NAME)["image_id"] == image_id
    link = domain(libvirtd).find("devices/disk/backingStore/source")
    assert link is not None
    assert link.get("file") == str(agent.base(image_id))
    agent.json("image", "remove", images.root)


def test_guest_that_cannot_be_rebuilt_runs_on(
    agent: Agent, images: Images, glance: Glance, other: Variant, libvirtd: PrivateLibvirtd
) -> None:
    uuid = boot(agent, images.root)["instance"]["uuid"]
    pid, xml = libvirtd.qemu_pid(NAME), libvirtd.virsh("dumpxml", NAME, "--inactive")
    before = agent.json("instance", "show", NAME)
    properties = {
        **boot_files(images.kernel, images.ramdisk),
        "hw_machine_type": "isapc",
    }
    image_id = glance.upload(other.root, disk_format="raw", properties=properties)

    failed = agent.run("instance", "rebuild", NAME, "--image", image_id)

    assert failed.returncode == 2
    assert "libvirt does not accept the domain: XML error: No PCI buses" in failed.stderr
    assert libvirtd.qemu_pid(NAME) == pid
    assert libvirtd.virsh("dumpxml", NAME, "--inactive") == xml
    assert agent.json("instance", "show", NAME) == before
    files = {path.name for path in (agent.instances / uuid).iterdir()}
    assert files == {"console.log", "disk", "instance.json", "kernel", "ramdisk"}


@pytest.fixture
def secure_image(glance: Glance, images: Images, other: Variant) -> str:
    properties = {
        **boot_files(images.kernel, images.ramdisk),
        "hw_firmware_type": "uefi",
        "os_secure_boot": "required",
        "hw_tpm_model": "tpm-crb",
        "hw_disk_bus": "scsi",
        "hw_scsi_model": "lsilogic",
    }
    return glance.upload(other.root, disk_format="raw", properties=properties)


def test_a_rebuild_whose_start_fails_tells_what_firmware_and_tpm_have_lost(
    agent: Agent, glance: Glance, other: Variant, secure_image: str, libvirtd: PrivateLibvirtd
) -> None:
    boot(agent, secure_image)
    libvirtd.virsh("autostart", NAME)
    before = agent.json("instance", "show", NAME), libvirtd.virsh("dumpxml", NAME, "--inactive")
    # libvirt takes that down, and finds at the start that this host has none.
    properties = {"hw_mem_page_size": "1GB"}
    image_id = glance.upload(other.root, disk_format="raw", properties=properties)

    failed = agent.run("instance", "rebuild", NAME, "--image", image_id)

    assert failed.returncode == 1
    assert "HypervisorError" in failed.stderr
    assert "TPM had kept is gone" in failed.stderr
    after = agent.json("instance", "show", NAME), libvirtd.virsh("dumpxml", NAME, "--inactive")
    assert after == before
    assert domain(libvirtd).xpath("devices/tpm/@model") == ["tpm-crb"]
    assert len(libvirtd.kept()) == 2
    assert libvirtd.virsh("list", "--autostart", "--name").strip() == NAME


def test_rebuilt_instance_has_the_hardware_its_new_image_asks_for(
    agent: Agent, images: Images, guest: Guest, secure_image: str, libvirtd: PrivateLibvirtd
) -> None:
    boot(agent, images.root)
    libvirtd.virsh("autostart", NAME)

    result = agent.json("instance", "rebuild", NAME, "--image", secure_image)

    assert result["status"] == "ACTIVE"
    running = domain(libvirtd)
    assert running.xpath("os/loader/@secure") == ["yes"]
    assert running.xpath("devices/tpm/@model") == ["tpm-crb"]
    assert running.xpath("devices/controller[@type='scsi']/@model") == ["lsilogic"]
    assert running.xpath("devices/disk/target/@dev") == ["sda"]
    assert len(libvirtd.kept()) == 2

    agent.json("instance", "rebuild", NAME, "--image", images.root)

    seen = ready(agent, boots=max(1, console(agent).count(f"{CONSOLE_PREFIX}guest")))
    assert (seen.content_sha256, seen.disks) == (guest.content_sha256, {"vda": GIB})
    assert libvirtd.kept() == []
    assert libvirtd.virsh("list", "--all", "--autostart", "--name").strip() == NAME
