"""What is true of logical volumes alone: whose they are, what is left on their blocks, crashes."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from agent.backends.lvm import Clear, Lvm
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import BackendError, Cancelled, InsufficientFreeSpace
from agent.report import Role
from functional.inside import volumes
from functional.inside.conftest import GROUP, POOL, tool
from functional.inside.volumes import DEVICES, UUID, VolumeSite, on_the_blocks
from privsep import lvm
from tests.backend_contract import MIB, base, generated, planned, prepared

pytestmark = pytest.mark.usefixtures("_helper")

OTHER = "1b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
BASE_VOLUME = f"base_{'a1' * 20}"


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[VolumeSite]:
    with volumes.site(tmp_path) as site:
        yield site


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[VolumeSite]:
    with volumes.site(tmp_path, thin=True) as site:
        yield site


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[VolumeSite]:
    with volumes.site(tmp_path, encrypted=True) as site:
        yield site


def second(site: VolumeSite) -> Home:
    return Home(uuid=OTHER, directory=site.home.directory.with_name(OTHER))


def tidied(site: VolumeSite) -> set[str]:
    """Do what the agent does when it starts; return the volumes there are then."""
    site.backend.tidy(Cancellation())
    return volumes.names()


def with_clear(site: VolumeSite, clear: Clear, size: int | None = None) -> VolumeSite:
    backend = Lvm(
        GROUP,
        thin=False,
        bases=site.bases,
        scratch=site.bases.parent,
        clear=clear,
        clear_size=size,
    )
    return dataclasses.replace(site, backend=backend)


# Names and owners


def test_volume_is_named_as_novas_and_tagged(plain: VolumeSite) -> None:
    disk = prepared(plain, base(plain))
    assert disk.path == Path(f"/dev/{GROUP}/{UUID}_disk")
    tags = tool("lvs", "--noheadings", "--options=lv_tags", f"{GROUP}/{UUID}_disk")
    assert tags.split() == ["bootwright"]


def test_volume_of_somebody_elses_is_not_removed(plain: VolumeSite) -> None:
    disk = planned(plain, base(plain))
    plain.occupy(disk)
    plain.backend.remove(disk, plain.home, Cancellation())
    assert plain.found() == {f"{UUID}_disk"}


def test_volume_in_use_stays_whole(plain: VolumeSite) -> None:
    disk = prepared(plain, base(plain))
    before = plain.read(disk)
    with disk.path.open("rb"), pytest.raises(BackendError, match="in use"):
        plain.backend.remove(disk, plain.home, Cancellation())
    assert plain.read(disk) == before


def test_helper_writes_to_nothing_that_is_whole(plain: VolumeSite) -> None:
    disk = prepared(plain, base(plain))
    before, name = plain.read(disk), disk.path.name
    refused: list[Callable[[], None]] = [
        lambda: lvm.write(name, 0, bytes(512), False),
        lambda: lvm.blank(name, 0, 512, False, False),
        lambda: lvm.remove(name),
    ]
    for call in refused:
        with pytest.raises((PermissionError, FileNotFoundError)):
            call()
    assert plain.read(disk) == before


# What is left on the blocks


@pytest.mark.parametrize("clear", [Clear.ZERO, Clear.SHRED])
def test_removed_disk_leaves_nothing_on_its_blocks(plain: VolumeSite, clear: Clear) -> None:
    site = with_clear(plain, clear)
    mark = b"secret of a guest" + os.urandom(16)
    disk = generated(site, mark)
    site.write(disk, mark, 7 * MIB)
    assert on_the_blocks(mark)
    site.backend.remove(disk, site.home, Cancellation())
    assert not on_the_blocks(mark)


def test_wiping_ends_with_the_job_and_goes_on_later(plain: VolumeSite) -> None:
    disk = generated(plain, mark := b"secret of a guest" + os.urandom(16))
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        plain.backend.remove(disk, plain.home, cancellation)
    assert plain.found() == {f"{disk.path.name}+old"}
    plain.backend.tidy(Cancellation())
    assert plain.found() == set()
    assert not on_the_blocks(mark)


def test_wiping_can_be_left_out_and_the_next_disk_shows_nothing_all_the_same(
    plain: VolumeSite,
) -> None:
    site = with_clear(plain, Clear.NONE)
    mark = b"secret of a guest" + os.urandom(16)
    disk = generated(site, mark)
    site.write(disk, mark, 7 * MIB)
    site.backend.remove(disk, site.home, Cancellation())
    assert on_the_blocks(mark)
    # The only free blocks before the others: it gets the same ones.
    content = base(site)
    after = site.backend.plan(second(site), disk.role, "disk", content, 8 * MIB)
    site.backend.prepare(after, content, Cancellation())
    assert mark not in site.read(after)
    assert site.read(after) == content.path.read_bytes() + bytes(5 * MIB)
    assert not on_the_blocks(mark)


def test_wiping_can_be_limited_to_the_beginning(plain: VolumeSite) -> None:
    site = with_clear(plain, Clear.ZERO, MIB)
    begin, end = os.urandom(32), os.urandom(32)
    disk = generated(site, b"y")
    site.write(disk, begin)
    site.write(disk, end, 4 * MIB)
    site.backend.remove(disk, site.home, Cancellation())
    assert not on_the_blocks(begin)
    assert on_the_blocks(end)


# Space


def test_disk_that_does_not_fit_is_refused_with_the_numbers(plain: VolumeSite) -> None:
    content = base(plain)
    disk = planned(plain, content, 1 << 40)
    with pytest.raises(InsufficientFreeSpace, match=rf"takes {1 << 40} bytes .* has \d+ bytes"):
        plain.backend.prepare(disk, content, Cancellation())
    assert volumes.names() == set()


def test_cancelled_copy_leaves_nothing(plain: VolumeSite) -> None:
    cancellation = Cancellation()
    content = base(plain)

    class Interrupted(Cancellation):
        """Cancelled in the middle of the copy."""

        def check(self) -> None:
            if (DEVICES / f"{UUID}_disk+new").exists():
                cancellation.cancel(Cancelled("enough"))
            cancellation.check()

    with pytest.raises(Cancelled):
        plain.backend.prepare(planned(plain, content), content, Interrupted())
    assert volumes.names() == set()


# Crashes


def killed(wait_for: str, work: Callable[[], None]) -> None:
    """Do the work in another process and kill that as soon as there is a volume of that name."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    deadline = time.monotonic() + 30
    while not (DEVICES / wait_for).exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_kill_in_the_middle_of_a_copy_leaves_no_disk_and_the_next_run_makes_it(
    plain: VolumeSite,
) -> None:
    content = base(plain)
    disk = planned(plain, content, 64 * MIB)
    killed(f"{UUID}_disk+new", lambda: plain.backend.prepare(disk, content, Cancellation()))
    assert plain.found() == {f"{UUID}_disk+new"}
    plain.backend.prepare(disk, content, Cancellation())
    assert plain.found() == {f"{UUID}_disk"}
    assert plain.read(disk)[: 3 * MIB] == content.path.read_bytes()


