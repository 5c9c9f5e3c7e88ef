"""Changing an instance: a real image cache, real disks, and libvirt's own test driver.

What needs QEMU is in functional/.
"""

import dataclasses
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.errors import Cancelled, InvalidJob
from agent.instances import InstanceRecord
from agent.job import JobRequest, parse
from agent.journal import digest_of
from agent.rebuild import rebuild
from agent.recorder import Recorder
from agent.report import JobReport, Status
from agent.rescue import rescue, unrescue
from agent.resize import resize
from tests.cache_kit import random_bytes
from tests.test_build import TEMPLATE, Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.hypervisor.destroy(site.uuid)
    site.hypervisor.discard_saved_state(site.uuid)
    site.hypervisor.undefine(site.uuid)
    site.hypervisor.close()
    site.journal.close()


def accepted(site: Site, action: str, **fields: object) -> tuple[JobRequest, Recorder]:
    request = parse(
        {"action": action, "instance": {"name": site.name, "uuid": site.uuid}, **fields}
    )
    report = JobReport(
        id=str(uuid.uuid4()),
        action=request.action,
        status=Status.QUEUED,
        request_id="req-1",
        created_at=0,
        updated_at=0,
    )
    site.journal.accept(request, report, body_digest=digest_of(request))
    return request, Recorder(site.journal, site.journal.get(report.id))


def record(site: Site) -> InstanceRecord:
    return site.kit.instances.find(site.uuid)


def second_image(site: Site) -> str:
    return site.kit.source.add(random_bytes(1), image_id="another").id


def test_rebuild_that_is_cancelled_before_it_begins_leaves_the_disk(site: Site) -> None:
    site.run()
    image_id = second_image(site)
    site.kit.fetch(site.kit.source.images[image_id])  # so that nothing has to be waited for
    before = record(site), record(site).root.path.stat().st_ino
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    request, recorder = accepted(site, "rebuild", image={"id": image_id})

    with pytest.raises(Cancelled):
        rebuild(site.host, request, recorder, cancellation)

    assert (record(site), record(site).root.path.stat().st_ino) == before
    assert site.hypervisor.state(site.uuid) == "running"


def test_rebuild_that_came_to_its_end_is_not_done_again(site: Site) -> None:
    site.run()
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    rebuild(site.host, request, recorder, Cancellation())
    root = record(site).root.path
    with root.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"what the guest wrote")
    written = root.read_bytes()

    rebuild(site.host, request, recorder, Cancellation())

    assert root.read_bytes() == written
    assert recorder.report.status is Status.ACTIVE


def test_rebuild_keeps_a_kernel_of_the_owners_own(site: Site) -> None:
    template = TEMPLATE.replace("</os>", "<kernel>/boot/mine</kernel></os>")
    site.run(libvirt={"domain_xml": template})
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    rebuild(site.host, request, recorder, Cancellation())
    xml = etree.fromstring(site.hypervisor.xml(site.uuid).encode())
    assert xml.findtext("os/kernel") == "/boot/mine"


def test_rescue_does_not_wake_a_guest_that_is_suspended_to_disk(site: Site) -> None:
    site.run()
    save(site)
    request, recorder = accepted(site, "rescue")
    with pytest.raises(InvalidJob, match="suspended to disk"):
        rescue(site.host, request, recorder, Cancellation())
    assert record(site).rescue is None
    assert site.hypervisor.has_saved_state(site.uuid)


def test_rebuild_gives_up_the_memory_that_knows_the_old_disk(site: Site) -> None:
    site.run()
    save(site)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    rebuild(site.host, request, recorder, Cancellation())
    assert not site.hypervisor.has_saved_state(site.uuid)


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


def save(site: Site) -> None:
    """Suspend the guest to disk, as libvirt-guests does when the host goes down."""
    site.hypervisor._libvirt.call(
        "saving at",
        lambda connection: connection.lookupByUUIDString(site.uuid).managedSave(0),  # type: ignore[attr-defined]  # for tests alone
        10,
    )
    assert site.hypervisor.has_saved_state(site.uuid)


def test_resize_never_shrinks(site: Site) -> None:
    site.run(flavor={"vcpus": 1, "ram": 64, "disk": 2})
    flavor = {"vcpus": 1, "ram": 64, "disk": 1}
    request, recorder = accepted(site, "resize", flavor=flavor)
    with pytest.raises(InvalidJob, match="would shrink"):
        resize(site.host, request, recorder, Cancellation())
    assert record(site).root.virtual_size == 2 << 30


def test_ploop_image_is_not_grown_under_a_guest(site: Site) -> None:
    site.run()
    known = record(site)
    root = dataclasses.replace(known.root, format="ploop")
    site.kit.instances.write(dataclasses.replace(known, disks=(root,)))
    flavor = {"vcpus": 1, "ram": 64, "disk": 2}
    request, recorder = accepted(site, "resize", flavor=flavor)
    with pytest.raises(InvalidJob, match="cannot grow the ploop image"):
        resize(site.host, request, recorder, Cancellation())
