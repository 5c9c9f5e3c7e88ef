"""The contract of jobs: what their results say, and what is there when they are done."""

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from functional.conftest import Images
from functional.contract import GIB, MIB, agent, booted, curl, job
from functional.harness.agent import Agent
from functional.harness.console import wait_ready
from functional.harness.guest import Guest
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd

__all__ = ["agent", "booted"]

# The result of a job


def test_the_result_is_as_promised(
    agent: Agent, booted: dict[str, Any], images: Images, guest: Guest
) -> None:
    promised = "id action status task_state request_id instance image disks domain timeline error"
    assert set(promised.split()) <= set(booted)
    assert (booted["action"], booted["status"]) == ("boot", "ACTIVE")
    assert (booted["task_state"], booted["error"]) == (None, None)
    assert booted["request_id"] == "req-all-1"
    uuid = booted["instance"]["uuid"]
    assert booted["instance"] == {"uuid": uuid, "name": "all-1"}
    assert booted["image"]["id"] == images.root
    assert booted["image"]["digest"].startswith("sha512:")
    assert booted["image"]["source"] == "glance"
    assert booted["domain"] == {"uuid": uuid, "state": "running"}
    assert [phase["phase"] for phase in booted["timeline"]] == [
        "image_resolving",
        "image_downloading",
        "image_verifying",
        "block_device_mapping",
        "spawning",
    ]
    assert sum(phase["bytes"] for phase in booted["timeline"]) == sum(
        path.stat().st_size for path in (guest.kernel, guest.ramdisk, guest.root)
    )
    assert all(phase["seconds"] >= 0 for phase in booted["timeline"])
    instance_dir = agent.instances / uuid
    described = {
        disk["role"]: (Path(disk["path"]), disk["format"], disk["virtual_size"])
        for disk in booted["disks"]
    }
    assert described == {
        "kernel": (instance_dir / "kernel", "raw", guest.kernel.stat().st_size),
        "ramdisk": (instance_dir / "ramdisk", "raw", guest.ramdisk.stat().st_size),
        "root": (instance_dir / "disk", "qcow2", GIB),
        "ephemeral": (instance_dir / "disk.eph0", "raw", GIB),
        "swap": (instance_dir / "disk.swap", "raw", 64 * MIB),
        "config_drive": (
            instance_dir / "disk.config",
            "raw",
            (instance_dir / "disk.config").stat().st_size,
        ),
    }
    assert agent.json("job", "show", booted["id"]) == booted
    assert agent.json("job", "wait", booted["id"]) == booted


def test_one_key_is_one_job(agent: Agent, booted: dict[str, Any], images: Images) -> None:
    document = job("keyed", images.root, action="prepare", idempotency_key="order-1")
    first = agent.boot(document)

    assert agent.boot(document)["id"] == first["id"]
    document["flavor"]["vcpus"] = 2
    done = agent.run("boot", "-f", "-", stdin=json.dumps(document))
    assert done.returncode == 1
    assert "IdempotencyConflict" in done.stderr
    status, _ = curl(agent, "/v1/jobs", "--json", json.dumps(document))
    assert status == 409
    agent.json("instance", "delete", "keyed")


# Other kinds of jobs


def test_raw_disks_are_full_copies(agent: Agent, images: Images, guest: Guest) -> None:
    result = agent.boot(
        job("flat", images.root, images_type="raw", libvirt={"define": True, "start": False})
    )

    assert (result["status"], result["domain"]["state"]) == ("DONE", "shut off")
    [root] = [disk for disk in result["disks"] if disk["role"] == "root"]
    assert (root["format"], root["backing_chain"]) == ("raw", [])
    path = Path(root["path"])
    assert path.stat().st_size == root["virtual_size"] == GIB
    content = guest.root.read_bytes()
    with path.open("rb") as file:
        assert file.read(len(content)) == content
    agent.json("instance", "delete", "flat")
    assert agent.run("instance", "delete", "flat").returncode == 4


@pytest.mark.parametrize(
    "fields", [{"action": "prepare"}, {"libvirt": {"define": False, "start": False}}]
)
def test_disks_without_a_domain(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd, fields: dict[str, Any]
) -> None:
    agent.json("image", "fetch", images.root)  # stays
    leftovers = Leftovers(agent, libvirtd)
    result = agent.boot(job("disks-only", images.root, **fields))

    uuid = result["instance"]["uuid"]
    assert (result["status"], result["domain"]) == ("DONE", None)
    assert uuid not in libvirtd.domains()
    domain = ET.fromstring(result["domain_xml"])
    sources = [source.get("file") for source in domain.iterfind("devices/disk/source")]
    assert str(agent.instances / uuid / "disk") in sources
    assert domain.findtext("os/kernel") == str(agent.instances / uuid / "kernel")
    assert agent.json("instance", "show", uuid)["state"] is None
    agent.json("instance", "delete", uuid)
    leftovers.assert_none()


def test_a_template_keeps_what_it_says(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    template = """
        <domain type='qemu'>
          <title>made by hand</title>
          <memory unit='MiB'>128</memory>
          <vcpu>1</vcpu>
          <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
          <devices>
            <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
          </devices>
        </domain>"""
    result = agent.boot(
        job("by-hand", images.root, libvirt={"start": False, "domain_xml": template})
    )

    xml = subprocess.run(
        ["virsh", "--connect", libvirtd.uri, "dumpxml", result["domain"]["uuid"]],
        capture_output=True,
        check=True,
    ).stdout
    domain = ET.fromstring(xml)
    assert domain.findtext("title") == "made by hand"
    assert domain.findtext("name") == "by-hand"
    assert domain.findtext("memory") == str(128 * 1024)
    assert domain.findtext("devices/rng/backend") == "/dev/urandom"
    sources = [source.get("file") for source in domain.iterfind("devices/disk/source")]
    assert [disk["path"] for disk in result["disks"] if disk["role"] == "root"] == sources
    agent.json("instance", "delete", "by-hand")


# The guest has had all these tests to boot


def test_the_guest_sees_every_disk_and_its_name(agent: Agent, booted: dict[str, Any]) -> None:
    seen = wait_ready(lambda: agent.run("instance", "console", "all-1").stdout)

    by_role = {disk["role"]: disk for disk in booted["disks"]}
    expected = {
        by_role[role]["device_name"]: by_role[role]["virtual_size"]
        for role in ("root", "ephemeral", "swap")
    }
    assert expected.items() <= seen.disks.items()
    assert seen.config_drive == {"hostname": "all-1", "uuid": booted["instance"]["uuid"]}


def test_an_instance_that_is_deleted_is_gone(
    agent: Agent, booted: dict[str, Any], libvirtd: PrivateLibvirtd
) -> None:
    uuid = booted["instance"]["uuid"]

    result = agent.json("instance", "delete", uuid)

    assert (result["action"], result["status"]) == ("delete", "DONE")
    assert uuid not in libvirtd.domains()
    assert not (agent.instances / uuid).exists()
    assert "Traceback" not in agent.log