def test_what_nobody_goes_on_with_is_removed(plain: VolumeSite) -> None:
    content = base(plain)
    disk = planned(plain, content, 64 * MIB)
    killed(f"{UUID}_disk+new", lambda: plain.backend.prepare(disk, content, Cancellation()))
    assert tidied(plain) == set()


def test_kill_in_the_middle_of_a_removal_leaves_nothing_unwiped(plain: VolumeSite) -> None:
    mark = os.urandom(32)
    disk = generated(plain, mark, 64 * MIB)
    killed(f"{disk.path.name}+old", lambda: plain.backend.remove(disk, plain.home, Cancellation()))
    assert plain.found() == {f"{disk.path.name}+old"}
    assert tidied(plain) == set()
    assert not on_the_blocks(mark)


def test_growth_that_a_crash_interrupted_shows_nothing_of_others(plain: VolumeSite) -> None:
    site = with_clear(plain, Clear.NONE)
    mark = os.urandom(32)
    content = base(site)
    disk = prepared(site, content)
    neighbour = site.backend.plan(second(site), disk.role, "disk", None, 16 * MIB)
    site.backend.generate(neighbour, lambda _fd: None, Cancellation())
    for offset in range(0, 16 * MIB, MIB):
        site.write(neighbour, mark, offset)
    site.backend.remove(neighbour, second(site), Cancellation())
    # As far as it gets if it ends after the volume is larger.
    lvm.survey()
    lvm.grow(disk.path.name, 20 * MIB, False)
    assert mark in site.read(disk)

    site.backend.prepare(disk, content, Cancellation())

    assert site.read(disk) == content.path.read_bytes() + bytes(17 * MIB)
    with pytest.raises(PermissionError):
        lvm.blank(disk.path.name, 8 * MIB, 512, False, False)


# Thin


def test_thin_disks_share_the_volume_of_their_base(thin: VolumeSite) -> None:
    content = base(thin)
    first = prepared(thin, content)
    other = thin.backend.plan(second(thin), first.role, "disk", content, 16 * MIB)
    began = lvm.survey()[1]
    thin.backend.prepare(other, content, Cancellation())
    # Nothing of the 3 MiB was copied.
    assert began - lvm.survey()[1] < MIB
    assert volumes.names() == {f"{UUID}_disk", f"{OTHER}_disk", BASE_VOLUME}
    thin.write(first, b"x" * 512)
    assert thin.read(other) == content.path.read_bytes() + bytes(13 * MIB)
    attributes = tool("lvs", "--noheadings", "--options=lv_attr", f"{GROUP}/{BASE_VOLUME}")
    assert attributes.split()[0][1] == "r"
    thin.backend.remove(first, thin.home, Cancellation())
    assert thin.read(other) == content.path.read_bytes() + bytes(13 * MIB)


