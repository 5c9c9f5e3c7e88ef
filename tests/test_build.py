"""Building an instance: a real image cache, real disks, and libvirt's own test driver.

What needs QEMU is in functional/.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from agent.backends import Backends
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import BootwrightError, InstanceExists, InsufficientFreeSpace, InvalidJob
from agent.files import Together
from agent.hypervisor import Hypervisor
from agent.instances import InstanceRecord, Instances
from agent.job import ImagesType
from agent.manifest import base_name
from agent.qemu_img import QemuImg
from agent.removal import remove_instance
from tests.cache_kit import random_bytes
from tests.site_kit import BROKEN_TEMPLATE, Site, site

__all__ = ["site"]


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


def test_disks_of_a_type_the_host_does_not_keep_are_refused_before_anything_is_fetched(
    site: Site,
) -> None:
    with pytest.raises(InvalidJob, match="keeps no lvm disks, only qcow2, raw"):
        site.run(images_type="lvm")
    assert site.kit.source.opened == []
    assert not site.directory.exists()


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


class Looking(Flat):
    """Notes which record the instances' directory has when a disk is about to be made."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.found: list[InstanceRecord] = []

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        self.found += Instances(self._directory).all()
        super().prepare(disk, base, cancellation)


def test_record_is_there_before_a_disk_that_is_copied(site: Site) -> None:
    kernel = site.kit.source.add(random_bytes(1), image_id="kernel", disk_format="aki")
    site.kit.source.images[site.image.id] = replace(site.image, properties={"kernel_id": kernel.id})
    flat = Looking(site.kit.directory)
    backends = Backends({ImagesType.QCOW2: site.host.backends[ImagesType.QCOW2],
                         ImagesType.RAW: flat})  # fmt: skip
    site.run(replace(site.host, backends=backends))
    assert flat.found == [site.kit.instances.get(site.uuid)]


class Refusing(Qcow2):
    """Has made a file of an overlay when there is no space any more."""

    def overlay(
        self, disk: Disk, base: Base, together: Together, cancellation: Cancellation
    ) -> None:
        super().overlay(disk, base, together, cancellation)
        raise InsufficientFreeSpace("it is full", "make room")


@pytest.mark.parametrize("on_failure", ["cleanup", "keep"])
def test_overlay_that_cannot_be_made_leaves_no_instance(site: Site, on_failure: str) -> None:
    backends = Backends({ImagesType.QCOW2: Refusing(QemuImg())})
    with pytest.raises(InsufficientFreeSpace):
        site.run(replace(site.host, backends=backends), on_failure=on_failure)
    assert site.kit.instances.all() == []
    assert not site.kit.instances.directory_of(site.uuid).exists()


@pytest.mark.parametrize(
    ("networks", "template", "told"),
    [
        ([], "<domain/>", True),
        ([{"bridge": "br0"}], "<domain/>", True),
        ([], "<domain><devices><interface type='user'/></devices></domain>", False),
        (None, "<domain><devices><interface type='user'/></devices></domain>", False),
    ],
)
def test_config_drive_tells_of_the_cards_there_are_if_all_are_known(
    site: Site, networks: list[dict[str, str]] | None, template: str, told: bool
) -> None:
    instance = {"name": site.name, "uuid": site.uuid, "config_drive": True}
    libvirt = {"define": False, "start": False, "domain_xml": template}
    site.run(instance=instance, networks=networks, libvirt=libvirt)
    drive = (site.directory / "disk.config").read_bytes()
    assert (b'"services": []' in drive) is told
