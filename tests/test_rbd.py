"""Disks in a Ceph cluster in memory: the contract, and what a real cluster does rarely.

The same contract on a real one is in functional/test_rbd.py.
"""

import dataclasses
import errno
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from agent.backends import HeldElsewhere
from agent.backends.rbd import Rbd
from agent.base import Base
from agent.cancellation import Cancellation
from agent.ceph import Cluster
from agent.disk import Disk, Home
from agent.errors import (
    AgentStopping,
    BackendError,
    Cancelled,
    DeadlineExceeded,
    InsufficientFreeSpace,
)
from agent.image import Image
from agent.report import Role
from tests.backend_contract import *  # noqa: F403 - the contract suite
from tests.backend_contract import MIB, base, generated, planned, prepared
from tests.fake_ceph import FSID, FakeCeph, FakeImage, rbd_error

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
KEY = "AQBbKXVmAAAAABAA0v6u0l0hbD9T0tX2Zw0m8w=="


@dataclasses.dataclass(kw_only=True, slots=True)
class Site:
    """See `BackendSite`."""

    backend: Rbd
    home: Home
    bases: Path
    ceph: FakeCeph
    secrets: list[tuple[str, str, bytes]] = dataclasses.field(default_factory=list)

    @property
    def images(self) -> dict[str, FakeImage]:
        return self.ceph.pools["vms"]

    def read(self, disk: Disk) -> bytes:
        return bytes(self.images[disk.path.name].data)

    def write(self, disk: Disk, data: bytes) -> None:
        self.images[disk.path.name].data[: len(data)] = data

    def found(self) -> set[str]:
        return set(self.images)

    def occupy(self, disk: Disk) -> None:
        self.images[disk.path.name] = FakeImage(MIB)


def make_site(
    ceph: FakeCeph,
    directory: Path,
    *,
    busy_interval_s: float = 0.01,
    host: str = "host-1",
    clone_pools: Collection[str] = ("images",),
    copy: Callable[[Image, Cancellation], Image | None] | None = None,
) -> Site:
    (directory / "_base").mkdir(exist_ok=True)
    ceph.keyring(directory / "keyring", "bootwright", KEY)
    secrets: list[tuple[str, str, bytes]] = []
    backend = Rbd(
        Cluster(None, "bootwright", connect_timeout_s=5, bindings=ceph.bindings()),
        host=host,
        pool="vms",
        secret_uuid=None,
        share_key=lambda uuid, usage, key: secrets.append((uuid, usage, key)),
        scratch=directory,
        clone_pools=clone_pools,
        copy=copy,
        busy_retries=3,
        busy_interval_s=busy_interval_s,
    )
    return Site(
        backend=backend,
        home=Home(uuid=UUID, directory=directory / UUID),
        bases=directory / "_base",
        ceph=ceph,
        secrets=secrets,
    )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = make_site(FakeCeph(), tmp_path)
    yield site
    # Whatever went wrong, nothing of ours holds an image.
    assert all(image.open == 0 for image in site.images.values())


CALLS = ("open", "metadata_get", "list", "create", "write", "flush", "close", "rename", "remove")


@pytest.mark.parametrize("call", CALLS)
def test_connection_that_is_lost_at_any_call_costs_one_more_attempt(site: Site, call: str) -> None:
    content = base(site)
    site.ceph.failures[call] = [errno.ESHUTDOWN]
    disk = prepared(site, content)
    site.backend.remove(disk, site.home, Cancellation())
    site.ceph.failures[call] = [errno.ETIMEDOUT]
    assert site.read(prepared(site, content)).startswith(content.path.read_bytes())
    assert site.backend.grow(disk, 16 * MIB).virtual_size == 16 * MIB
    assert site.found() == {disk.path.name}


def test_disk_whose_last_answer_is_lost_is_kept(site: Site) -> None:
    content = base(site)
    disk = planned(site, content)

    def rename() -> None:
        [unfinished] = site.found()
        site.images[disk.path.name] = site.images.pop(unfinished)
        site.write(disk, b"the first")
        raise rbd_error(errno.ESHUTDOWN)

    site.ceph.before["rename"] = rename
    site.backend.prepare(disk, content, Cancellation())
    assert site.read(disk).startswith(b"the first")
    assert site.found() == {disk.path.name}