def test_volume_of_a_base_goes_with_the_base(thin: VolumeSite) -> None:
    content = base(thin)
    disk = prepared(thin, content)
    assert tidied(thin) == {f"{UUID}_disk", BASE_VOLUME}
    expected = content.path.read_bytes()
    content.path.unlink()
    assert tidied(thin) == {f"{UUID}_disk"}
    assert thin.read(disk)[: 3 * MIB] == expected


def test_volumes_of_other_bases_make_room(thin: VolumeSite) -> None:
    def large(name: str) -> Base:
        path = thin.bases / name
        path.write_bytes(os.urandom(24 * MIB))
        return dataclasses.replace(base(thin), path=path, virtual_size=24 * MIB)

    first, other = large("b1" * 20), large("b2" * 20)
    thin.backend.remove(prepared(thin, first, 32 * MIB), thin.home, Cancellation())
    assert volumes.names() == {f"base_{first.name}"}
    disk = prepared(thin, other, 32 * MIB)
    assert volumes.names() == {f"{UUID}_disk", f"base_{other.name}"}
    # What a disk stands on cannot make room.
    with pytest.raises(InsufficientFreeSpace, match="thin pool"):
        thin.backend.prepare(planned_for(thin, first), first, Cancellation())
    assert thin.read(disk)[: 24 * MIB] == other.path.read_bytes()


def planned_for(site: VolumeSite, content: Base) -> Disk:
    return site.backend.plan(second(site), Role.ROOT, "disk", content, 64 * MIB)


def test_pool_that_does_not_zero_is_refused(thin: VolumeSite) -> None:
    tool("lvchange", "--yes", "--zero=n", f"{GROUP}/{POOL}")
    try:
        with pytest.raises(BackendError, match="does not zero its blocks"):
            prepared(thin, base(thin))
    finally:
        tool("lvchange", "--yes", "--zero=y", f"{GROUP}/{POOL}")
    assert volumes.names() == set()


# Encryption


def raw(disk: Disk) -> Path:
    return DEVICES / disk.path.name.removesuffix("-dmcrypt")


def test_encrypted_disk_is_plain_to_its_guest_and_to_nobody_else(encrypted: VolumeSite) -> None:
    content = base(encrypted)
    disk = prepared(encrypted, content)
    assert disk.path == Path(f"/dev/mapper/{UUID}_disk-dmcrypt")
    assert encrypted.read(disk) == content.path.read_bytes() + bytes(5 * MIB)
    found = raw(disk).read_bytes()
    assert b"beginbegin" not in found
    assert bytes(512) not in found
    mark = b"written by the guest " * 20
    encrypted.write(disk, mark, 6 * MIB)
    assert not on_the_blocks(mark)


def test_encrypted_disk_is_opened_again_after_the_host_has_started(
    encrypted: VolumeSite,
) -> None:
    disk = generated(encrypted, b"y" * 512)
    encrypted.write(disk, b"x" * 512)
    tool("cryptsetup", "close", disk.path.name)
    assert not disk.path.exists()
    encrypted.backend.open(disk)
    assert encrypted.read(disk).startswith(b"x" * 512)


def test_encrypted_disk_grows_under_its_mapping(encrypted: VolumeSite) -> None:
    content = base(encrypted)
    disk = encrypted.backend.grow(prepared(encrypted, content), 20 * MIB)
    assert encrypted.read(disk) == content.path.read_bytes() + bytes(17 * MIB)


def test_key_goes_with_the_last_disk_of_its_instance(encrypted: VolumeSite) -> None:
    assert encrypted.keys is not None
    content = base(encrypted)
    disk, other = prepared(encrypted, content), generated(encrypted, b"y")
    assert len(encrypted.keys.get(UUID)) == 64
    encrypted.backend.remove(disk, encrypted.home, Cancellation())
    assert len(encrypted.keys.get(UUID)) == 64
    encrypted.backend.remove(other, encrypted.home, Cancellation())
    assert encrypted.found() == set()
    assert list(Path("/dev/mapper").glob("*-dmcrypt")) == []
    with pytest.raises(BackendError, match="reading the key"):
        encrypted.keys.get(UUID)


def test_thin_pool_holds_encrypted_disks_that_share_nothing(tmp_path: Path) -> None:
    with volumes.site(tmp_path, thin=True, encrypted=True) as site:
        content = base(site)
        disk = prepared(site, content)
        assert site.read(disk) == content.path.read_bytes() + bytes(5 * MIB)
        assert b"beginbegin" not in raw(disk).read_bytes()
        assert volumes.names() == {f"{UUID}_disk"}


def test_no_volume_group_is_a_sentence(plain: VolumeSite) -> None:
    cfg.CONF.set_override("images_volume_group", "nowhere", group="libvirt")
    try:
        with pytest.raises(BackendError, match=r'Volume group "nowhere" not found'):
            planned(plain, base(plain))
    finally:
        cfg.CONF.set_override("images_volume_group", GROUP, group="libvirt")
