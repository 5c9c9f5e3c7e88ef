"""One real VM through the whole way: a real Glance, a real libvirtd, a real guest."""

import json
import os
import pwd
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from functional.conftest import Images
from functional.harness import guest as guests
from functional.harness.agent import Agent
from functional.harness.console import Seen, wait_ready
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd

GIB = 1 << 30


def job(name: str, image_id: str, *, disk: int = 1) -> dict[str, Any]:
    return {
        "version": 1,
        "instance": {"name": name},
        "flavor": {"vcpus": 1, "ram": 192, "disk": disk},
        "image": {"id": image_id},
    }


def console(agent: Agent, name: str) -> Seen:
    return wait_ready(lambda: agent.run("instance", "console", name).stdout)


def root_disk(result: dict[str, Any]) -> dict[str, Any]:
    [disk] = [disk for disk in result["disks"] if disk["role"] == "root"]
    return dict(disk)


@pytest.mark.parametrize("kind", ["disk_qcow2", "disk_raw"])
def test_a_whole_disk_image_boots_with_the_flavors_disk(
    agent: Agent, images: Images, guest: Guest, kind: str
) -> None:
    image_id = getattr(images, kind)

    result = agent.boot(job("web-1", image_id, disk=2))

    assert (result["status"], result["domain"]["state"]) == ("ACTIVE", "running")
    disk = root_disk(result)
    assert (disk["format"], disk["virtual_size"]) == ("qcow2", 2 * GIB)
    assert disk["backing_chain"] == [{"path": str(agent.base(image_id)), "format": "raw"}]
    seen = console(agent, "web-1")
    assert seen.content_sha256 == guest.content_sha256
    assert seen.disks[disk["device_name"]] == 2 * GIB


def test_kernel_and_ramdisk_come_from_the_root_images_properties(
    agent: Agent, images: Images, guest: Guest
) -> None:
    result = agent.boot(job("web-1", images.root))

    roles = {disk["role"]: Path(disk["path"]) for disk in result["disks"]}
    assert roles["kernel"].read_bytes() == guest.kernel.read_bytes()
    assert roles["ramdisk"].read_bytes() == guest.ramdisk.read_bytes()
    seen = console(agent, "web-1")
    assert (seen.kernel, seen.content_sha256) == (guest.kernel_version, guest.content_sha256)
    assert seen.disks == {"vda": GIB}


def test_an_iso_boots_from_the_cdrom_drive_it_is_in(
    agent: Agent, glance: Glance, guest: Guest, tmp_path: Path
) -> None:
    cdrom = guests.cdrom(guest, tmp_path)
    # The guest's kernel knows IDE, but not SATA.
    properties = {"hw_cdrom_bus": "ide"}
    image_id = glance.upload(cdrom.root, disk_format="iso", properties=properties)

    agent.boot(job("web-1", image_id))

    assert agent.base(image_id).read_bytes() == cdrom.root.read_bytes()
    seen = console(agent, "web-1")
    assert seen.content_sha256 == cdrom.content_sha256
    assert (seen.root_device, seen.disks) == ("sr0", {})


def test_a_second_boot_downloads_nothing_and_refreshes_the_last_use_of_a_foreign_base(
    agent: Agent, images: Images, glance: Glance
) -> None:
    agent.boot(job("web-1", images.root))
    base = agent.base(images.root)
    assert base.stat().st_uid == pwd.getpwnam("libvirt-qemu").pw_uid
    os.utime(base, (1, 1))
    before = [glance.downloads(i) for i in (images.root, images.kernel, images.ramdisk)]

    began = time.time()
    result = agent.boot(job("web-2", images.root))

    assert result["image"]["source"] == "cache"
    assert [glance.downloads(i) for i in (images.root, images.kernel, images.ramdisk)] == before
    assert base.stat().st_mtime >= began
    assert console(agent, "web-2").bootcount == 1


def test_ten_boots_of_one_cold_image_make_one_download_and_ten_domains(
    agent: Agent, images: Images, glance: Glance, guest: Guest
) -> None:
    before = glance.downloads(images.root)
    results: list[Any] = []

    def boot(number: int) -> None:
        results.append(agent.boot(job(f"web-{number}", images.root)))

    threads = [threading.Thread(target=boot, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [result["status"] for result in results] == ["ACTIVE"] * 10
    assert {result["domain"]["state"] for result in results} == {"running"}
    assert glance.downloads(images.root) == before + 1
    # Kernel, ramdisk and root may each have been fetched for another of the jobs.
    received = sum(phase["bytes"] for result in results for phase in result["timeline"])
    fetched = (guest.kernel, guest.ramdisk, guest.root)
    assert received == sum(path.stat().st_size for path in fetched)


def test_delete_leaves_the_base_and_nothing_else(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    result = agent.boot(job("web-1", images.root))

    agent.json("instance", "delete", "web-1")

    uuid = result["instance"]["uuid"]
    assert not (agent.instances / uuid).exists()
    assert agent.base(images.root).is_file()
    assert agent.json("instance", "list") == {"instances": []}
    assert uuid not in libvirtd.domains()
    agent.json("image", "remove", images.root)
    assert not agent.base(images.root).exists()
    assert json.loads(agent.run("--format", "json", "cache", "status").stdout)["fetching"] == []
