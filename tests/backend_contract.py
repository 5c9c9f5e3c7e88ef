"""The contract of `agent.backends.Backend`, to be run on any backend.

A test module imports all of this and has a fixture `site` that returns a
`BackendSite` of the backend in question, fresh for each test: files in
`tests/test_backends.py`, what needs a volume group or a cluster in functional/.
"""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import pytest

from agent.backends import Backend
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import BackendError, BootwrightError, Cancelled
from agent.image import Image
from agent.report import Role

MIB = 1 << 20


class BackendSite(Protocol):
    """A place where one backend keeps its disks, seen from outside of it."""

    @property
    def backend(self) -> Backend: ...

    @property
    def home(self) -> Home: ...

    @property
    def bases(self) -> Path:
        """The directory of the image cache, which exists."""
        ...

    def read(self, disk: Disk) -> bytes:
        """All that a guest would find on the disk; its length is the disk's virtual size."""
        ...

    def write(self, disk: Disk, data: bytes) -> None:
        """What a guest does, at byte 0."""
        ...

    def found(self) -> set[str]:
        """The names of all disks there are, of this instance or not, finished or not."""
        ...

    def occupy(self, disk: Disk) -> None:
        """Put something of somebody else's where the disk would be."""
        ...


def base(site: BackendSite) -> Base:
    """3 MiB, of which the middle one is a hole."""
    path = site.bases / ("a1" * 20)
    with path.open("wb") as file:
        file.write(b"begin" * (MIB // 5))
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))
    return Base(
        path=path,
        format="raw",
        virtual_size=3 * MIB,
        image=Image(id="1", name="", source="directory", status="active", disk_format="raw"),
        digest="sha512:00",
        origin="cache",
    )


def planned(site: BackendSite, base: Base, size: int = 8 * MIB) -> Disk:
    return site.backend.plan(site.home, Role.ROOT, "disk", base, size)


def prepared(site: BackendSite, base: Base, size: int = 8 * MIB) -> Disk:
    disk = planned(site, base, size)
    site.backend.prepare(disk, base, Cancellation())
    return disk


def generated(site: BackendSite, data: bytes, size: int = 8 * MIB) -> Disk:
    disk = site.backend.plan(site.home, Role.EPHEMERAL, "disk.eph0", None, size)
    site.backend.generate(disk, lambda fd: _put(fd, data), Cancellation())
    return disk


def _put(fd: int, data: bytes) -> None:
    assert os.pwrite(fd, data, MIB) == len(data)


def test_plan_makes_nothing(site: BackendSite) -> None:
    content = base(site)
    disk = planned(site, content)
    assert (disk.base_name, disk.virtual_size, disk.role) == (content.name, 8 * MIB, Role.ROOT)
    assert site.found() == set()


def test_disk_reads_as_its_base_and_then_zeros(site: BackendSite) -> None:
    content = base(site)
    disk = prepared(site, content)
    assert site.read(disk) == content.path.read_bytes() + bytes(5 * MIB)
    assert len(site.found()) == 1


def test_disk_that_exists_is_kept_with_what_the_guest_wrote(site: BackendSite) -> None:
    content = base(site)
    disk = prepared(site, content)
    site.write(disk, b"x" * 512)
    site.backend.prepare(disk, content, Cancellation())
    assert site.read(disk).startswith(b"x" * 512)


def test_generated_disk_has_what_was_written_and_else_zeros(site: BackendSite) -> None:
    disk = generated(site, b"y" * 4096)
    assert site.read(disk) == bytes(MIB) + b"y" * 4096 + bytes(7 * MIB - 4096)
    assert len(site.found()) == 1


def test_generated_disk_that_exists_is_kept(site: BackendSite) -> None:
    site.write(generated(site, b"y" * 512), b"x" * 512)
    disk = generated(site, b"z" * 512)
    content = site.read(disk)
    assert content.startswith(b"x" * 512)
    assert content[MIB : MIB + 512] == b"y" * 512


