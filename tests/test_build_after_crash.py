"""Building an instance goes on after a crash of the agent."""

from dataclasses import replace

import pytest

from agent.build import Build
from agent.cancellation import Cancellation
from agent.errors import BackendError, Cancelled, DeadlineExceeded, HypervisorError, ImageNotFound
from agent.hypervisor import Hypervisor
from agent.recorder import EndNotRecorded, Recorder
from agent.report import Status
from tests.cache_kit import random_bytes
from tests.site_kit import Site, site

__all__ = ["site"]


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
