"""Rescuing an instance from a disk of its own, and the way back."""

import dataclasses
import uuid
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.domain_facts import sources_of
from agent.errors import ImageUnacceptable, InvalidJob
from agent.recorder import Recorder
from agent.report import Status
from agent.rescue import rescue, unrescue
from tests.cache_kit import random_bytes
from tests.change_kit import (
    Waking,
    Watching,
    accepted,
    boot_id,
    queued,
    record,
    restarted,
    save,
    second_image,
    waking,
)
from tests.site_kit import Site, site

__all__ = ["site", "waking"]


def test_rescue_that_a_crash_interrupts_goes_on_with_the_images_it_began_with(site: Site) -> None:
    site.run()
    kernel = site.kit.source.add(random_bytes(1), image_id="kernel", disk_format="aki")
    image_id = second_image(site, os_command_line="quiet")
    request, recorder = accepted(site, "rescue", image={"id": image_id})
    host = restarted(site, lambda host, stops: rescue(host, request, recorder, stops))
    assert host.instances.find(site.uuid).rescue is not None
    second_image(site, kernel_id=kernel.id, os_command_line="loud")

    rescue(host, request, Recorder(site.journal, queued(site, recorder)), Cancellation())

    xml = site.hypervisor.xml(site.uuid)
    assert etree.fromstring(xml.encode()).find("os/kernel") is None
    assert str(site.directory / "disk.rescue") in sources_of(xml)


def test_instance_that_demands_signed_images_demands_them_for_its_rescue(site: Site) -> None:
    site.run()
    known = record(site)
    assert known.origin is not None
    origin = dataclasses.replace(known.origin, trusted_certificates=(str(uuid.uuid4()),))
    site.kit.instances.write(dataclasses.replace(known, origin=origin))
    request, recorder = accepted(site, "rescue")

    with pytest.raises(ImageUnacceptable, match="sign"):
        rescue(site.host, request, recorder, Cancellation())

    assert record(site).rescue is None


def test_rescue_does_not_wake_a_guest_that_is_suspended_to_disk(site: Site) -> None:
    site.run()
    save(site)
    request, recorder = accepted(site, "rescue")
    with pytest.raises(InvalidJob, match="suspended to disk"):
        rescue(site.host, request, recorder, Cancellation())
    assert record(site).rescue is None
    assert site.hypervisor.has_saved_state(site.uuid)


@pytest.mark.parametrize("changed", ["image gone", "deadline passed"])
def test_rescue_that_runs_is_left_alone_by_the_run_after_a_crash(site: Site, changed: str) -> None:
    site.run()
    image_id = site.kit.source.add(random_bytes(1), image_id="tools").id
    request, recorder = accepted(site, "rescue", image={"id": image_id})
    job = queued(site, recorder)
    rescue(site.host, request, recorder, Cancellation())
    if changed == "image gone":
        del site.kit.source.images[image_id]
    late = Cancellation(1, elapsed_s=2) if changed == "deadline passed" else Cancellation()

    again = Recorder(site.journal, job)
    rescue(site.host, request, again, late)

    assert again.report.status is Status.ACTIVE
    assert record(site).rescue is not None
    xml = site.hypervisor.xml(site.uuid, live=True)
    assert str(site.directory / "disk.rescue") in sources_of(xml)


def test_unrescue_has_begun_before_it_changes_anything(site: Site, tmp_path: Path) -> None:
    site.run()
    request, recorder = accepted(site, "rescue")
    rescue(site.host, request, recorder, Cancellation())
    request, recorder = accepted(site, "unrescue")
    watching = Watching(tmp_path / "journal.db")
    unrescue(dataclasses.replace(site.host, hypervisor=watching), request, recorder, Cancellation())
    watching.close()
    assert watching.left == [Status.BUILD]


def test_unrescue_whose_last_word_a_power_cut_took_back_has_ended_well(site: Site) -> None:
    site.run()
    request, recorder = accepted(site, "rescue")
    rescue(site.host, request, recorder, Cancellation())
    request, recorder = accepted(site, "unrescue")
    queued = site.journal.get(recorder.report.id)
    unrescue(site.host, request, recorder, Cancellation())
    assert record(site).rescue is None

    again = Recorder(site.journal, queued)
    unrescue(site.host, request, again, Cancellation())

    assert again.report.status is Status.ACTIVE
    request, recorder = accepted(site, "unrescue")
    with pytest.raises(InvalidJob, match="is not being rescued"):
        unrescue(site.host, request, recorder, Cancellation())


