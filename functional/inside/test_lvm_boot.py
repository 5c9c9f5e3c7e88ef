"""The installed agent with a volume group: udev, helpers, and a domain off a logical volume."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.client import Client
from agent.privileges import held_capabilities
from agent.report import JobReport, Status
from functional.conftest import CACHE
from functional.harness import guest as guests
from functional.harness.agent import Agent
from functional.harness.console import wait_ready
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd
from functional.inside import volumes
from functional.inside.conftest import GROUP, POOL, tool
from functional.inside.volumes import DEVICES

GIB = 1 << 30
LIMIT_S = 240.0


@pytest.fixture(scope="session")
def libvirtd(work: Path) -> Iterator[PrivateLibvirtd]:
    # What libvirt finds out about the emulators counts for one kernel.
    with PrivateLibvirtd(work / "libvirt", cache=CACHE / "libvirt-uml") as libvirtd:
        yield libvirtd


@contextlib.contextmanager
def agent_with(
    work: Path, libvirtd: PrivateLibvirtd, **sections: dict[str, object]
) -> Iterator[tuple[Agent, Client]]:
    root = work / "agent"
    options: dict[str, dict[str, object]] = {
        "libvirt": {
            "connection_uri": libvirtd.uri,
            "virt_type": "qemu",
            "images_type": "lvm",
            "images_volume_group": GROUP,
        },
        "images": {"source": "directory", "directory": root / "images"},
    }
    for section, values in sections.items():
        options.setdefault(section, {}).update(values)
    agent = Agent(root, options, capabilities=("fowner", "dac_override", "sys_admin"))
    try:
        agent.start()
        with Client(agent.socket) as client:
            yield agent, client
    finally:
        agent.close()


def add_images(client: Client, guest: Guest) -> str:
    """Return the id of the root image, which names the others."""

    def add(path: Path, disk_format: str, *properties: str) -> str:
        with path.open("rb") as file:
            return client.add_image(
                file, disk_format=disk_format, name=path.name, image_id=None, properties=properties
            ).id

    return add(
        guest.root,
        "raw",
        f"kernel_id={add(guest.kernel, 'aki')}",
        f"ramdisk_id={add(guest.ramdisk, 'ari')}",
        f"os_command_line={guests.COMMAND_LINE}",
    )


def done(client: Client, document: dict[str, Any]) -> JobReport:
    report = client.wait(client.submit(document).id, LIMIT_S)
    assert report.status in (Status.ACTIVE, Status.DONE), report
    return report


def capabilities(pid: int) -> list[str]:
    return held_capabilities(Path(f"/proc/{pid}/status").read_text())


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.timeout(2 * LIMIT_S)
def test_domain_off_a_thin_volume_is_changed_in_every_way_and_leaves_nothing(
    work: Path, libvirtd: PrivateLibvirtd, guest: Guest
) -> None:
    with agent_with(work, libvirtd, libvirt={"images_thin_pool": POOL}) as (agent, client):
        image = add_images(client, guest)
        report = done(
            client,
            {
                "instance": {"name": "web-1"},
                "flavor": {"vcpus": 1, "ram": 192, "disk": 1, "swap": 8},
                "image": {"id": image},
                "networks": [],
            },
        )
        assert report.instance is not None
        uuid = report.instance.uuid

        seen = wait_ready(lambda: str(client.console("web-1").data, "utf-8"), timeout_s=LIMIT_S)

        assert seen.content_sha256 == guest.content_sha256
        assert sorted(seen.disks.values()) == [8 << 20, GIB]
        assert seen.bootcount == 1
        base = f"base_{agent.base(image).name}"
        assert volumes.names() == {f"{uuid}_disk", f"{uuid}_disk.swap", base}
        xml = libvirtd.virsh("dumpxml", "web-1")
        assert f"<source dev='/dev/{GROUP}/{uuid}_disk'" in xml
        # One power, one helper; the agent has none.
        assert sorted(capabilities(pid) for pid in children(agent.pid)) == [
            ["CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SYS_ADMIN"],
            ["CAP_FOWNER"],
        ]
        assert capabilities(agent.pid) == []

        def change(action: str, **fields: object) -> Status:
            instance = {"name": "web-1"}
            return done(client, {"action": action, "instance": instance, **fields}).status

        change("resize", flavor={"vcpus": 1, "ram": 192, "disk": 2})
        assert f"Capacity:       {2 * GIB}" in libvirtd.virsh("domblkinfo", "web-1", "vda")
        # At rest from here on as far as it can be: a guest takes what processor there is in here.
        libvirtd.virsh("destroy", "web-1")
        assert change("rescue") is Status.ACTIVE
        libvirtd.virsh("suspend", "web-1")
        assert volumes.names() == {
            *(f"{uuid}_{name}" for name in ("disk", "disk.swap", "disk.rescue")),
            base,
        }
        assert f"<source dev='/dev/{GROUP}/{uuid}_disk.rescue'" in libvirtd.virsh(
            "dumpxml", "web-1"
        )
        assert change("unrescue") is Status.DONE
        assert volumes.names() == {f"{uuid}_disk", f"{uuid}_disk.swap", base}
        assert change("rebuild", image={"id": image}) is Status.DONE
        assert volumes.names() == {f"{uuid}_disk.rebuilt", f"{uuid}_disk.swap", base}
        content = guest.root.read_bytes()
        with (DEVICES / f"{uuid}_disk.rebuilt").open("rb") as volume:
            assert volume.read(len(content)) == content
            assert volume.seek(0, os.SEEK_END) == 2 * GIB
        assert f"/dev/{GROUP}/{uuid}_disk.rebuilt" in libvirtd.virsh("dumpxml", "web-1")

        client.wait(client.delete_instance("web-1").id, LIMIT_S)

        assert volumes.names() == {base}
        assert "Traceback" not in agent.log


def test_encrypted_disks_of_an_instance_and_their_end(
    work: Path, libvirtd: PrivateLibvirtd, guest: Guest
) -> None:
    keys = work / "agent/keys"
    encryption: dict[str, object] = {"enabled": True, "key_directory": keys}
    with agent_with(work, libvirtd, ephemeral_storage_encryption=encryption) as (agent, client):
        image = add_images(client, guest)
        document: dict[str, Any] = {
            "action": "prepare",
            "instance": {"name": "web-1"},
            "flavor": {"vcpus": 1, "ram": 192, "disk": 0},
            "image": {"id": image},
            "networks": [],
        }
        refused = client.wait(client.submit({**document, "images_type": "qcow2"}).id, LIMIT_S)
        assert refused.error is not None
        assert "would not be" in refused.error.message
        report = done(client, document)
        assert report.instance is not None
        uuid = report.instance.uuid
        [root] = [disk for disk in report.disks if disk.role == "root"]
        assert root.path == f"/dev/mapper/{uuid}_disk-dmcrypt"
        content = guest.root.read_bytes()
        assert Path(root.path).read_bytes() == content
        assert (DEVICES / f"{uuid}_disk").read_bytes() != content
        assert (keys / uuid).stat().st_mode & 0o777 == 0o600

        # The host starts again: what device-mapper knew is gone.
        agent.stop()
        tool("cryptsetup", "close", f"{uuid}_disk-dmcrypt")
        agent.start()
        assert Path(root.path).read_bytes() == content

        client.wait(client.delete_instance("web-1").id, LIMIT_S)
        assert {name for name in volumes.names() if name.startswith(uuid)} == set()
        assert list(keys.iterdir()) == []
