"""Jobs that change an instance of a test's host, and a libvirt that refuses them."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.domain_facts import sources_of
from agent.errors import AgentStopping, HypervisorError, InvalidJob
from agent.host import Host
from agent.hypervisor import Hypervisor
from agent.instances import InstanceRecord, Instances
from agent.job import JobRequest
from agent.journal import Job, Journal
from agent.recorder import Recorder
from agent.report import Status
from tests.cache_kit import random_bytes
from tests.site_kit import Site


def accepted(site: Site, action: str, **fields: object) -> tuple[JobRequest, Recorder]:
    instance = {"name": site.name, "uuid": site.uuid}
    request, job = site.accept({"action": action, "instance": instance, **fields})
    return request, Recorder(site.journal, job)


def record(site: Site) -> InstanceRecord:
    return site.kit.instances.find(site.uuid)


def second_image(site: Site, **properties: str) -> str:
    """Return the id of another image; called again, it is the same with other properties."""
    source = site.kit.source
    image = source.images.get("another") or source.add(random_bytes(1), image_id="another")
    source.images[image.id] = dataclasses.replace(image, properties=properties)
    return image.id


class Refusing(Hypervisor):
    """Libvirt's, but for one controller that it does not know, and one disk that does not start."""

    refused: str | None = None

    def define(self, xml: str) -> None:
        if "lsilogic" in xml:
            raise InvalidJob("libvirt does not accept the domain: no such controller")
        super().define(xml)

    def start(self, uuid: str) -> None:
        if self.refused is not None and self.refused in sources_of(self.xml(uuid)):
            raise HypervisorError("starting: QEMU says no")
        super().start(uuid)


class Watching(Hypervisor):
    """Notes what a crash would leave of the newest job when a domain is about to be defined."""

    def __init__(self, journal: Path) -> None:
        super().__init__("test:///default", virt_type="test")
        self._journal = journal
        self.left: list[Status] = []

    def define(self, xml: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for path in self._journal.parent.glob(f"{self._journal.name}*"):
                shutil.copy(path, directory)
            journal = Journal(Path(directory, self._journal.name))
            self.left.append(journal.jobs()[-1].report.status)
            journal.close()
        super().define(xml)


class Waking(Hypervisor):
    """As QEMU's driver: a start wakes what is suspended, which the test driver forgets."""

    def start(self, uuid: str) -> None:
        if self.has_saved_state(uuid):
            raise AssertionError("what is suspended to disk is woken")
        super().start(uuid)


@pytest.fixture
def waking() -> Iterator[Waking]:
    hypervisor = Waking("test:///default", virt_type="test")
    yield hypervisor
    hypervisor.close()


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    hypervisor = Refusing("test:///default", virt_type="test")
    yield hypervisor
    hypervisor.close()


def boot_id(site: Site) -> str:
    """Changes whenever the domain is started."""
    xml = etree.fromstring(site.hypervisor.xml(site.uuid, live=True).encode())
    return str(xml.get("id"))


def files(site: Site) -> set[str]:
    return {path.name for path in site.directory.iterdir()}


def with_uefi(site: Site) -> None:
    """Boot an instance whose firmware has variables, which starts with the host."""
    site.kit.source.images[site.image.id] = dataclasses.replace(
        site.image, properties={"hw_firmware_type": "uefi"}
    )
    site.run(libvirt={})
    site.hypervisor.set_starts_with_host(site.uuid, wanted=True)


def queued(site: Site, recorder: Recorder) -> Job:
    """The job as it was accepted: what a power cut leaves of it."""
    job = site.journal.get(recorder.report.id)
    report = job.report.model_copy(update={"status": Status.QUEUED, "task_state": None})
    return dataclasses.replace(job, report=report)


class Stopping(Instances):
    """The agent stops as soon as something new is in a record."""

    def __init__(self, directory: Path, cancellation: Cancellation) -> None:
        super().__init__(directory)
        self._cancellation = cancellation

    def write(self, record: InstanceRecord) -> Path:
        directory = super().write(record)
        self._cancellation.cancel(AgentStopping("enough"))
        return directory


def restarted(site: Site, run: Callable[[Host, Cancellation], None]) -> Host:
    """Run a job until its plan is in `instance.json`; return the host after the restart."""
    cancellation = Cancellation()
    instances = Stopping(site.kit.directory, cancellation)
    with pytest.raises(AgentStopping):
        run(dataclasses.replace(site.host, instances=instances), cancellation)
    return dataclasses.replace(site.host, instances=Instances(site.kit.directory))


def save(site: Site) -> None:
    """Suspend the guest to disk, as libvirt-guests does when the host goes down."""
    site.hypervisor._libvirt.call(
        "saving at",
        lambda connection: connection.lookupByUUIDString(site.uuid).managedSave(0),  # type: ignore[attr-defined]  # for tests alone
        10,
    )
    assert site.hypervisor.has_saved_state(site.uuid)
