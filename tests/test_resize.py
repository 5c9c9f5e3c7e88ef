"""Resizing an instance."""

import dataclasses

import pytest

from agent.cancellation import Cancellation
from agent.errors import InvalidJob
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
