"""Each kind of disk under a real guest: what it sees, what it writes, what the host finds after."""

import os
import subprocess
from pathlib import Path
from typing import Any

from functional.conftest import Images
from functional.harness.agent import Agent
from functional.harness.console import Seen, wait_ready
from functional.harness.guest import CONSOLE_PREFIX, Guest
from functional.harness.libvirtd import PrivateLibvirtd

GIB = 1 << 30


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
        return text if text.count(f"{CONSOLE_PREFIX}ready") == boots else ""

    return wait_ready(console)


def test_a_guest_reads_and_writes_a_ploop_image(
    agent: Agent, images: Images, guest: Guest, libvirtd: PrivateLibvirtd
) -> None:
    disks, seen = booted(agent, job(images.root, images_type="ploop"))

    root = disks["root"]
    assert (root["format"], root["virtual_size"]) == ("ploop", 2 * GIB)
    assert seen.content_sha256 == guest.content_sha256
    assert seen.disks == {"vda": 2 * GIB}
    assert seen.bootcount == 1

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
