"""Resizing an instance."""

import dataclasses

import pytest
from lxml import etree

from agent.cancellation import Cancellation
from agent.errors import ImageUnacceptable, InvalidJob
from agent.resize import resize
from tests.change_kit import accepted, record
from tests.site_kit import Site, site

__all__ = ["site"]


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


def test_what_a_domains_owner_has_said_of_its_processors_outlives_a_resize(site: Site) -> None:
    booted(site)
    xml = site.hypervisor.xml(site.uuid)
    said = xml.replace("<vcpu placement='static'>2<", "<vcpu placement='static' cpuset='0'>2<")
    site.hypervisor.define(said)

    assert resized(site, vcpus=2, disk=2).xpath("vcpu/@cpuset") == ["0"]
    assert resized(site, vcpus=3).xpath("vcpu[.='3']/@cpuset") == ["0"]
