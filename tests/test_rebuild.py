"""Rebuilding an instance with another image, or the same one."""

import dataclasses
import os
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.domain_facts import sources_of
from agent.errors import (
    AgentStopping,
    Cancelled,
    FlavorDiskSmallerThanImage,
    FlavorDiskSmallerThanMinDisk,
    HypervisorError,
    InvalidJob,
)
from agent.hypervisor import Hypervisor
from agent.instances import InstanceRecord, Instances
from agent.rebuild import rebuild
from agent.recorder import Recorder
from agent.report import Status
from tests.cache_kit import random_bytes
from tests.change_kit import (
    Refusing,
    Waking,
    accepted,
    boot_id,
    files,
    queued,
    record,
    refusing,
    restarted,
    save,
    second_image,
    waking,
    with_uefi,
)
from tests.site_kit import TEMPLATE, Site, site

__all__ = ["refusing", "site", "waking"]


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


def test_rebuild_gives_up_the_memory_that_knows_the_old_disk(site: Site) -> None:
    site.run()
    save(site)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    rebuild(site.host, request, recorder, Cancellation())
    assert not site.hypervisor.has_saved_state(site.uuid)


class CutOff(Instances):
    """The agent is gone before it can take down that the new disks are the instance's."""

    def write(self, record: InstanceRecord) -> Path:
        if record.rebuilt_by is not None:
            raise AgentStopping("enough")
        return super().write(record)


def test_way_back_from_a_rebuild_does_not_wake_what_knows_the_new_disk(
    site: Site, waking: Waking
) -> None:
    site.run()
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    job = queued(site, recorder)
    cut_off = dataclasses.replace(site.host, instances=CutOff(site.kit.directory))
    with pytest.raises(AgentStopping):
        rebuild(cut_off, request, recorder, Cancellation())
    assert sources_of(site.hypervisor.xml(site.uuid)) == {str(site.directory / "disk.rebuilt")}
    save(site)  # by the host, which goes down too
    enough = Cancellation()
    enough.cancel(Cancelled("enough"))

    host = dataclasses.replace(
        site.host, hypervisor=waking, instances=Instances(site.kit.directory)
    )
    with pytest.raises(Cancelled):
        rebuild(host, request, Recorder(site.journal, job), enough)

    assert sources_of(waking.xml(site.uuid, live=True)) == {str(site.directory / "disk")}
    assert not (site.directory / "disk.rebuilt").exists()
