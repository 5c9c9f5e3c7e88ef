"""Building an instance: a real image cache, real disks, and libvirt's own test driver.

What needs QEMU is in functional/.
"""

import errno
import logging
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.backends import Backends, HeldElsewhere
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.backends.rbd import Rbd
from agent.build import Build
from agent.cancellation import Cancellation
from agent.ceph import Cluster
from agent.disk import DiskType
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    Cancelled,
    DeadlineExceeded,
    HypervisorError,
    ImageNotFound,
    InstanceExists,
    InvalidJob,
)
from agent.host import Defaults, Host
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.instances import Instances
from agent.job import ConfigDriveFormat, GuestFormat, ImagesType, parse
from agent.journal import Journal, digest_of
from agent.layout import Formats
from agent.manifest import base_name
from agent.qemu_img import QemuImg
from agent.recorder import EndNotRecorded, Recorder
from agent.removal import remove_instance
from agent.report import JobReport, Status
from tests.cache_kit import CacheKit, Source, random_bytes
from tests.fake_ceph import FakeCeph, FakeImage

TEMPLATE = "<domain><os><type>hvm</type></os></domain>"
BROKEN_TEMPLATE = "<domain><name>somebody else</name></domain>"


class Site:
    """A host, and what other tools do to its libvirt."""

    def __init__(self, directory: Path) -> None:
        self.kit = CacheKit(directory=directory / "instances", source=Source())
        self.image: Image = self.kit.source.add(random_bytes(1))
        self.journal = Journal(directory / "journal.db")
        self.hypervisor = Hypervisor("test:///default", virt_type="test")
        self.host = Host(
            image_cache=self.kit.cache,
            backends=Backends({ImagesType.QCOW2: Qcow2(QemuImg()), ImagesType.RAW: Flat()}),
            instances=self.kit.instances,
            hypervisor=self.hypervisor,
            touch=self.touched,
            defaults=Defaults(
                virt_type="test",
                images_type=ImagesType.QCOW2,
                formats=Formats(
                    ephemeral=GuestFormat.EXT4,
                    config_drive=ConfigDriveFormat.ISO9660,
                    force_config_drive=False,
                ),
                cache_modes=dict.fromkeys(DiskType, "none"),
                discard="ignore",
            ),
        )
        self.uuid = str(uuid.uuid4())
        self.name = f"web-{self.uuid[:8]}"
        self.comes_meanwhile: str | None = None
        self.at_touch: list[tuple[str, bool]] = []
        """Of each refreshed base the name, and whether there was a root disk by then."""
        self.cancellation = Cancellation()

    @property
    def directory(self) -> Path:
        return self.kit.directory / self.uuid

    def touched(self, base: str) -> None:
        """Once the job has its base: what another tool defines while it is fetched."""
        self.at_touch.append((base, (self.directory / "disk").exists()))
        if self.comes_meanwhile is not None:
            self.hypervisor.define(self.comes_meanwhile)

    def foreign_domain(self) -> str:
        return (
            f"<domain type='test'><name>foreign-{self.uuid}</name><uuid>{self.uuid}</uuid>"
            "<memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>"
        )

    def run(
        self, host: Host | None = None, recorder: type[Recorder] = Recorder, **fields: object
    ) -> JobReport:
        """Run one job that asks for `fields` beside the usual; raise as it does."""
        request = parse(
            {
                "instance": {"name": self.name, "uuid": self.uuid},
                "image": {"id": self.image.id},
                "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
                "networks": [],
                "libvirt": {"domain_xml": TEMPLATE},
                **fields,
            }
        )
        report = JobReport(
            id=str(uuid.uuid4()),
            action=request.action,
            status=Status.QUEUED,
            request_id="req-1",
            created_at=0,
            updated_at=0,
        )
        self.journal.accept(request, report, body_digest=digest_of(request))
        record = recorder(self.journal, self.journal.get(report.id))
        Build(host or self.host, request, record, self.cancellation).run()
        return record.report


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.hypervisor.destroy(site.uuid)
    site.hypervisor.undefine(site.uuid)
    site.hypervisor.close()
    site.journal.close()


