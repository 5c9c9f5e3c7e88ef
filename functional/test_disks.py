"""Each kind of disk under a real guest: what it sees, what it writes, what the host finds after."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from agent.backends.flat import Flat
from agent.base import Base
from agent.cancellation import Cancellation
from agent.client import Client
from agent.disk import Home
from agent.image import Image
from agent.report import Role, Status
from functional.conftest import Images, MakeAgent, boot_files
from functional.harness.agent import Agent
from functional.harness.console import Seen, wait_ready
from functional.harness.glance import Glance
from functional.harness.guest import CONSOLE_PREFIX, Guest
from functional.harness.libvirtd import PrivateLibvirtd
from functional.harness.mounts import small_file_system

MIB, GIB = 1 << 20, 1 << 30


def job(image_id: str, **fields: object) -> dict[str, Any]:
    return {
        "instance": {"name": "web-1"},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 2},
        "image": {"id": image_id},
        "networks": [],
        **fields,
    }


def booted(agent: Agent, document: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Seen]:
    """Boot it; return its disks by role, and what the guest says."""
    result = agent.boot(document)
    seen = wait_ready(lambda: agent.run("instance", "console", "web-1").stdout)
    return {disk["role"]: disk for disk in result["disks"]}, seen


def ready_again(agent: Agent, *, boots: int) -> Seen:
    """Return what the guest says when it has got ready that often."""

    def console() -> str:
        text = agent.run("instance", "console", "web-1").stdout
        # A boot that has not got to its end is none yet.
        begun = text.count(f"{CONSOLE_PREFIX}guest")
        return text if begun == boots else text.replace(f"{CONSOLE_PREFIX}ready", "")

    return wait_ready(console, timeout_s=60)


def test_a_guest_reads_and_writes_a_ploop_image(
    agent: Agent, images: Images, guest: Guest, libvirtd: PrivateLibvirtd
) -> None:
    disks, seen = booted(agent, job(images.root, images_type="ploop"))

    root = disks["root"]
    assert (root["format"], root["virtual_size"]) == ("ploop", 2 * GIB)
    assert seen.content_sha256 == guest.content_sha256
    assert seen.disks == {"vda": 2 * GIB}
    assert seen.serials["vda"].endswith("-root")
    assert seen.bootcount == 1
    assert seen.filesystem > 1.8 * GIB

    libvirtd.virsh("destroy", "web-1")
    data = Path(root["path"])
    assert data.name == "root.hds"
    with data.with_name("DiskDescriptor.xml").open() as file:
        assert f"<Disk_size>{2 * GIB // 512}</Disk_size>" in file.read()
    for options in (["--repair-sparse"], ["--ro"]):
        subprocess.run(
            ["ploop", "check", *options, data],
            env={**os.environ, "PADDING": "0" * 8192},
            check=True,
        )
    libvirtd.virsh("start", "web-1")
    assert ready_again(agent, boots=2).bootcount == 2
    agent.json("instance", "delete", "web-1")
    assert not data.parent.exists()


@pytest.mark.parametrize("file_system", ["iso9660", "vfat"])
@pytest.mark.parametrize("datasource", ["openstack", "nocloud"])
def test_the_guest_reads_its_name_from_its_config_drive(
    make_agent: MakeAgent,
    images: Images,
    file_system: str,
    datasource: str,
    libvirtd: PrivateLibvirtd,
) -> None:
    # Neither what the file system would have nor QEMU's own.
    modes = {"disk_cachemodes": "file=writethrough", "hw_disk_discard": "unmap"}
    agent = make_agent(options={"DEFAULT": {"config_drive_format": file_system}, "libvirt": modes})
    document = job(images.root)
    document["instance"] |= {"config_drive": True, "datasource": datasource}

    disks, seen = booted(agent, document)

    drive = Path(disks["config_drive"]["path"])
    assert seen.config_drive.get("hostname") == "web-1", agent.run("instance", "console", "web-1")
    assert seen.config_drive["uuid"] == drive.parent.name
    assert drive.stat().st_mode & 0o777 == 0o600
    assert drivers(libvirtd) == [{"cache": "writethrough", "discard": "unmap"}] * 2


def drivers(libvirtd: PrivateLibvirtd) -> list[dict[str, str | None]]:
    """How QEMU was told to handle each disk of the running domain."""
    domain = etree.fromstring(libvirtd.virsh("dumpxml", "web-1"))
    return [
        {name: driver.get(name) for name in ("cache", "discard")}
        for driver in domain.iterfind("devices/disk/driver")
    ]


def test_ephemeral_disks_have_the_file_system_each_asked_for(
    agent: Agent, images: Images, tmp_path: Path
) -> None:
    wanted = ["ext4", "xfs", "vfat", "none"]
    document = job(images.root, action="prepare")
    document["flavor"]["ephemeral"] = [{"size": 1, "guest_format": each} for each in wanted]
    document["flavor"]["swap"] = 64

    result = agent.boot(document)

    found = [blkid(disk["path"]) for disk in result["disks"] if disk["role"] == "ephemeral"]
    assert [each.get("TYPE", "none") for each in found] == wanted
    assert [each.get("LABEL") for each in found[:3]] == ["ephemeral0", "ephemeral1", "ephemeral2"]
    assert len({each.get("UUID") for each in found}) == 4
    [swap] = [disk for disk in result["disks"] if disk["role"] == "swap"]
    assert blkid(swap["path"])["TYPE"] == "swap"


def test_a_missing_base_is_fetched_again_under_the_overlay_that_stands_on_it(
    agent: Agent, images: Images, guest: Guest, glance: Glance, libvirtd: PrivateLibvirtd
) -> None:
    disks, _ = booted(agent, job(images.root))
    libvirtd.virsh("destroy", "web-1")
    overlay = Path(disks["root"]["path"])
    before = overlay.read_bytes()
    base = agent.base(images.root)
    base.unlink()
    downloads = glance.downloads(images.root)

    agent.stop()
    agent.start()
    agent.wait_log("is gone from under web-1")
    agent.json("image", "fetch", images.root)  # it waits for the one that is under way

    assert glance.downloads(images.root) == downloads + 1
    assert overlay.read_bytes() == before
    libvirtd.virsh("start", "web-1")
    seen = ready_again(agent, boots=2)
    assert (seen.content_sha256, seen.bootcount) == (guest.content_sha256, 2)


def spaced(text: str) -> str:
    return " ".join(text.split())


def blkid(path: str) -> dict[str, str]:
    done = subprocess.run(
        ["blkid", "-p", "-o", "export", path], capture_output=True, text=True, check=False
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "properties",
    [
        {"hw_disk_bus": "scsi"},
        {"hw_disk_bus": "ide"},
        {"hw_firmware_type": "uefi", "hw_video_model": "none"},
    ],
    ids=lambda properties: "-".join(properties.values()),
)
def test_a_guest_boots_on_the_hardware_its_image_asks_for(
    agent: Agent, images: Images, guest: Guest, glance: Glance, properties: dict[str, str]
) -> None:
    boots = boot_files(images.kernel, images.ramdisk)
    image_id = glance.upload(guest.root, disk_format="raw", properties={**boots, **properties})
    document = job(image_id)
    document["flavor"]["ram"] = 256

    disks, seen = booted(agent, document)

    root = disks["root"]
    assert seen.content_sha256 == guest.content_sha256
    assert set(seen.disks.values()) == {2 * GIB}
    assert {serial[12:] for serial in seen.serials.values()} == {"-root"}
    assert root["device_name"] == {"scsi": "sda", "ide": "hda"}.get(
        properties.get("hw_disk_bus", ""), "vda"
    )


def test_raw_disks_share_the_blocks_of_their_base_where_the_file_system_can(
    make_agent: MakeAgent, images: Images, guest: Guest, work: Path
) -> None:
    with small_file_system(work / "reflinks", mib=512, kind="xfs"):
        agent = make_agent(root=work / "reflinks" / "agent")
        document = job(images.root, action="prepare", images_type="raw")
        agent.boot(document)
        before = shutil.disk_usage(work / "reflinks").used
        document["instance"] = {"name": "web-2"}
        result = agent.boot(document)
        grown = shutil.disk_usage(work / "reflinks").used - before
        root = next(disk for disk in result["disks"] if disk["role"] == "root")
        with Path(root["path"]).open("rb") as file:
            content = file.read(guest.root.stat().st_size)
        agent.close()
    assert content == guest.root.read_bytes()
    # Records, and the journal; the image alone has 16 MiB.
    assert grown < 2 << 20


def test_preallocated_raw_disk_can_be_overwritten_on_a_full_file_system_with_reflinks(
    work: Path,
) -> None:
    place = work / "preallocated"
    with small_file_system(place, mib=512, kind="xfs"):
        content = os.urandom(MIB) * 16
        base = Base(
            path=place / "base",
            format="raw",
            virtual_size=len(content),
            image=Image(id="1", name="", source="directory", status="active", disk_format="raw"),
            digest=None,
            origin="cache",
        )
        base.path.write_bytes(content)
        backend = Flat(preallocate=True)
        home = Home(uuid="instance", directory=place)
        disk = backend.plan(home, Role.ROOT, "disk", base, len(content) + 8 * MIB)
        backend.prepare(disk, base, Cancellation())
        assert disk.path.read_bytes() == content + bytes(8 * MIB)

        with pytest.raises(OSError, match="No space left"):
            fill(place / "rest")
        with disk.path.open("r+b", buffering=0) as file:
            for _ in range(24):
                assert file.write(b"x" * MIB) == MIB
            os.fsync(file.fileno())
        assert base.path.read_bytes() == content


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        finally:
            os.fsync(file.fileno())


def test_limits_of_the_flavor_are_on_the_disk_of_the_running_guest(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    document = job(images.root)
    document["flavor"]["extra_specs"] = {"quota:disk_write_iops_sec": 123}
    agent.boot(document)
    tune = ("blkdeviotune", "web-1", "vda")
    assert "write_iops_sec : 123" in spaced(libvirtd.virsh(*tune))
    probe = agent.instances / "probe"
    past_the_cache = subprocess.run(
        ["dd", "if=/dev/zero", f"of={probe}", "bs=4096", "count=1", "oflag=direct"],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    probe.unlink(missing_ok=True)
    cache = "none" if past_the_cache.returncode == 0 else "writeback"
    assert drivers(libvirtd) == [{"cache": cache, "discard": "ignore"}]
    for specs, limit in (
        (None, 123),
        ({"quota:disk_write_iops_sec": 7}, 7),
        (None, 7),
        ({}, 0),
    ):
        document["flavor"]["extra_specs"] = specs
        resize = {"action": "resize", "instance": {"name": "web-1"}, "flavor": document["flavor"]}
        with Client(agent.socket) as client:
            assert client.wait(client.submit(resize).id, 60).status is Status.DONE
        assert f"write_iops_sec : {limit}" in spaced(libvirtd.virsh(*tune, "--config"))
    document["flavor"]["extra_specs"] = {"quota:disk_write_iops_sek": 123}
    refused = agent.run("boot", "-f", "-", stdin=json.dumps(document))
    assert refused.returncode == 2
    assert "did you mean quota:disk_write_iops_sec?" in refused.stderr