def test_disk_that_could_not_be_generated_leaves_nothing(site: BackendSite) -> None:
    disk = site.backend.plan(site.home, Role.EPHEMERAL, "disk.eph0", None, 8 * MIB)

    def fail(_fd: int) -> None:
        raise BackendError("mkfs failed")

    with pytest.raises(BackendError, match="mkfs failed"):
        site.backend.generate(disk, fail, Cancellation())
    assert site.found() == set()


def test_what_the_guest_writes_does_not_reach_the_base(site: BackendSite) -> None:
    content = base(site)
    before = content.path.read_bytes()
    site.write(prepared(site, content), b"x" * 512)
    assert content.path.read_bytes() == before
    site.backend.remove(planned(site, content), site.home, Cancellation())
    assert site.read(prepared(site, content)).startswith(before[:512])


def test_disk_cannot_be_smaller_than_its_base(site: BackendSite) -> None:
    with pytest.raises(BackendError, match=f"cannot hold the {3 * MIB} bytes"):
        planned(site, base(site), 2 * MIB)


def test_something_else_in_its_place_is_left_alone(site: BackendSite) -> None:
    content = base(site)
    disk = planned(site, content)
    site.occupy(disk)
    before = site.found()
    with pytest.raises(BackendError, match="in the way"):
        site.backend.prepare(disk, content, Cancellation())
    assert site.found() == before


def test_cancelled_job_makes_no_disk(site: BackendSite) -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    content = base(site)
    with pytest.raises(Cancelled):
        site.backend.prepare(planned(site, content), content, cancellation)
    assert site.found() == set()


def test_missing_base_leaves_no_disk_or_one_that_names_it(site: BackendSite) -> None:
    content = base(site)
    content.path.unlink()
    disk = planned(site, content)
    if disk.backing_chain:
        site.backend.prepare(disk, content, Cancellation())
        return
    with pytest.raises(BackendError, match=content.name):
        site.backend.prepare(disk, content, Cancellation())
    assert site.found() == set()


def test_disk_grows_and_keeps_its_content(site: BackendSite) -> None:
    content = base(site)
    disk = site.backend.grow(prepared(site, content), 20 * MIB)
    assert disk.virtual_size == 20 * MIB
    assert site.read(disk) == content.path.read_bytes() + bytes(17 * MIB)
    assert site.backend.grow(disk, 20 * MIB) == disk


def test_disk_never_shrinks(site: BackendSite) -> None:
    disk = prepared(site, base(site))
    with pytest.raises(BackendError, match="would shrink"):
        site.backend.grow(disk, 4 * MIB)
    # A record that says too little does not cost what lies beyond either.
    grown = site.backend.grow(disk, 20 * MIB)
    outdated = dataclasses.replace(grown, virtual_size=8 * MIB)
    with pytest.raises(BackendError):
        site.backend.grow(outdated, 16 * MIB)
    assert len(site.read(grown)) == 20 * MIB


def test_growing_what_is_not_there_is_an_error(site: BackendSite) -> None:
    with pytest.raises(BackendError, match="growing"):
        site.backend.grow(planned(site, base(site)), 9 * MIB)


def test_remove_takes_the_disk_and_nothing_else(site: BackendSite) -> None:
    content = base(site)
    disk = prepared(site, content)
    generated(site, b"y")
    before = site.found()
    site.backend.remove(disk, site.home, Cancellation())
    site.backend.remove(disk, site.home, Cancellation())
    assert len(before - site.found()) == 1
    assert len(site.found()) == 1
    assert content.path.exists()


def test_remove_refuses_what_is_not_the_instances(site: BackendSite) -> None:
    disk = prepared(site, base(site))
    other = Home(uuid="1b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1", directory=site.home.directory / "no")
    before = site.found()
    with pytest.raises(BackendError, match="was not removed"):
        site.backend.remove(disk, other, Cancellation())
    assert site.found() == before


@pytest.mark.parametrize("name", ["", ".", "..", "../disk", "a/b", "/etc/passwd", "-n", "a b"])
def test_name_that_is_none_is_refused(site: BackendSite, name: str) -> None:
    with pytest.raises(BootwrightError, match="not the name of a disk"):
        site.backend.plan(site.home, Role.ROOT, name, base(site), 8 * MIB)
