"""What is deleted of an instance, and what is left alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import HypervisorError, InvalidJob
from agent.hypervisor import Hypervisor
from agent.instances import Instances
from agent.removal import remove_instance
from agent.report import Status
from tests.site_kit import TEMPLATE, Site, site

__all__ = ["site"]


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


def test_delete_leaves_a_domain_alone_that_another_tool_defined(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.run(action="prepare")
    site.hypervisor.define(site.foreign_domain())

    remove_instance(site.host, site.kit.instances.find(site.uuid), Cancellation())

    assert site.hypervisor.state(site.uuid) == "shut off"
    assert not site.directory.exists()
    assert site.uuid in caplog.text


def test_delete_takes_no_disk_from_under_a_domain_that_another_tool_defined(site: Site) -> None:
    site.run(action="prepare")
    disk = site.directory / "disk"
    devices = f"<devices><disk><source file='{disk}'/><target dev='vda'/></disk></devices>"
    xml = site.foreign_domain()
    site.hypervisor.define(xml.replace("</domain>", f"{devices}</domain>"))
    site.hypervisor.start(site.uuid)

    with pytest.raises(InvalidJob, match=f"runs on {disk}"):
        remove_instance(site.host, site.kit.instances.find(site.uuid), Cancellation())
    assert disk.exists()

    site.hypervisor.destroy(site.uuid)
    remove_instance(site.host, site.kit.instances.find(site.uuid), Cancellation())
    assert not disk.exists()


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
