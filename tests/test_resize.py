"""Resizing an instance."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.errors import HypervisorError, ImageUnacceptable, InvalidJob
from agent.hypervisor import Hypervisor
from agent.rebuild import rebuild
from agent.report import Status
from agent.rescue import rescue
from agent.resize import resize
from tests.change_kit import Watching, accepted, record, second_image
from tests.site_kit import Site, site

__all__ = ["site"]


def test_resize_never_shrinks(site: Site) -> None:
    site.run(flavor={"vcpus": 1, "ram": 64, "disk": 2})
    flavor = {"vcpus": 1, "ram": 64, "disk": 1}
    request, recorder = accepted(site, "resize", flavor=flavor)
    with pytest.raises(InvalidJob, match="would shrink"):
        resize(site.host, request, recorder, Cancellation())
    assert record(site).root.virtual_size == 2 << 30


def test_resize_has_begun_before_it_changes_anything(site: Site, tmp_path: Path) -> None:
    site.run()
    site.hypervisor.destroy(site.uuid)
    watching = Watching(tmp_path / "journal.db")
    host = dataclasses.replace(site.host, hypervisor=watching)
    flavor = {"vcpus": 2, "ram": 64, "disk": 1}
    request, recorder = accepted(site, "resize", flavor=flavor)
    resize(host, request, recorder, Cancellation())
    watching.close()
    assert watching.left == [Status.BUILD]


class Growing(Hypervisor):
    """libvirt's test driver grows no disk, and says of each that it has a TiB."""

    size = 1 << 30

    def disk_size(self, _uuid: str, _device_name: str) -> int:
        return self.size

    def resize_disk(self, _uuid: str, _device_name: str, virtual_size: int) -> None:
        self.size = virtual_size


@pytest.fixture
def growing() -> Iterator[Growing]:
    hypervisor = Growing("test:///default", virt_type="test")
    yield hypervisor
    hypervisor.close()


def test_disk_that_somebody_else_has_grown_is_not_cut_under_its_guest(
    site: Site, growing: Growing
) -> None:
    site.run()
    growing.size = 5 << 30  # as by 'virsh blockresize', or by a job that a crash cut off
    host = dataclasses.replace(site.host, hypervisor=growing)

    for disk in (1, 3):
        flavor = {"vcpus": 1, "ram": 64, "disk": disk}
        request, recorder = accepted(site, "resize", flavor=flavor)
        with pytest.raises(InvalidJob, match=f"has {5 << 30} bytes and would shrink"):
            resize(host, request, recorder, Cancellation())
    assert growing.size == 5 << 30

    for disk, size in ((0, 5), (6, 6)):
        flavor = {"vcpus": 1, "ram": 64, "disk": disk}
        request, recorder = accepted(site, "resize", flavor=flavor)
        resize(host, request, recorder, Cancellation())
        assert (growing.size, record(site).root.virtual_size) == (size << 30, size << 30)


def test_ploop_image_is_not_grown_under_a_guest(site: Site, growing: Growing) -> None:
    site.run()
    known = record(site)
    root = dataclasses.replace(known.root, format="ploop")
    site.kit.instances.write(dataclasses.replace(known, disks=(root,)))
    flavor = {"vcpus": 1, "ram": 64, "disk": 2}
    request, recorder = accepted(site, "resize", flavor=flavor)
    with pytest.raises(InvalidJob, match="cannot grow the ploop image"):
        resize(
            dataclasses.replace(site.host, hypervisor=growing), request, recorder, Cancellation()
        )


def resized(site: Site, *, vcpus: int, disk: int = 0) -> etree._Element:
    """Return the domain after a resize."""
    flavor = {"vcpus": vcpus, "ram": 64, "disk": disk}
    request, recorder = accepted(site, "resize", flavor=flavor)
    resize(site.host, request, recorder, Cancellation())
    return domain(site)


def domain(site: Site) -> etree._Element:
    return etree.fromstring(site.hypervisor.xml(site.uuid).encode())


def booted(site: Site, **properties: str) -> None:
    """Boot an instance with two processors, of an image with those properties."""
    image = dataclasses.replace(site.image, properties=properties)
    site.kit.source.images[image.id] = image
    networks = [{"bridge": "br0", "mac": "52:54:00:12:34:56"}]
    flavor = {"vcpus": 2, "ram": 64, "disk": 1}
    # Shut off: libvirt's test driver grows no disk under a guest.
    site.run(libvirt={"start": False}, flavor=flavor, networks=networks)


def test_processors_are_arranged_as_the_image_wants_it_after_a_resize_too(site: Site) -> None:
    booted(site, hw_cpu_max_sockets="1", hw_vif_multiqueue_enabled="true")
    assert domain(site).xpath("cpu/topology/@cores") == ["2"]

    # Of a disk alone: all else is as it was.
    assert resized(site, vcpus=2, disk=2).xpath("cpu/topology/@cores") == ["2"]

    for vcpus, queues in ((4, ["4"]), (1, []), (2, ["2"])):
        after = resized(site, vcpus=vcpus)
        assert after.xpath("cpu/topology/@sockets") == ["1"]
        assert after.xpath("cpu/topology/@cores") == [str(vcpus)]
        assert after.findtext("vcpu") == str(vcpus)
        assert after.xpath("devices/interface/driver/@queues") == queues


def test_more_processors_than_the_image_can_bear_are_refused_before_its_disk_grows(
    site: Site,
) -> None:
    booted(site, hw_cpu_max_sockets="1", hw_cpu_max_cores="2", hw_cpu_max_threads="1")
    before = domain(site).findtext("vcpu"), record(site)
    with pytest.raises(ImageUnacceptable, match="leave no room for the flavor's 4 processors"):
        resized(site, vcpus=4, disk=2)
    assert (domain(site).findtext("vcpu"), record(site)) == before


