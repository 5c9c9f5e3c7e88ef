"""Disks in a real Ceph cluster: the contract of backends, and guests that boot off them."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from agent import ceph_bindings
from agent.backends import HeldElsewhere
from agent.backends.rbd import Rbd
from agent.base import Base
from agent.cancellation import Cancellation
from agent.ceph import Cluster, Connection
from agent.ceph_pool import Pool
from agent.disk import Disk, Home
from agent.errors import BackendError
from agent.image import Image
from agent.report import Role
from functional.conftest import CACHE, Images, MakeAgent, boot_files
from functional.harness import glance as glances
from functional.harness.agent import USER, Agent
from functional.harness.ceph import Ceph
from functional.harness.console import wait_ready
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.keystone import Keystone
from functional.harness.libvirtd import PrivateLibvirtd
from tests.backend_contract import *  # noqa: F403 - the contract suite
from tests.backend_contract import MIB, base, prepared

GIB = 1 << 30
UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
POOL = "vms"


@pytest.fixture(scope="module")
def ceph(work: Path) -> Iterator[Ceph]:
    with Ceph(work / "ceph") as ceph:
        # As docs/operations.md has it.
        ceph.make_user(USER, writes=[POOL], reads=["images"], group=USER)
        yield ceph


@pytest.fixture(scope="module")
def cluster(ceph: Ceph) -> Cluster:
    return Cluster(ceph.conf, USER, connect_timeout_s=5)


@dataclass(frozen=True, kw_only=True, slots=True)
class RbdSite:
    """See `BackendSite`."""

    backend: Rbd
    home: Home
    bases: Path
    cluster: Cluster

    @contextlib.contextmanager
    def pool(self) -> Iterator[Pool]:
        with self.cluster.connection().pool(POOL) as pool:
            yield pool

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        with self.pool() as pool, ceph_bindings.load().rbd.Image(pool.context, name) as image:
            yield image

    def read(self, disk: Disk) -> bytes:
        with self.opened(disk.path.name) as image:
            data: bytes = image.read(0, image.size())
            return data

    def write(self, disk: Disk, data: bytes) -> None:
        with self.opened(disk.path.name) as image:
            image.write(data, 0)

    def found(self) -> set[str]:
        with self.pool() as pool:
            return set(pool.names())

    def occupy(self, disk: Disk) -> None:
        with self.pool() as pool:
            pool.create(disk.path.name, 1 << 20)


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[RbdSite]:
    (tmp_path / "_base").mkdir()
    backend = Rbd(
        cluster,
        host="host-1",
        pool=POOL,
        secret_uuid=None,
        share_key=lambda _uuid, _usage, _key: None,
        scratch=tmp_path,
        clone_pools={"images"},
        busy_retries=20,
        busy_interval_s=0.1,
    )
    home = Home(uuid=UUID, directory=tmp_path / UUID)
    site = RbdSite(backend=backend, home=home, bases=tmp_path / "_base", cluster=cluster)
    yield site
    with site.pool() as pool:
        for name in pool.names():
            pool.remove(name)


def unfinished(disk: Disk) -> str:
    return f".bootwright-{hashlib.sha256(b'host-1').hexdigest()[:8]}-{disk.path.name}"


def test_image_that_was_left_half_made_is_made_anew(site: RbdSite, ceph: Ceph) -> None:
    content = base(site)
    disk = prepared(site, content)
    ceph.rbd("rename", f"{POOL}/{disk.path.name}", f"{POOL}/{unfinished(disk)}")
    prepared(site, content)
    assert site.found() == {disk.path.name}
    assert site.read(disk).startswith(content.path.read_bytes())


def test_disk_of_another_host_is_neither_used_nor_removed(site: RbdSite, ceph: Ceph) -> None:
    content = base(site)
    disk = prepared(site, content)
    ceph.rbd("image-meta", "set", f"{POOL}/{disk.path.name}", "bootwright.host", "host-2")
    with pytest.raises(BackendError, match=r"in the way: host host-2 .* this is host host-1"):
        site.backend.prepare(disk, content, Cancellation())
    with pytest.raises(BackendError, match="in the way"):
        site.backend.grow(disk, 16 * MIB)
    with pytest.raises(HeldElsewhere, match=rf"was not removed.* rbd image-meta set {disk.path}"):
        site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == {disk.path.name}
    # What the errors say helps.
    ceph.rbd("image-meta", "set", f"{POOL}/{disk.path.name}", "bootwright.host", "host-1")
    site.backend.prepare(disk, content, Cancellation())
    site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == set()


def test_disk_with_snapshots_is_left_with_them(site: RbdSite, ceph: Ceph) -> None:
    disk = prepared(site, base(site))
    ceph.rbd("snap", "create", f"{disk.path}@monday")
    with pytest.raises(BackendError, match=rf"made snapshots of it .*rbd snap ls {disk.path}"):
        site.backend.remove(disk, site.home, Cancellation())
    ceph.rbd("snap", "purge", disk.path)
    site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == set()


def test_image_that_somebody_has_open_is_removed_when_it_is_closed(site: RbdSite) -> None:
    disk = prepared(site, base(site))
    opened = threading.Event()

    def hold() -> None:
        with site.opened(disk.path.name):
            opened.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    site.backend.remove(disk, site.home, Cancellation())
    thread.join()
    assert site.found() == set()


def test_only_what_glance_itself_calls_an_image_is_cloned_for_it(site: RbdSite, ceph: Ceph) -> None:
    ceph.rbd("create", "--size", "8M", "images/theirs")
    ceph.rbd("snap", "create", "images/theirs@snap")
    ceph.rbd("snap", "protect", "images/theirs@snap")
    location = f"rbd://{ceph.fsid}/images/theirs/snap"

    ceph.rbd("cp", "images/theirs", f"{POOL}/theirs")
    ceph.rbd("snap", "create", f"{POOL}/theirs@snap")
    ceph.rbd("snap", "protect", f"{POOL}/theirs@snap")

    def direct(image_id: str, location: str = location) -> Base | None:
        image = Image(
            id=image_id,
            name="",
            source="glance",
            status="active",
            disk_format="raw",
            locations=(location,),
        )
        return site.backend.direct(image, Cancellation())

    found = direct("theirs")
    assert found is not None
    assert (found.virtual_size, found.location) == (8 << 20, location)
    assert direct("mine") is None
    assert direct("theirs", f"rbd://{ceph.fsid}/{POOL}/theirs/snap") is None
    ceph.rbd("snap", "unprotect", "images/theirs@snap")
    assert direct("theirs") is None
    ceph.rbd("snap", "unprotect", f"{POOL}/theirs@snap")
    ceph.rbd("snap", "purge", f"{POOL}/theirs")


def blocklist(site: RbdSite, ceph: Ceph) -> None:
    """What a cluster does to a client that it has taken for dead."""
    with site.pool() as pool:
        pool.create("watched", 1 << 20)
    with site.opened("watched"):
        status = json.loads(ceph.rbd("status", "--format", "json", f"{POOL}/watched"))
        [watcher] = status["watchers"]
        ceph.command("osd blocklist", blocklistop="add", addr=watcher["address"])
        ceph.rbd("status", f"{POOL}/watched")
    ceph.rbd("rm", f"{POOL}/watched")


def test_blocklisted_connection_is_replaced(
    site: RbdSite, ceph: Ceph, caplog: pytest.LogCaptureFixture
) -> None:
    content = base(site)
    disk = prepared(site, content)
    blocklist(site, ceph)
    assert site.backend.grow(disk, 16 * MIB).virtual_size == 16 * MIB
    assert "lost the connection to Ceph" in caplog.text
    assert site.read(disk).startswith(content.path.read_bytes())


def test_connection_that_is_blocklisted_while_a_disk_is_made_costs_one_more_attempt(
    site: RbdSite, ceph: Ceph
) -> None:
    disk = site.backend.plan(site.home, Role.EPHEMERAL, "disk.eph0", None, 8 * MIB)
    attempts = []

    def write(fd: int) -> None:
        attempts.append(fd)
        if len(attempts) == 1:
            blocklist(site, ceph)
        os.pwrite(fd, b"x" * 512, MIB)

    site.backend.generate(disk, write, Cancellation())
    assert len(attempts) == 2
    assert site.found() == {disk.path.name}
    assert site.read(disk) == bytes(MIB) + b"x" * 512 + bytes(7 * MIB - 512)


def test_cluster_that_answers_nothing_is_waited_for_no_longer_than_the_limit(
    ceph: Ceph,
) -> None:
    cluster = Cluster(ceph.conf, USER, connect_timeout_s=5, call_limit_s=2)
    before = cluster.connection()
    with ceph.hanging(), pytest.raises(BackendError, match=POOL):
        cluster.call(_names)
    assert cluster.call(_names) == []
    assert cluster.connection() is not before


def _names(connection: Connection) -> list[str]:
    with connection.pool(POOL) as pool:
        return pool.names()


def test_wrong_key_is_told_at_once(ceph: Ceph, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    wrong = "AQBbKXVmAAAAABAA0v6u0l0hbD9T0tX2Zw0m8w=="
    keyring.write_text(f"[client.{USER}]\n\tkey = {wrong}\n")
    conf = tmp_path / "ceph.conf"
    conf.write_text(ceph.conf.read_text() + f"[client]\nkeyring = {keyring}\n")
    began = time.monotonic()
    with pytest.raises(BackendError, match=f"connecting to Ceph as client.{USER}"):
        Cluster(conf, USER, connect_timeout_s=3).connection()
    assert time.monotonic() - began < 10


@pytest.fixture
def agent(make_agent: MakeAgent, ceph: Ceph) -> Agent:
    """An agent whose disks are in the cluster; its Glance has files."""
    return make_agent(options={"libvirt": options(ceph)})


def options(ceph: Ceph) -> dict[str, object]:
    return {
        "images_type": "rbd",
        "rbd_user": USER,
        "images_rbd_pool": POOL,
        "images_rbd_ceph_conf": ceph.conf,
        "rbd_destroy_volume_retry_interval": 1,
    }


@pytest.fixture(scope="module")
def rbd_glance(ceph: Ceph, work: Path) -> Iterator[Glance]:
    venv = glances.install(CACHE / "openstack")
    with Glance(venv, work / "glance-rbd", show_locations=True, ceph=ceph) as glance:
        yield glance


@pytest.fixture
def cloning_agent(make_agent: MakeAgent, ceph: Ceph, rbd_glance: Glance) -> Agent:
    """An agent whose Glance keeps its images in the same cluster."""
    return make_agent(
        options={"libvirt": options(ceph), "glance": {"endpoint_override": rbd_glance.url}}
    )


def test_image_that_glance_keeps_in_files_is_copied_to_ceph_and_cloned(
    make_agent: MakeAgent, ceph: Ceph, work: Path, tmp_path: Path
) -> None:
    content = tmp_path / "image"
    content.write_bytes(os.urandom(8 * MIB))
    venv = glances.install(CACHE / "openstack")
    with (
        # Without users Glance has nobody whose task the copy would be.
        Keystone(venv, work / "keystone-copies") as keystone,
        Glance(
            venv,
            work / "glance-copies",
            keystone=keystone,
            show_locations=True,
            ceph=ceph,
            ceph_is_second=True,
        ) as glance,
    ):
        image_id = glance.upload(content, disk_format="raw")
        assert glance.metadata(image_id)["stores"] == "local"
        copying = {
            "images_rbd_glance_store_name": "ceph",
            "images_rbd_glance_copy_poll_interval": 1,
        }
        admin = {
            "auth_type": "password",
            "auth_url": keystone.auth_url,
            "username": "admin",
            "password": "admin",
            "project_name": "admin",
            "user_domain_id": "default",
            "project_domain_id": "default",
        }
        agent = make_agent(
            options={
                "libvirt": {**options(ceph), **copying},
                "glance": {"endpoint_override": glance.url, **admin},
            }
        )
        flavor = {"vcpus": 1, "ram": 192, "disk": 1}
        results = [
            agent.boot(
                {
                    **job(image_id),
                    "action": "prepare",
                    "instance": {"name": name},
                    "flavor": flavor,
                }
            )
            for name in ("web-1", "web-2")
        ]
        assert [result["image"]["source"] for result in results] == ["rbd", "rbd"]
        assert glance.downloads(image_id) == 0
        assert glance.metadata(image_id)["stores"] == "local,ceph"
        for result in results:
            disk = f"{POOL}/{result['instance']['uuid']}_disk"
            parent = json.loads(ceph.rbd("info", "--format", "json", disk))["parent"]
            assert (parent["pool"], parent["image"]) == ("images", image_id)
        agent.json("instance", "delete", "web-1")
        agent.json("instance", "delete", "web-2")
    assert ceph.images(POOL) == set()


def job(image_id: str) -> dict[str, Any]:
    return {
        "instance": {"name": "web-1"},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 2, "ephemeral": [{"size": 1}], "swap": 64},
        "image": {"id": image_id},
        "networks": [],
    }


def boot(agent: Agent, ceph: Ceph, image_id: str, guest: Guest) -> dict[str, Any]:
    """Boot an image on three disks in the cluster; see that the guest finds them right."""
    result = agent.boot(job(image_id))
    seen = wait_ready(lambda: agent.run("instance", "console", "web-1").stdout)
    uuid = result["instance"]["uuid"]
    root = next(disk for disk in result["disks"] if disk["role"] == "root")
    assert (root["path"], root["format"]) == (f"{POOL}/{uuid}_disk", "raw")
    assert seen.content_sha256 == guest.content_sha256
    assert seen.disks == {"vda": 2 * GIB, "vdb": GIB, "vdc": 64 << 20}
    assert seen.filesystem > 1.8 * GIB
    assert ceph.images(POOL) == {f"{uuid}_disk", f"{uuid}_disk.eph0", f"{uuid}_disk.swap"}
    return dict(result)


def virtual_size(ceph: Ceph, image: str) -> int:
    return int(json.loads(ceph.rbd("info", "--format", "json", f"{POOL}/{image}"))["size"])


def sources(libvirtd: PrivateLibvirtd) -> list[str]:
    """The images that what runs has, in the order of its disks."""
    xml = etree.fromstring(libvirtd.virsh("dumpxml", "web-1"))
    return [str(source.get("name")) for source in xml.iterfind("devices/disk/source")]


def test_guest_off_an_imported_image_grows_and_is_rescued_and_rebuilt(
    agent: Agent, ceph: Ceph, images: Images, guest: Guest, libvirtd: PrivateLibvirtd
) -> None:
    result = boot(agent, ceph, images.root, guest)
    assert result["image"]["source"] == "glance"
    uuid = result["instance"]["uuid"]
    its = {f"{uuid}_disk", f"{uuid}_disk.eph0", f"{uuid}_disk.swap"}
    agent.json("instance", "resize", "web-1", "--flavor", "1x192x3")
    assert virtual_size(ceph, f"{uuid}_disk") == 3 * GIB

    rescued = agent.json("instance", "rescue", "web-1")

    assert rescued["status"] == "ACTIVE"
    assert ceph.images(POOL) == {*its, f"{uuid}_disk.rescue"}
    names = [f"{POOL}/{uuid}_disk{name}" for name in ("", ".eph0", ".swap", ".rescue")]
    assert sources(libvirtd) == names

    ended = agent.json("instance", "unrescue", "web-1")

    assert ended["status"] == "ACTIVE"
    assert ceph.images(POOL) == its
    assert sources(libvirtd) == names[:3]

    rebuilt = agent.json("instance", "rebuild", "web-1", "--image", images.root)

    assert rebuilt["status"] == "ACTIVE"
    # No guest has said anything so soon after its start.
    before = len(agent.run("instance", "console", "web-1").stdout)
    seen = wait_ready(lambda: agent.run("instance", "console", "web-1").stdout[before:])
    assert (seen.content_sha256, seen.bootcount) == (guest.content_sha256, 1)
    assert seen.disks == {"vda": 3 * GIB, "vdb": GIB, "vdc": 64 << 20}
    assert ceph.images(POOL) == {*its - {f"{uuid}_disk"}, f"{uuid}_disk.rebuilt"}
    agent.json("instance", "delete", "web-1")
    assert ceph.images(POOL) == set()


def test_the_doctor_looks_at_the_cluster(agent: Agent, ceph: Ceph) -> None:
    findings = json.loads(agent.run("--format", "json", "doctor", "--user", USER).stdout)["checks"]
    [found] = [each for each in findings if each["name"] == "ceph"]
    assert found["message"].endswith(f"images in pool {POOL}")


def test_guest_boots_off_a_clone_of_glances_own_image_and_nothing_is_fetched(
    cloning_agent: Agent, ceph: Ceph, rbd_glance: Glance, guest: Guest, libvirtd: PrivateLibvirtd
) -> None:
    kernel = rbd_glance.upload(guest.kernel, disk_format="aki", container_format="aki")
    ramdisk = rbd_glance.upload(guest.ramdisk, disk_format="ari", container_format="ari")
    properties = boot_files(kernel, ramdisk)
    image_id = rbd_glance.upload(guest.root, disk_format="raw", properties=properties)

    result = boot(cloning_agent, ceph, image_id, guest)

    # Nobody has read it, so nobody says what it is.
    assert result["image"] == {"id": image_id, "digest": None, "source": "rbd"}
    assert rbd_glance.downloads(image_id) == 0
    assert not cloning_agent.base(image_id).exists()
    uuid = result["instance"]["uuid"]
    info = json.loads(ceph.rbd("info", "--format", "json", f"{POOL}/{uuid}_disk"))
    assert (info["parent"]["pool"], info["parent"]["image"]) == ("images", image_id)
    xml = etree.fromstring(libvirtd.virsh("dumpxml", "web-1"))
    [secret] = {str(each.get("uuid")) for each in xml.iterfind("devices/disk/source/auth/secret")}
    assert secret in libvirtd.virsh("secret-list")
    keyring = (ceph.root / f"client.{USER}.keyring").read_text()
    assert keyring.split()[-1] not in cloning_agent.log
    cloning_agent.json("instance", "delete", "web-1")
    assert ceph.images(POOL) == set()
