"""Changing an instance: a real image cache, real disks, and libvirt's own test driver.

What needs QEMU is in functional/.
"""

import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.domain_changes import sources_of
from agent.errors import (
    AgentStopping,
    Cancelled,
    FlavorDiskSmallerThanImage,
    FlavorDiskSmallerThanMinDisk,
    HypervisorError,
    ImageUnacceptable,
    InvalidJob,
)
from agent.host import Host
from agent.hypervisor import Hypervisor
from agent.instances import InstanceRecord, Instances
from agent.job import JobRequest, parse
from agent.journal import Job, digest_of
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


def second_image(site: Site, **properties: str) -> str:
    """Return the id of another image; called again, it is the same with other properties."""
    source = site.kit.source
    image = source.images.get("another") or source.add(random_bytes(1), image_id="another")
    source.images[image.id] = dataclasses.replace(image, properties=properties)
    return image.id


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


def test_root_disk_that_is_too_small_for_the_image_is_said_to_grow_how(site: Site) -> None:
    site.run()
    image_id = second_image(site)
    source = site.kit.source
    source.images[image_id] = dataclasses.replace(source.images[image_id], min_disk=3)
    request, recorder = accepted(site, "rebuild", image={"id": image_id})
    with pytest.raises(FlavorDiskSmallerThanMinDisk) as caught:
        rebuild(site.host, request, recorder, Cancellation())
    assert caught.value.hint.endswith(f"resize {site.name} --flavor VCPUSxRAM_MIBx3")


def test_root_disk_that_cannot_hold_the_image_is_said_to_grow_how(site: Site) -> None:
    site.run()
    known = record(site)
    small = dataclasses.replace(known.root, virtual_size=512)
    site.kit.instances.write(dataclasses.replace(known, disks=(small,)))
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(FlavorDiskSmallerThanImage) as caught:
        rebuild(site.host, request, recorder, Cancellation())
    assert caught.value.hint.endswith(f"resize {site.name} --flavor VCPUSxRAM_MIBxDISK_GIB")


def test_cd_rom_that_is_too_small_for_the_image_is_not_said_to_grow(site: Site) -> None:
    site.run(libvirt={})
    known = record(site)
    cdrom = dataclasses.replace(known.root, device="cdrom", read_only=True)
    site.kit.instances.write(dataclasses.replace(known, disks=(cdrom,)))
    image_id = second_image(site)
    source = site.kit.source
    source.images[image_id] = dataclasses.replace(source.images[image_id], min_disk=3)
    request, recorder = accepted(site, "rebuild", image={"id": image_id})
    with pytest.raises(FlavorDiskSmallerThanMinDisk) as caught:
        rebuild(site.host, request, recorder, Cancellation())
    assert "boot it anew with a flavor with disk: 3 or more" in caught.value.hint


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


def test_guest_runs_on_when_libvirt_does_not_accept_what_a_rebuild_would_make_of_it(
    site: Site, refusing: Refusing
) -> None:
    site.run(libvirt={})
    before = record(site), boot_id(site), site.hypervisor.xml(site.uuid), files(site)
    image_id = second_image(site, hw_disk_bus="scsi", hw_scsi_model="lsilogic")
    request, recorder = accepted(site, "rebuild", image={"id": image_id})

    with pytest.raises(InvalidJob, match="no such controller"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )

    assert (record(site), boot_id(site), site.hypervisor.xml(site.uuid), files(site)) == before