@pytest.mark.parametrize(
    "marked",
    [
        TEMPLATE,
        # Whatever else of our namespace a template brings, the job's mark is what counts.
        TEMPLATE.replace(
            "<os>", "<metadata><b:note xmlns:b='urn:bootwright:domain:1'/></metadata><os>"
        ),
    ],
    ids=["of its own", "with another mark"],
)
def test_instance_is_deleted_with_the_domain_its_job_defined(site: Site, marked: str) -> None:
    assert site.run(libvirt={"domain_xml": marked}).status is Status.ACTIVE
    assert site.hypervisor.state(site.uuid) == "running"

    remove_instance(site.host, site.kit.instances.find(site.uuid), Cancellation())

    assert site.hypervisor.state(site.uuid) is None
    assert not site.directory.exists()


@pytest.mark.parametrize(
    ("action", "define"), [("prepare", True), ("boot", False)], ids=["prepare", "define: false"]
)
def test_job_that_defines_nothing_leaves_a_domain_with_its_uuid_alone(
    site: Site, action: str, define: bool
) -> None:
    site.hypervisor.define(site.foreign_domain())
    site.hypervisor.start(site.uuid)

    with pytest.raises(BootwrightError, match="somebody else"):
        site.run(
            action=action,
            libvirt={"domain_xml": BROKEN_TEMPLATE, "define": define, "start": define},
        )

    assert site.hypervisor.state(site.uuid) == "running"
    assert not site.directory.exists()


