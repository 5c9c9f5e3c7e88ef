"""Building an instance whose disks are in Ceph, where other hosts have theirs."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from agent.backends import Backends, HeldElsewhere
from agent.backends.flat import Flat
from agent.backends.rbd import Rbd
from agent.build import Build
from agent.cancellation import Cancellation
from agent.ceph import Cluster
from agent.errors import AgentStopping, Cancelled, InvalidJob
from agent.files import Together
from agent.instances import InstanceRecord, Instances
from agent.job import ImagesType
from agent.recorder import Recorder
from agent.removal import remove_instance
from tests.fake_ceph import FakeCeph, FakeImage
from tests.site_kit import BROKEN_TEMPLATE, Site, site

__all__ = ["site"]


@pytest.fixture
def ceph(site: Site, tmp_path: Path) -> FakeCeph:
    """Keeps disks of the site."""
    ceph = FakeCeph()
    ceph.keyring(tmp_path / "keyring", "bootwright", "key")
    name_host(site, ceph, "host-1")
    return ceph


def name_host(site: Site, ceph: FakeCeph, name: str) -> None:
    rbd = Rbd(
        Cluster(None, "bootwright", connect_timeout_s=5, bindings=ceph.bindings()),
        host=name,
        pool="vms",
        secret_uuid=None,
        share_key=lambda _uuid, _usage, _key: None,
        scratch=site.kit.directory,
        clone_pools=(),
        busy_retries=1000,
        busy_interval_s=60,
    )
    site.host = replace(site.host, backends=Backends({ImagesType.RBD: rbd, ImagesType.RAW: Flat()}))


def test_delete_on_a_host_with_another_host_id_forgets_no_disk(site: Site, ceph: FakeCeph) -> None:
    site.run(action="prepare", images_type="rbd")
    record = site.kit.instances.find(site.uuid)

    name_host(site, ceph, "renamed")
    with pytest.raises(HeldElsewhere, match=r"host-1 has made it .* this is host renamed") as error:
        remove_instance(site.host, record, Cancellation())
    assert error.value.code == "BackendError"
    assert site.kit.instances.find(site.uuid) == record
    assert set(ceph.pools["vms"]) == {f"{site.uuid}_disk"}

    name_host(site, ceph, "host-1")
    remove_instance(site.host, record, Cancellation())
    assert site.kit.instances.all() == []
    assert ceph.pools["vms"] == {}


def test_boot_with_the_uuid_of_another_hosts_instance_is_undone_and_leaves_its_disk(
    site: Site, ceph: FakeCeph, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = ceph.pools["vms"][f"{site.uuid}_disk"] = FakeImage(1 << 20)
    theirs.metadata.update({"bootwright.host": "host-2", "bootwright.instance": site.uuid})

    with pytest.raises(HeldElsewhere, match="in the way"):
        site.run(action="prepare", images_type="rbd")

    assert site.kit.instances.all() == []
    assert not site.directory.exists()
    assert ceph.pools["vms"] == {f"{site.uuid}_disk": theirs}
    assert f"undoing instance {site.name}" in caplog.text
    assert f"rbd rm vms/{site.uuid}_disk" in caplog.text


def test_undo_after_a_restart_with_another_host_id_forgets_no_disk_of_the_earlier_run(
    site: Site, ceph: FakeCeph, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        site.cancellation.cancel(AgentStopping("the agent is stopping"))

    # With the root disk made and the next one begun.
    ceph.before = {"rename": stop}
    flavor = {"vcpus": 1, "ram": 64, "disk": 1, "swap": 64}
    with pytest.raises(AgentStopping):
        site.run(action="prepare", images_type="rbd", flavor=flavor)
    assert set(ceph.pools["vms"]) == {f"{site.uuid}_disk"}
    record = site.kit.instances.find(site.uuid)

    ceph.before.clear()
    name_host(site, ceph, "renamed")
    [job] = site.journal.unfinished()
    with pytest.raises(HeldElsewhere, match="in the way"):
        Build(site.host, job.request, Recorder(site.journal, job), Cancellation()).run()

    assert site.kit.instances.find(site.uuid) == record
    assert f"rbd image-meta set vms/{site.uuid}_disk bootwright.host renamed" in caplog.text
    assert f"bootwright instance delete {site.uuid}" in caplog.text
    name_host(site, ceph, "host-1")
    remove_instance(site.host, record, Cancellation())
    assert ceph.pools["vms"] == {}


@pytest.mark.parametrize("cancelled", [False, True])
def test_stop_of_the_agent_ends_an_undo_that_waits_and_the_next_run_ends_it(
    site: Site, ceph: FakeCeph, cancelled: bool
) -> None:
    def stop() -> None:
        site.cancellation.cancel(AgentStopping("the agent is stopping"))

    def while_disks_are_made() -> None:
        if cancelled:
            site.cancellation.cancel(Cancelled("enough"))

    ceph.before = {"flush": while_disks_are_made, "remove": stop}
    ceph.failures = {"remove": [errno.EBUSY] * 9}
    with pytest.raises(AgentStopping):
        site.run(action="prepare", images_type="rbd", libvirt={"domain_xml": BROKEN_TEMPLATE})
    assert set(ceph.pools["vms"]) == {f"{site.uuid}_disk"}
    [job] = site.journal.unfinished()

    ceph.failures.clear()
    again = Cancellation()
    if cancelled:
        again.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled if cancelled else InvalidJob):
        Build(site.host, job.request, Recorder(site.journal, job), again).run()
    assert ceph.pools["vms"] == {}
    assert site.kit.instances.all() == []


class Cut(Instances):
    """The agent is killed as soon as a record has its name."""

    def add(self, record: InstanceRecord, together: Together) -> None:
        super().add(record, together)
        together.publish()
        raise AgentStopping("it is dead")


class Watched(Instances):
    """Notes what there is in Ceph when a record is made durable."""

    def __init__(self, directory: Path, ceph: FakeCeph) -> None:
        super().__init__(directory)
        self._ceph = ceph
        self.at_settle: list[set[str]] = []

    def settle(self, uuid: str) -> None:
        super().settle(uuid)
        self.at_settle.append(set(self._ceph.pools["vms"]))


def test_record_is_durable_before_there_is_a_disk_elsewhere_also_in_the_next_run(
    site: Site, ceph: FakeCeph
) -> None:
    directory = site.kit.directory
    with pytest.raises(AgentStopping):
        site.run(replace(site.host, instances=Cut(directory)), action="prepare", images_type="rbd")
    [job] = site.journal.unfinished()

    instances = Watched(directory, ceph)
    assert instances.get(site.uuid) is not None
    host = replace(site.host, instances=instances)
    Build(host, job.request, Recorder(site.journal, job), Cancellation()).run()

    assert instances.at_settle[0] == set()
    assert set(ceph.pools["vms"]) == {f"{site.uuid}_disk"}


def test_record_is_there_before_the_first_disk_elsewhere(site: Site, ceph: FakeCeph) -> None:
    found: list[InstanceRecord | None] = []
    ceph.before["create"] = lambda: found.append(Instances(site.kit.directory).get(site.uuid))
    site.run(action="prepare", images_type="rbd")
    assert found == [site.kit.instances.get(site.uuid)]