def test_domain_follows_the_image_it_is_rebuilt_with_wholly(site: Site) -> None:
    flavor = {"vcpus": 2, "ram": 64, "disk": 1, "swap": 8}
    network = {"bridge": "br0", "mac": "52:54:00:12:34:56"}
    site.run(libvirt={}, flavor=flavor, networks=[network])
    attached = "<disk type='block'><source dev='/dev/theirs'/><target dev='sda' bus='sata'/></disk>"
    xml = site.hypervisor.xml(site.uuid).replace("</devices>", f"{attached}</devices>")
    site.hypervisor.define(xml.replace("<metadata>", "<metadata><n:note xmlns:n='urn:n'/>"))
    properties = {
        "hw_disk_bus": "scsi",
        "hw_scsi_model": "lsilogic",
        "hw_vif_model": "e1000",
        "hw_machine_type": "pc",
        "hw_watchdog_action": "reset",
        "hw_qemu_guest_agent": "yes",
        "hw_cpu_cores": "2",
        "hw_cpu_sockets": "1",
        "os_type": "windows",
    }
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site, **properties)})

    rebuild(site.host, request, recorder, Cancellation())

    domain = etree.fromstring(site.hypervisor.xml(site.uuid).encode())
    assert domain.xpath("os/type/@machine") == ["pc"]
    assert domain.xpath("cpu/topology/@cores") == ["2"]
    assert domain.xpath("clock/@offset") == ["localtime"]
    assert domain.xpath("devices/controller[@type='scsi']/@model") == ["lsilogic"]
    assert domain.xpath("devices/watchdog/@action") == ["reset"]
    assert domain.xpath("devices/channel/target/@name") == ["org.qemu.guest_agent.0"]
    # What is ours has new places, what is theirs goes on.
    targets = {
        str(disk.xpath("string(source/@*[name()='file' or name()='dev'])")): disk.find("target")
        for disk in domain.iterfind("devices/disk")
    }
    found = {
        Path(source).name: (target.get("dev"), target.get("bus"))
        for source, target in targets.items()
        if target is not None
    }
    assert found == {
        "disk.rebuilt": ("sda", "scsi"),
        "disk.swap": ("sdb", "scsi"),
        "theirs": ("sdc", "sata"),
    }
    assert {disk.device_name: disk.bus for disk in record(site).disks} == {
        "sda": "scsi",
        "sdb": "scsi",
    }
    assert domain.xpath("devices/interface/mac/@address") == [network["mac"]]
    assert domain.xpath("devices/interface/model/@type") == ["e1000"]
    assert (domain.findtext("vcpu"), domain.findtext("memory")) == ("2", str(64 << 10))
    assert domain.find("metadata/{urn:n}note") is not None
    assert recorder.report.status is Status.ACTIVE
    # And back: all of it is of this domain again.
    request, recorder = accepted(site, "rebuild", image={"id": site.image.id})
    rebuild(site.host, request, recorder, Cancellation())
    domain = etree.fromstring(site.hypervisor.xml(site.uuid).encode())
    assert domain.xpath("os/type/@machine") == ["q35"]
    assert not domain.xpath("devices/controller[@type='scsi'] | devices/watchdog | cpu/topology")
    assert [(disk.path.name, disk.device_name) for disk in record(site).disks] == [
        ("disk", "vda"),
        ("disk.swap", "vdb"),
    ]


def test_iso_becomes_a_cd_rom_whatever_was_there_before(site: Site) -> None:
    site.run(libvirt={})
    volume = bytes(32 << 10) + b"\x01CD001\x01" + bytes(1 << 20)
    image = site.kit.source.add(volume, image_id="installer", disk_format="iso")
    request, recorder = accepted(site, "rebuild", image={"id": image.id})

    rebuild(site.host, request, recorder, Cancellation())

    domain = etree.fromstring(site.hypervisor.xml(site.uuid).encode())
    assert domain.xpath("devices/disk/@device") == ["cdrom"]
    assert domain.xpath("devices/disk/target/@bus") == ["sata"]


def test_instance_whose_new_disk_does_not_start_runs_on_its_old_one(
    site: Site, refusing: Refusing
) -> None:
    site.run()
    before = record(site), site.hypervisor.xml(site.uuid), files(site)
    refusing.refused = str(site.directory / "disk.rebuilt")
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})

    with pytest.raises(HypervisorError, match="QEMU says no"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )

    assert (record(site), site.hypervisor.xml(site.uuid), files(site)) == before
    assert site.hypervisor.state(site.uuid) == "running"


def with_uefi(site: Site) -> None:
    """Boot an instance whose firmware has variables, which starts with the host."""
    site.kit.source.images[site.image.id] = dataclasses.replace(
        site.image, properties={"hw_firmware_type": "uefi"}
    )
    site.run(libvirt={})
    site.hypervisor.set_starts_with_host(site.uuid, wanted=True)


def test_variables_of_the_firmware_that_a_failed_rebuild_had_to_give_up_are_told_of(
    site: Site, refusing: Refusing
) -> None:
    with_uefi(site)
    before = record(site), site.hypervisor.xml(site.uuid), files(site)
    refusing.refused = str(site.directory / "disk.rebuilt")
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})

    with pytest.raises(
        HypervisorError, match=r"says no; .* is gone, .*; its disks are as they were$"
    ):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )

    assert (record(site), site.hypervisor.xml(site.uuid), files(site)) == before
    assert site.hypervisor.state(site.uuid) == "running"
    assert site.hypervisor.starts_with_host(site.uuid)


def test_instance_whose_firmware_gets_its_first_variables_has_lost_none(
    site: Site, refusing: Refusing
) -> None:
    site.run(libvirt={})
    refusing.refused = str(site.directory / "disk.rebuilt")
    image_id = second_image(site, hw_firmware_type="uefi")
    request, recorder = accepted(site, "rebuild", image={"id": image_id})
    with pytest.raises(HypervisorError, match=r"QEMU says no$"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )


class Keeping(Refusing):
    """Keeps variables as QEMU's driver does: from a start until the domain is undefined."""

    kept: str | None = None
    """On which root disk the firmware was that has begun them."""
    failures: tuple[Exception, ...] = ()
    """They come, each once, instead of the definition of a domain on the old disk."""

    def define(self, xml: str) -> None:
        if self.failures and "disk.rebuilt" not in xml:
            failure, *others = self.failures
            self.failures = tuple(others)
            raise failure
        super().define(xml)

    def start(self, uuid: str) -> None:
        (root,) = sources_of(self.xml(uuid))
        self.kept = self.kept or Path(root).name
        super().start(uuid)

    def undefine(self, uuid: str) -> None:
        super().undefine(uuid)
        self.kept = None


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    hypervisor = Keeping("test:///default", virt_type="test")
    hypervisor.kept = "since it was made"
    yield hypervisor
    hypervisor.close()


def test_variables_that_nothing_has_touched_outlive_a_rebuild_that_fails(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (HypervisorError("defining: no answer"),)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})

    with pytest.raises(HypervisorError, match=r"no answer; .* may be gone"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=keeping), request, recorder, Cancellation()
        )

    assert keeping.kept == "since it was made"
    assert site.hypervisor.state(site.uuid) == "running"


def test_variables_that_nothing_has_touched_outlive_a_crash_and_a_cancellation(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (AgentStopping("enough"),)
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(AgentStopping):
        rebuild(host, request, recorder, Cancellation())
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))

    with pytest.raises(Cancelled):
        rebuild(host, request, Recorder(site.journal, queued(site, recorder)), cancellation)

    assert keeping.kept == "since it was made"
    assert site.hypervisor.state(site.uuid) == "running"


def test_variables_that_nothing_has_touched_outlive_the_next_rebuild(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (HypervisorError("defining: no answer"),)
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError):
        rebuild(host, request, recorder, Cancellation())

    image = {"id": second_image(site, hw_firmware_type="uefi")}
    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(host, request, recorder, Cancellation())

    assert keeping.kept == "since it was made"


def test_old_domain_does_not_get_the_variables_of_the_new_one(site: Site, keeping: Keeping) -> None:
    with_uefi(site)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(HypervisorError, match="QEMU says no"):
        rebuild(host, request, recorder, Cancellation())
    assert keeping.kept == "disk"


def test_variables_since_the_old_domain_is_back_are_kept(site: Site, keeping: Keeping) -> None:
    with_uefi(site)
    before = site.hypervisor.xml(site.uuid)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError):
        rebuild(host, request, recorder, Cancellation())
    # Its owner goes back by hand.
    keeping.define(before)
    keeping.kept = "since it is back"
    keeping.refused = None

    image = {"id": second_image(site, hw_firmware_type="uefi")}
    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(host, request, recorder, Cancellation())

    assert keeping.kept == "since it is back"


def test_disks_are_not_said_to_be_as_they_were_when_nothing_is_undone(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError, match=r"TPM had kept is gone, .* recovery key$"):
        rebuild(host, request, recorder, Cancellation())


def test_disks_are_not_said_to_be_as_they_were_when_the_undoing_fails(
    site: Site, keeping: Keeping, caplog: pytest.LogCaptureFixture
) -> None:
    with_uefi(site)
    keeping.failures = HypervisorError("no answer"), HypervisorError("no answer again")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(HypervisorError, match=r"TPM had kept may be gone, .* recovery key$"):
        rebuild(host, request, recorder, Cancellation())
    assert "is left half rebuilt: no answer again" in caplog.text


class Forgetful(Hypervisor):
    """The agent is gone as soon as a domain is undefined."""

    def undefine(self, uuid: str) -> None:
        super().undefine(uuid)
        raise AgentStopping("enough")


def test_domain_that_a_crash_has_left_undefined_starts_with_its_host_as_before(site: Site) -> None:
    with_uefi(site)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    forgetful = Forgetful("test:///default", virt_type="test")
    with pytest.raises(AgentStopping):
        rebuild(
            dataclasses.replace(site.host, hypervisor=forgetful), request, recorder, Cancellation()
        )
    forgetful.close()
    assert site.hypervisor.state(site.uuid) is None

    rebuild(site.host, request, Recorder(site.journal, queued(site, recorder)), Cancellation())

    assert site.hypervisor.state(site.uuid) == "running"
    assert site.hypervisor.starts_with_host(site.uuid)
    assert sources_of(site.hypervisor.xml(site.uuid)) == {str(record(site).root.path)}