def attach(site: Site, device: str) -> None:
    """As 'virsh attach-disk --config' does it."""
    xml = site.hypervisor.xml(site.uuid)
    disk = f"<disk type='block'><source dev='/dev/theirs'/>{device}</disk>"
    site.hypervisor.define(xml.replace("</devices>", f"{disk}</devices>"))


def boot(site: Site, **properties: str) -> None:
    """Boot an image with those properties."""
    image = dataclasses.replace(site.image, properties=properties)
    site.kit.source.images[image.id] = image
    site.run(libvirt={})


def test_rescue_disk_takes_no_place_of_a_disk_that_somebody_has_attached(site: Site) -> None:
    boot(site, hw_disk_bus="scsi")
    attach(site, "<target dev='sdb' bus='scsi'/><address type='drive' controller='0' unit='1'/>")
    request, recorder = accepted(site, "rescue")

    rescue(site.host, request, recorder, Cancellation())

    domain = etree.fromstring(site.hypervisor.xml(site.uuid, live=True).encode())
    places = {
        str(disk.xpath("string(target/@dev)")): str(disk.xpath("string(address/@unit)"))
        for disk in domain.iterfind("devices/disk")
    }
    assert places == {"sda": "0", "sdb": "1", "sdc": "2"}


def test_rescue_for_which_the_bus_has_no_place_is_refused_before_its_image_is_fetched(
    site: Site,
) -> None:
    boot(site, hw_disk_bus="ide")
    for name in ("hdb", "hdc", "hdd"):
        attach(site, f"<target dev='{name}' bus='ide'/>")
    before = boot_id(site), record(site)
    request, recorder = accepted(site, "rescue", image={"id": second_image(site)})

    with pytest.raises(ImageUnacceptable, match="4 places for 5 disks"):
        rescue(site.host, request, recorder, Cancellation())

    assert (boot_id(site), record(site)) == before
    assert [opened for opened, _ in site.kit.source.opened].count("another") == 0
    image_id = second_image(site, hw_rescue_bus="usb")
    request, recorder = accepted(site, "rescue", image={"id": image_id})
    rescue(site.host, request, recorder, Cancellation())
    assert record(site).disks[-1].bus == "usb"


def test_rescue_on_a_bus_that_the_machine_does_not_have_is_refused_before_its_image_is_fetched(
    site: Site,
) -> None:
    boot(site)
    image_id = second_image(site, hw_rescue_bus="ide")
    request, recorder = accepted(site, "rescue", image={"id": image_id})
    with pytest.raises(ImageUnacceptable, match=r"hw_rescue_bus .* q35, has no IDE"):
        rescue(site.host, request, recorder, Cancellation())
    assert [opened for opened, _ in site.kit.source.opened].count("another") == 0


def test_unrescue_does_not_wake_a_rescue_that_is_suspended_to_disk(
    site: Site, waking: Waking
) -> None:
    site.run()
    request, recorder = accepted(site, "rescue")
    rescue(site.host, request, recorder, Cancellation())
    save(site)
    request, recorder = accepted(site, "unrescue")

    unrescue(dataclasses.replace(site.host, hypervisor=waking), request, recorder, Cancellation())

    assert sources_of(site.hypervisor.xml(site.uuid, live=True)) == {str(site.directory / "disk")}


def test_rescue_that_fails_leaves_a_guest_alone_that_has_been_suspended_meanwhile(
    site: Site,
) -> None:
    site.run()
    image_id = second_image(site)
    request, recorder = accepted(site, "rescue", image={"id": image_id})
    touched = site.host.touch

    def suspended_meanwhile(base: str) -> None:
        touched(base)
        save(site)

    host = dataclasses.replace(site.host, touch=suspended_meanwhile)
    with pytest.raises(InvalidJob, match="suspended to disk"):
        rescue(host, request, recorder, Cancellation())
    assert site.hypervisor.has_saved_state(site.uuid)
    assert record(site).rescue is None