def test_domain_that_came_during_the_fetch_is_left_alone(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.comes_meanwhile = site.foreign_domain()

    with pytest.raises(InstanceExists, match="foreign"):
        site.run()

    assert site.hypervisor.state(site.uuid) == "shut off"
    assert not site.directory.exists()
    assert "left alone" in caplog.text


def test_delete_leaves_a_domain_alone_that_another_tool_defined(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.run(action="prepare")
    site.hypervisor.define(site.foreign_domain())

    remove_instance(site.host, site.kit.instances.find(site.uuid), Cancellation())

    assert site.hypervisor.state(site.uuid) == "shut off"
    assert not site.directory.exists()
    assert site.uuid in caplog.text


@pytest.mark.parametrize("active", [True, False])
def test_boot_that_gets_no_network_card_says_so(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, active: bool
) -> None:
    caplog.set_level(logging.INFO)
    bare = tmp_path / "node.xml"
    bare.write_text("<node/>")
    uri = "test:///default" if active else f"test://{bare}"
    hypervisor = Hypervisor(uri, virt_type="test")

    site.run(replace(site.host, hypervisor=hypervisor), networks=None)

    record = site.kit.instances.find(site.uuid)
    remove_instance(replace(site.host, hypervisor=hypervisor), record, Cancellation())
    hypervisor.close()
    said = f"instance {site.uuid} gets no network card"
    assert (said in caplog.text) is not active


def test_failure_before_anything_was_defined_is_undone_without_libvirt(
    site: Site, tmp_path: Path
) -> None:
    away = Hypervisor(f"qemu:///system?socket={tmp_path}/sock", virt_type="qemu")
    with pytest.raises(BootwrightError, match="somebody else"):
        site.run(
            replace(site.host, hypervisor=away),
            action="prepare",
            libvirt={"domain_xml": BROKEN_TEMPLATE},
        )
    assert not site.directory.exists()
    assert site.kit.instances.all() == []


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
    """The power fails before a record is durable."""

    def settle(self, _uuid: str) -> None:
        raise AgentStopping("the power is gone")


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


def test_run_after_a_crash_makes_the_same_domain_whatever_the_image_says_by_now(site: Site) -> None:
    kernel = site.kit.source.add(random_bytes(1), image_id="kernel", disk_format="aki")
    properties = {"kernel_id": kernel.id, "os_command_line": "quiet"}
    images = site.kit.source.images
    images[site.image.id] = replace(site.image, properties=properties)
    job = site.journal.get(site.run().id)
    xml = site.hypervisor.xml(site.uuid)
    site.hypervisor.destroy(site.uuid)
    site.hypervisor.undefine(site.uuid)

    images[site.image.id] = replace(site.image, properties={"hw_disk_bus": "scsi"})
    again = Recorder(site.journal, job)
    Build(site.host, job.request, again, Cancellation()).run()

    assert again.report.status is Status.ACTIVE
    assert site.hypervisor.xml(site.uuid) == xml


@pytest.mark.parametrize("changed", ["image gone", "deadline passed"])
def test_run_after_a_crash_leaves_a_guest_alone_that_runs(site: Site, changed: str) -> None:
    job = site.journal.get(site.run().id)
    if changed == "image gone":
        del site.kit.source.images[site.image.id]
    late = Cancellation(1, elapsed_s=2) if changed == "deadline passed" else Cancellation()

    again = Recorder(site.journal, job)
    Build(site.host, job.request, again, late).run()

    assert again.report.status is Status.ACTIVE
    assert again.report.domain is not None
    assert again.report.domain.state == "running"
    assert [disk.path for disk in again.report.disks] == [str(site.directory / "disk")]
    assert site.hypervisor.state(site.uuid) == "running"


class Late(Hypervisor):
    """A libvirt that comes up after the agent."""

    silent = 2

    def metadata(self, uuid: str, namespace: str) -> str | None:
        if self.silent:
            self.silent -= 1
            raise HypervisorError("libvirt does not answer")
        return super().metadata(uuid, namespace)


def test_as_long_as_libvirt_is_away_no_guest_is_undone(site: Site) -> None:
    job = site.journal.get(site.run().id)
    del site.kit.source.images[site.image.id]
    late = Late("test:///default", virt_type="test")
    again = Recorder(site.journal, job)
    Build(replace(site.host, hypervisor=late), job.request, again, Cancellation()).run()
    late.close()
    assert again.report.status is Status.ACTIVE

    late = Late("test:///default", virt_type="test")
    impatient = Cancellation(0.5)
    with pytest.raises(DeadlineExceeded):
        Build(
            replace(site.host, hypervisor=late), job.request, Recorder(site.journal, job), impatient
        ).run()
    late.close()
    assert site.hypervisor.state(site.uuid) == "running"
    assert (site.directory / "disk").exists()


class Forgetful(Recorder):
    """Of a journal that takes down phases, and no end."""

    def record_end(self) -> None:
        raise EndNotRecorded(BackendError("the journal cannot be written"))


def test_disks_that_were_told_to_be_ready_are_not_undone_by_a_later_run(site: Site) -> None:
    with pytest.raises(EndNotRecorded):
        site.run(action="prepare", recorder=Forgetful)
    [job] = site.journal.unfinished()
    del site.kit.source.images[site.image.id]

    with pytest.raises(ImageNotFound):
        Build(site.host, job.request, Recorder(site.journal, job), Cancellation()).run()
    assert (site.directory / "disk").exists()
    assert site.kit.instances.get(site.uuid) is not None


def test_cancel_that_came_before_a_crash_undoes_a_guest_that_runs(site: Site) -> None:
    job = site.journal.get(site.run().id)
    cancelled = Cancellation()
    cancelled.cancel(Cancelled("on request"))
    with pytest.raises(Cancelled):
        Build(site.host, job.request, Recorder(site.journal, job), cancelled).run()
    assert site.hypervisor.state(site.uuid) is None
    assert not site.directory.exists()


def test_disks_of_a_type_the_host_does_not_keep_are_refused_before_anything_is_fetched(
    site: Site,
) -> None:
    with pytest.raises(InvalidJob, match="keeps no lvm disks, only qcow2, raw"):
        site.run(images_type="lvm")
    assert site.kit.source.opened == []
    assert not site.directory.exists()


def test_instance_whose_domain_cannot_be_asked_for_keeps_its_disks(
    site: Site, tmp_path: Path
) -> None:
    site.run()
    away = Hypervisor(f"qemu:///system?socket={tmp_path}/sock", virt_type="qemu")
    with pytest.raises(HypervisorError):
        remove_instance(
            replace(site.host, hypervisor=away),
            site.kit.instances.find(site.uuid),
            Cancellation(),
        )
    assert (site.directory / "disk").exists()
    assert Instances(site.kit.directory).find(site.uuid).name == site.name


def test_last_use_of_the_base_is_refreshed_before_its_disk_is_made(site: Site) -> None:
    site.run()
    assert site.at_touch == [(base_name(site.image.id), False)]
    assert (site.directory / "disk").exists()


@pytest.mark.parametrize("images_type", ["qcow2", "raw"])
def test_without_a_size_the_root_disk_has_that_of_its_image(site: Site, images_type: str) -> None:
    flavor = {"vcpus": 1, "ram": 64, "disk": 0}
    report = site.run(flavor=flavor, images_type=images_type)
    [disk] = report.disks
    assert disk.virtual_size == site.image.size
    if images_type == "raw":
        assert (site.directory / "disk").read_bytes() == site.kit.source.data[site.image.id]