def test_what_a_rebuild_has_left_half_done_goes_with_the_next(
    site: Site, refusing: Refusing
) -> None:
    site.run()
    refusing.refused = str(site.directory / "disk.rebuilt")
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )
    assert files(site) == {"console.log", "disk", "disk.rebuilt", "instance.json"}

    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(site.host, request, recorder, Cancellation())

    assert record(site).root.path.name == "disk.rebuilt"
    assert files(site) == {"console.log", "disk.rebuilt", "instance.json"}
    assert sources_of(site.hypervisor.xml(site.uuid, live=True)) == {str(record(site).root.path)}
    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(site.host, request, recorder, Cancellation())
    assert files(site) == {"console.log", "disk", "instance.json"}


def test_rebuild_that_a_crash_interrupts_goes_on_with_the_images_it_began_with(site: Site) -> None:
    site.run()
    kernel = site.kit.source.add(random_bytes(1), image_id="kernel", disk_format="aki")
    image_id = second_image(site, kernel_id=kernel.id, os_command_line="quiet")
    request, recorder = accepted(site, "rebuild", image={"id": image_id})
    host = restarted(site, lambda host, stops: rebuild(host, request, recorder, stops))
    assert host.instances.find(site.uuid).rebuild is not None
    second_image(site, os_command_line="loud")  # the same id; it has no kernel any more

    rebuild(host, request, Recorder(site.journal, queued(site, recorder)), Cancellation())

    xml = etree.fromstring(site.hypervisor.xml(site.uuid).encode())
    assert xml.findtext("os/kernel") == str(site.directory / "kernel")
    assert xml.findtext("os/cmdline") == "quiet"
    known = host.instances.find(site.uuid)
    assert known.image_properties == {"kernel_id": "kernel", "os_command_line": "quiet"}


class Last(Hypervisor):
    """The agent is gone as soon as a domain has started."""

    def start(self, uuid: str) -> None:
        super().start(uuid)
        raise AgentStopping("enough")


def test_guest_that_runs_on_its_new_disk_is_not_started_twice(site: Site) -> None:
    site.run()
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    last = Last("test:///default", virt_type="test")
    with pytest.raises(AgentStopping):
        rebuild(dataclasses.replace(site.host, hypervisor=last), request, recorder, Cancellation())
    last.close()
    running = boot_id(site)

    rebuild(site.host, request, Recorder(site.journal, queued(site, recorder)), Cancellation())

    assert boot_id(site) == running
    assert files(site) == {"console.log", "disk.rebuilt", "instance.json"}


def test_rebuild_that_is_cancelled_after_its_end_has_ended_well(site: Site) -> None:
    site.run()
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    rebuild(site.host, request, recorder, Cancellation())
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("too late"))
    again = Recorder(site.journal, queued(site, recorder))

    rebuild(site.host, request, again, cancellation)

    assert again.report.status is Status.ACTIVE


def test_domain_that_a_crash_has_left_undefined_comes_back_rebuilt(site: Site) -> None:
    site.run()
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    host = restarted(site, lambda host, stops: rebuild(host, request, recorder, stops))
    # As somebody does who looks for what is not running.
    site.hypervisor.destroy(site.uuid)
    site.hypervisor.undefine(site.uuid)

    rebuild(host, request, Recorder(site.journal, queued(site, recorder)), Cancellation())

    assert site.hypervisor.state(site.uuid) == "running"
    assert sources_of(site.hypervisor.xml(site.uuid)) == {str(site.directory / "disk.rebuilt")}


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

    def write(self, record: InstanceRecord, *, settle: bool = True) -> Path:
        directory = super().write(record, settle=settle)
        self._cancellation.cancel(AgentStopping("enough"))
        return directory


def restarted(site: Site, run: Callable[[Host, Cancellation], None]) -> Host:
    """Run a job until its plan is in `instance.json`; return the host after the restart."""
    cancellation = Cancellation()
    instances = Stopping(site.kit.directory, cancellation)
    with pytest.raises(AgentStopping):
        run(dataclasses.replace(site.host, instances=instances), cancellation)
    return dataclasses.replace(site.host, instances=Instances(site.kit.directory))


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


@pytest.mark.parametrize(
    "properties",
    [{"hw_scsi_model": "lsilogic"}, {"hw_firmware_type": "uefi"}, {"os_type": "windows"}],
)
def test_domain_of_its_owners_own_is_not_made_to_another_image(
    site: Site, properties: dict[str, str]
) -> None:
    site.run()
    before = record(site)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site, **properties)})
    with pytest.raises(InvalidJob, match="its owner's own"):
        rebuild(site.host, request, recorder, Cancellation())
    assert record(site) == before
    assert [opened for opened, _ in site.kit.source.opened].count("another") == 0


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