@pytest.mark.parametrize("call", ["create", "write", "flush", "size", "metadata_set", "rename"])
def test_what_fails_half_way_leaves_nothing_and_says_what(site: Site, call: str) -> None:
    site.ceph.failures[call] = [errno.EIO]
    with pytest.raises(BackendError, match=rf"vms/\.bootwright-[0-9a-f]+-{UUID}_disk: EIO"):
        prepared(site, base(site))
    assert site.found() == set()


def test_full_cluster_is_no_defect_of_the_backend(site: Site) -> None:
    site.ceph.failures["write"] = [errno.ENOSPC]
    with pytest.raises(InsufficientFreeSpace, match="writing to"):
        prepared(site, base(site))
    assert site.found() == set()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EIO, errno.ESHUTDOWN])
@pytest.mark.parametrize("call", ["remove", "close"])
def test_what_fails_in_cleaning_up_does_not_hide_what_came_first(
    site: Site, call: str, number: int
) -> None:
    """The agent stops while the first piece is written, and then nothing works."""
    content = base(site)
    disk = planned(site, content)
    cancellation = Cancellation()

    def stop() -> None:
        cancellation.cancel(AgentStopping("the agent is stopping"))
        site.ceph.failures[call] = [number] * 9

    site.ceph.before["write"] = stop
    with pytest.raises(AgentStopping):
        site.backend.prepare(disk, content, cancellation)
    site.ceph.failures.clear()
    site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == set()


def test_base_that_cannot_be_read_is_named(site: Site) -> None:
    content = base(site)
    disk = planned(site, content)
    content.path.unlink()
    content.path.mkdir()
    with pytest.raises(BackendError, match=rf"{disk.path}.*{content.path}: Is a directory"):
        site.backend.prepare(disk, content, Cancellation())
    assert site.found() == set()


def test_scratch_directory_that_is_gone_is_named(site: Site, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    backend = make_site(site.ceph, gone).backend
    for path in (gone / "keyring", gone / "_base"):
        path.unlink() if path.is_file() else path.rmdir()
    gone.rmdir()
    disk = backend.plan(site.home, Role.SWAP, "disk.swap", None, MIB)
    with pytest.raises(BackendError, match=rf"content of {disk.path} in {gone}: No such file"):
        backend.generate(disk, lambda _fd: None, Cancellation())
    assert site.found() == set()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, InsufficientFreeSpace), (errno.EIO, BackendError)]
)
def test_content_that_cannot_be_written_is_told(
    site: Site, number: int, kind: type[BackendError]
) -> None:
    disk = site.backend.plan(site.home, Role.SWAP, "disk.swap", None, MIB)

    def write(_fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=f"making the content of {disk.path}"):
        site.backend.generate(disk, write, Cancellation())
    assert site.found() == set()


def test_two_hosts_with_one_pool_keep_out_of_each_others_disks(site: Site, tmp_path: Path) -> None:
    other = make_site(site.ceph, tmp_path, host="host-2")
    content = base(site)
    disk = prepared(site, content)
    site.write(disk, b"guest")
    with pytest.raises(BackendError, match="in the way: host host-1 has made it"):
        prepared(other, content)
    with pytest.raises(BackendError, match="in the way"):
        other.backend.grow(disk, 16 * MIB)
    with pytest.raises(HeldElsewhere, match="was not removed: host host-1 has made it"):
        other.backend.remove(disk, other.home, Cancellation())
    assert site.read(disk).startswith(b"guest")
    assert site.found() == {disk.path.name}