@pytest.mark.parametrize(
    ("other", "accepts"),
    [
        ({}, True),
        ({"ephemeral": [{"size": 1}, {"size": 2}], "swap": 8}, True),
        ({"ephemeral": [{"size": 1}, {"size": 3}]}, False),
        ({"ephemeral": [{"size": 1}, {"size": 1}]}, False),
        ({"ephemeral": [{"size": 1}]}, False),
        ({"swap": 9}, False),
    ],
    ids=str,
)
def test_flavor_with_other_empty_disks_is_refused_and_not_half_done(
    site: Site, other: dict[str, object], accepts: bool
) -> None:
    blanks = [{"size": size, "guest_format": "none"} for size in (1, 2)]
    flavor = {"vcpus": 1, "ram": 64, "disk": 1, "ephemeral": blanks, "swap": 8}
    site.run(action="prepare", libvirt={}, flavor=flavor)
    flavor = {"vcpus": 1, "ram": 64, "disk": 2, **other}
    request, recorder = accepted(site, "resize", flavor=flavor)
    if accepts:
        resize(site.host, request, recorder, Cancellation())
    else:
        with pytest.raises(InvalidJob, match=r"leave flavor\.(ephemeral|swap) out"):
            resize(site.host, request, recorder, Cancellation())
    assert record(site).root.virtual_size == (2 if accepts else 1) << 30


def test_what_a_domains_owner_has_said_of_its_processors_outlives_a_resize(site: Site) -> None:
    booted(site)
    xml = site.hypervisor.xml(site.uuid)
    said = xml.replace("<vcpu placement='static'>2<", "<vcpu placement='static' cpuset='0'>2<")
    site.hypervisor.define(said)

    assert resized(site, vcpus=2, disk=2).xpath("vcpu/@cpuset") == ["0"]
    assert resized(site, vcpus=3).xpath("vcpu[.='3']/@cpuset") == ["0"]


@pytest.mark.parametrize("action", ["resize", "rescue", "rebuild"])
def test_instance_that_runs_on_a_snapshot_is_not_put_back_before_it(
    site: Site, growing: Growing, action: str
) -> None:
    booted(site)
    # As 'virsh snapshot-create-as --disk-only' leaves it.
    xml = site.hypervisor.xml(site.uuid)
    site.hypervisor.define(xml.replace("/disk'", "/disk.before-upgrade'"))
    before = site.hypervisor.xml(site.uuid), record(site)
    assert "disk.before-upgrade" in before[0]
    run = {"resize": resize, "rescue": rescue, "rebuild": rebuild}[action]
    wanted: dict[str, dict[str, object]] = {
        "resize": {"flavor": {"vcpus": 1, "ram": 64, "disk": 0}},
        "rescue": {},
        "rebuild": {"image": {"id": second_image(site)}},
    }
    host = dataclasses.replace(site.host, hypervisor=growing)

    for started in (False, True):
        if started:
            site.hypervisor.start(site.uuid)
        request, recorder = accepted(site, action, **wanted[action])
        with pytest.raises(InvalidJob, match=r"disk vda .* is .*before-upgrade in its domain"):
            run(host, request, recorder, Cancellation())

    assert (site.hypervisor.xml(site.uuid), record(site)) == before
    assert [opened for opened, _ in site.kit.source.opened].count("another") == 0


def test_another_medium_in_the_drive_of_the_config_drive_is_no_obstacle(site: Site) -> None:
    image = dataclasses.replace(site.image, properties={"hw_cdrom_bus": "sata"})
    site.kit.source.images[image.id] = image
    instance = {"name": site.name, "uuid": site.uuid, "config_drive": True}
    site.run(libvirt={"start": False}, instance=instance)
    xml = site.hypervisor.xml(site.uuid)
    site.hypervisor.define(xml.replace("/disk.config'", "/tools.iso'"))

    after = resized(site, vcpus=2)

    sources = after.iterfind("devices/disk/source")
    assert [Path(source.get("file", "")).name for source in sources] == ["disk", "disk.config"]


def test_processors_that_somebody_has_unplugged_are_back_after_a_resize(site: Site) -> None:
    booted(site)
    xml = site.hypervisor.xml(site.uuid)
    changed = etree.fromstring(xml.encode())
    for processors in changed.iterfind("vcpu"):
        processors.set("current", "1")  # as by 'virsh setvcpus --config'
    site.hypervisor.define(etree.tostring(changed, encoding="unicode"))
    assert domain(site).xpath("vcpu/@current") == ["1"]

    after = resized(site, vcpus=2)

    assert (after.findtext("vcpu"), after.xpath("vcpu/@current")) == ("2", [])


class Empty(Hypervisor):
    """Of a drive without a medium libvirt tells no size."""

    def disk_size(self, _uuid: str, device_name: str) -> int:
        raise HypervisorError(f"disk '{device_name}' does not currently have a source assigned")


def test_empty_drive_of_a_guest_that_runs_is_no_obstacle(site: Site) -> None:
    site.run()
    instances = site.host.instances
    root = dataclasses.replace(record(site).root, read_only=True)
    others = (root if disk.role is root.role else disk for disk in record(site).disks)
    instances.write(dataclasses.replace(record(site), disks=tuple(others)))
    hypervisor = Empty("test:///default", virt_type="test")
    flavor = {"vcpus": 2, "ram": 64, "disk": 0}
    request, recorder = accepted(site, "resize", flavor=flavor)
    resize(dataclasses.replace(site.host, hypervisor=hypervisor), request, recorder, Cancellation())
    hypervisor.close()
    assert domain(site).findtext("vcpu") == "2"