def test_image_that_no_agent_has_made_is_no_reason_to_keep_an_instance(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    disk = planned(site, base(site))
    site.occupy(disk)
    site.backend.remove(disk, site.home, Cancellation())
    assert "left alone" in caplog.text
    assert site.found() == {disk.path.name}


def test_two_hosts_that_make_a_disk_of_one_name_at_one_time(site: Site, tmp_path: Path) -> None:
    other = make_site(site.ceph, tmp_path, host="host-2")
    content = base(site)
    site.ceph.before["flush"] = lambda: site.write(prepared(other, content), b"the first")
    with pytest.raises(BackendError, match=f"renaming .*{UUID}_disk: EEXIST"):
        prepared(site, content)
    assert other.read(planned(other, content)).startswith(b"the first")
    assert site.found() == {f"{UUID}_disk"}


SNAPSHOT = f"rbd://{FSID}/images/theirs/snap"


def kept_in_ceph(site: Site, pool: str = "images", *, protected: bool = True) -> bytes:
    """Have Glance keep image `theirs` in a pool; return its content."""
    image = FakeImage(3 * MIB)
    image.data[:] = os.urandom(3 * MIB)
    image.snapshots["snap"] = protected
    site.ceph.pools.setdefault(pool, {})["theirs"] = image
    return bytes(image.data)


def direct(site: Site, *locations: str, image_id: str = "theirs") -> Base | None:
    image = Image(
        id=image_id,
        name="",
        source="glance",
        status="active",
        disk_format="raw",
        digest=("sha512", "00"),
        locations=locations,
    )
    return site.backend.direct(image, Cancellation())


def test_image_in_ceph_is_cloned_and_grown_and_no_hash_is_told_for_it(site: Site) -> None:
    content = kept_in_ceph(site)
    found = direct(site, "rbd://elsewhere/images/theirs/snap", SNAPSHOT)
    assert found is not None
    assert (found.origin, found.virtual_size, found.digest) == ("rbd", 3 * MIB, None)
    disk = prepared(site, found)
    assert disk.base_name is None
    assert site.read(disk) == content + bytes(5 * MIB)


@pytest.mark.parametrize(
    "location",
    [
        SNAPSHOT.replace(FSID, FSID.replace("6", "7")),
        SNAPSHOT.replace("/images/", "/backups/"),
        SNAPSHOT.replace("/images/", "/vms/"),
        SNAPSHOT.replace("/snap", "/other"),
        SNAPSHOT.replace("rbd:", "file:"),
        SNAPSHOT.replace("/images/theirs/snap", "/images"),
        "rbd://theirs",
    ],
)
def test_location_that_is_not_glances_own_is_nothing_to_clone(site: Site, location: str) -> None:
    for pool in ("images", "vms", "backups"):
        kept_in_ceph(site, pool)
    assert direct(site, location) is None
    site.images.clear()


def test_other_pool_is_named_for_who_wonders_why_an_image_is_fetched(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    kept_in_ceph(site, "glance")
    assert direct(site, SNAPSHOT.replace("/images/", "/glance/")) is None
    assert "pool glance is not in images_rbd_glance_pools" in caplog.text


def test_image_of_another_id_is_nothing_to_clone(site: Site) -> None:
    kept_in_ceph(site)
    assert direct(site, SNAPSHOT, image_id="mine") is None


def test_nothing_is_cloned_where_no_pool_is_named(site: Site, tmp_path: Path) -> None:
    kept_in_ceph(site)
    assert direct(make_site(site.ceph, tmp_path, clone_pools=()), SNAPSHOT) is None


def test_snapshot_that_may_go_or_not_be_read_is_not_cloned(site: Site) -> None:
    kept_in_ceph(site, protected=False)
    assert direct(site, SNAPSHOT) is None
    kept_in_ceph(site)
    site.ceph.failures["open"] = [errno.EPERM]
    assert direct(site, SNAPSHOT) is None


def test_cluster_that_does_not_say_whether_there_is_a_snapshot_is_an_error(site: Site) -> None:
    kept_in_ceph(site)
    site.ceph.failures["open"] = [errno.ETIMEDOUT]
    assert direct(site, SNAPSHOT) is not None
    site.ceph.failures["open"] = [errno.EIO]
    with pytest.raises(BackendError, match="looking at images/theirs/snap: EIO"):
        direct(site, SNAPSHOT)


def test_image_elsewhere_is_cloned_once_it_has_been_copied(site: Site, tmp_path: Path) -> None:
    def copy(image: Image, _cancellation: Cancellation) -> Image:
        kept_in_ceph(site)
        return dataclasses.replace(image, locations=(SNAPSHOT,))

    copying = make_site(site.ceph, tmp_path, copy=copy)
    found = direct(copying)
    assert found is not None
    assert found.location == SNAPSHOT
    # What is there already is not copied.
    copying = make_site(site.ceph, tmp_path, copy=lambda *_: pytest.fail("asked for a copy"))
    assert direct(copying, SNAPSHOT) == found


@pytest.mark.parametrize("locations", [None, (), ("rbd://elsewhere/images/theirs/snap",)])
def test_image_that_does_not_get_to_a_pool_to_clone_from_is_fetched(
    site: Site, tmp_path: Path, locations: tuple[str, ...] | None, caplog: pytest.LogCaptureFixture
) -> None:
    def copy(image: Image, _cancellation: Cancellation) -> Image | None:
        return None if locations is None else dataclasses.replace(image, locations=locations)

    assert direct(make_site(site.ceph, tmp_path, copy=copy)) is None
    assert ("images_rbd_glance_pools" in caplog.text) == (locations is not None)


def test_busy_image_is_removed_when_it_is_closed(site: Site) -> None:
    disk = generated(site, b"y")
    site.ceph.failures["remove"] = [errno.EBUSY] * 2
    site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == set()


def test_image_that_stays_busy_is_told(site: Site) -> None:
    disk = generated(site, b"y")
    site.ceph.failures["remove"] = [errno.EBUSY] * 9
    with pytest.raises(
        BackendError, match=rf"{disk.path}: somebody still has it open .*rbd status"
    ):
        site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == {disk.path.name}


def test_disk_with_snapshots_is_told_with_what_to_do(site: Site) -> None:
    disk = generated(site, b"y")
    site.images[disk.path.name].snapshots["monday"] = False
    with pytest.raises(BackendError, match=rf"made snapshots of it .*rbd snap ls {disk.path}"):
        site.backend.remove(disk, site.home, Cancellation())
    assert site.found() == {disk.path.name}


def test_wait_for_a_busy_image_ends_with_the_job(site: Site) -> None:
    disk = generated(site, b"y")
    cancellation = Cancellation()
    site.ceph.failures["remove"] = [errno.EBUSY] * 9
    site.ceph.before["remove"] = lambda: cancellation.cancel(Cancelled("enough"))
    patient = make_site(site.ceph, site.bases.parent, busy_interval_s=600).backend
    with pytest.raises(Cancelled):
        patient.remove(disk, site.home, cancellation)
    with pytest.raises(DeadlineExceeded):
        patient.remove(disk, site.home, Cancellation(0.05))
    assert site.found() == {disk.path.name}


def test_what_can_be_removed_at_once_is_removed_by_a_cancelled_job_too(site: Site) -> None:
    disk = generated(site, b"y")
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    site.backend.remove(disk, site.home, cancellation)
    assert site.found() == set()


def test_hypervisor_gets_key_and_monitors(site: Site) -> None:
    access = site.backend.access()
    assert access is not None
    assert (access.user, access.monitors) == ("bootwright", (("10.0.0.1", 6789),))
    [(uuid, usage, key)] = site.secrets
    assert (uuid, key) == (access.secret_uuid, KEY.encode())
    assert "client.bootwright" in usage


def test_secrets_of_two_clusters_share_neither_uuid_nor_usage(tmp_path: Path) -> None:
    """libvirt refuses a second secret with the usage of another."""
    found = []
    for fsid in (FSID, FSID.replace("6", "7")):
        site = make_site(FakeCeph(fsid=fsid), tmp_path)
        site.backend.access()
        site.backend.access()
        assert site.secrets[0] == site.secrets[1]
        found.append(site.secrets[0])
    (uuid, usage, _), (other_uuid, other_usage, _) = found
    assert uuid != other_uuid
    assert usage != other_usage
