"""The contract of backends on those that keep files, and what is true of files alone."""

import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from agent.backends import Backend
from agent.backends.flat import Flat
from agent.backends.ploop import Ploop
from agent.backends.qcow2 import Qcow2
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import BackendError, InsufficientFreeSpace
from agent.qemu_img import QemuImg
from agent.report import Role
from tests import service_user
from tests.backend_contract import *  # noqa: F403 - the contract suite
from tests.backend_contract import MIB, BackendSite, base, generated, planned, prepared


def driver(disk: Disk) -> str:
    """QEMU's name of a disk's format, which is libvirt's but for one."""
    return "parallels" if disk.format == "ploop" else disk.format


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileSite:
    """See `BackendSite`."""

    backend: Backend
    home: Home
    bases: Path

    def read(self, disk: Disk) -> bytes:
        raw = self.bases.parent / "content"
        subprocess.run(
            ["qemu-img", "convert", "-f", driver(disk), "-O", "raw", disk.path, raw], check=True
        )
        return raw.read_bytes()

    def write(self, disk: Disk, data: bytes) -> None:
        command = f"write -q -P {data[0]} 0 {len(data)}"
        subprocess.run(["qemu-io", "-f", driver(disk), "-c", command, disk.path], check=True)

    def found(self) -> set[str]:
        return {path.name for path in self.home.directory.iterdir()}

    def occupy(self, disk: Disk) -> None:
        disk.path.symlink_to(self.bases)


class PloopSite(FileSite):
    """The disk is a directory."""

    def occupy(self, disk: Disk) -> None:
        disk.path.parent.symlink_to(self.bases)


@pytest.fixture(
    params=[Flat, lambda: Qcow2(QemuImg()), lambda: Ploop(QemuImg())],
    ids=["flat", "qcow2", "ploop"],
)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> FileSite:
    home = Home(
        uuid="0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1",
        directory=tmp_path / "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1",
    )
    home.directory.mkdir()
    (tmp_path / "_base").mkdir()
    backend = request.param()
    kind = PloopSite if isinstance(backend, Ploop) else FileSite
    return kind(backend=backend, home=home, bases=tmp_path / "_base")


def info(disk: Disk) -> dict[str, object]:
    result = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", driver(disk), disk.path],
        capture_output=True,
        check=True,
    )
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_plan_says_what_the_disk_really_stands_on(site: BackendSite) -> None:
    disk = prepared(site, base(site))
    answer = info(disk)
    chain = [(str(link.path), link.format) for link in disk.backing_chain]
    found = answer.get("full-backing-filename"), answer.get("backing-filename-format")
    assert chain == ([] if found == (None, None) else [found])


def test_nobody_but_owner_and_group_may_read_a_disk(site: BackendSite) -> None:
    assert prepared(site, base(site)).path.stat().st_mode & 0o777 == 0o640
    assert generated(site, b"y").path.stat().st_mode & 0o777 == 0o640


def test_nobody_but_its_owner_may_read_a_config_drive(site: BackendSite) -> None:
    disk = site.backend.plan(site.home, Role.CONFIG_DRIVE, "disk.config", None, MIB)
    site.backend.generate(disk, lambda _: None, Cancellation())
    assert disk.path.stat().st_mode & 0o777 == 0o600


def test_disk_that_exists_is_the_same_file_afterwards(site: BackendSite) -> None:
    content = base(site)
    disk = prepared(site, content)
    before = disk.path.stat()
    site.backend.prepare(disk, content, Cancellation())
    after = disk.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_overlay_that_stands_alone_by_now_is_kept(flat: FileSite) -> None:
    site = dataclasses.replace(flat, backend=Qcow2(QemuImg()))
    content = base(site)
    disk = prepared(site, content)
    # As 'virsh blockpull' leaves it.
    subprocess.run(["qemu-img", "rebase", "-f", "qcow2", "-b", "", disk.path], check=True)
    before = disk.path.read_bytes()
    site.backend.prepare(disk, content, Cancellation())
    assert disk.path.read_bytes() == before
    assert "backing-filename" not in info(disk)


def test_generated_disk_takes_no_space_for_its_holes(site: BackendSite) -> None:
    disk = generated(site, b"y" * 512, 64 * MIB)
    assert disk.path.stat().st_blocks * 512 < MIB


def test_remove_follows_no_path_out_of_the_directory(site: BackendSite, tmp_path: Path) -> None:
    content = base(site)
    disk = prepared(site, content)
    outside = tmp_path / "outside"
    outside.touch()
    directory = site.home.directory
    for path in (content.path, outside, directory / "../outside", directory / "sub/disk"):
        with pytest.raises(BackendError, match=r"was not removed|not the name"):
            site.backend.remove(dataclasses.replace(disk, path=path), site.home, Cancellation())
    assert content.path.exists()
    assert outside.exists()


def test_remove_follows_no_link(site: BackendSite, tmp_path: Path) -> None:
    disk = prepared(site, base(site))
    moved = site.home.directory.rename(tmp_path / "moved")
    site.home.directory.symlink_to(moved)
    with pytest.raises(BackendError):
        site.backend.remove(disk, site.home, Cancellation())
    assert (moved / "disk").exists()


def test_remove_of_an_instance_that_is_gone_is_no_error(site: BackendSite) -> None:
    disk = planned(site, base(site))
    site.home.directory.rmdir()
    site.backend.remove(disk, site.home, Cancellation())


@pytest.fixture
def flat(tmp_path: Path) -> FileSite:
    home = Home(uuid="0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1", directory=tmp_path / "flat")
    home.directory.mkdir()
    (tmp_path / "_base").mkdir()
    return FileSite(backend=Flat(), home=home, bases=tmp_path / "_base")


def test_flat_disk_that_a_crash_left_too_short_is_completed(flat: FileSite) -> None:
    content = base(flat)
    disk = planned(flat, content)
    disk.path.write_bytes(content.path.read_bytes())
    flat.backend.prepare(disk, content, Cancellation())
    assert disk.path.stat().st_size == 8 * MIB


class Held(Cancellation):
    """Keeps the work it goes with where it asks for the nth time, until it is let go."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth
        self.there = threading.Event()
        self.let_go = threading.Event()

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.there.set()
            assert self.let_go.wait(30)
        super().check()


def test_disks_of_one_base_do_not_wait_for_each_other(flat: FileSite) -> None:
    # With blocks of its own: a shared one is made in a single call.
    site = dataclasses.replace(flat, backend=Flat(preallocate=True))
    content = base(site)
    first, second = (
        site.backend.plan(site.home, Role.ROOT, name, content, 8 * MIB) for name in ("a", "b")
    )
    held = Held(3)
    thread = threading.Thread(target=site.backend.prepare, args=(first, content, held))
    thread.start()
    assert held.there.wait(30)
    assert site.found() != set()
    site.backend.prepare(second, content, Cancellation())
    assert not first.path.exists()
    held.let_go.set()
    thread.join(30)
    assert site.read(first) == site.read(second)


def test_flat_disk_cannot_be_made_of_a_base_that_is_not_raw(flat: FileSite) -> None:
    with pytest.raises(BackendError, match="force_raw_images"):
        planned(flat, dataclasses.replace(base(flat), format="qcow2"))


def test_kernel_is_copied_to_the_byte(flat: FileSite) -> None:
    content = base(flat)
    content.path.write_bytes(os.urandom(100_001))
    kernel = dataclasses.replace(content, virtual_size=100_001)
    disk = flat.backend.plan(flat.home, Role.KERNEL, "kernel", kernel, 100_001)
    flat.backend.prepare(disk, kernel, Cancellation())
    assert disk.path.read_bytes() == content.path.read_bytes()


@pytest.fixture
def ploop(tmp_path: Path) -> FileSite:
    home = Home(uuid="0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1", directory=tmp_path / "ploop")
    home.directory.mkdir()
    (tmp_path / "_base").mkdir()
    return PloopSite(backend=Ploop(QemuImg()), home=home, bases=tmp_path / "_base")


def ploop_check(disk: Disk) -> None:
    subprocess.run(
        ["ploop", "check", "--ro", disk.path],
        env={**os.environ, "PADDING": "0" * 8192},
        check=True,
    )


def test_ploop_accepts_what_it_is_given(ploop: FileSite) -> None:
    disk = prepared(ploop, base(ploop))
    ploop_check(disk)
    assert {path.name for path in disk.path.parent.iterdir()} == {"root.hds", "DiskDescriptor.xml"}


def test_ploop_image_grows_past_its_first_table_after_a_guest_wrote(ploop: FileSite) -> None:
    disk = prepared(ploop, base(ploop))
    ploop.write(disk, b"x" * 512)
    subprocess.run(
        ["qemu-io", "-f", "parallels", "-c", "write -q -P 3 7M 64k", disk.path], check=True
    )
    grown = ploop.backend.grow(disk, 300 << 30)
    ploop_check(grown)
    assert info(grown)["virtual-size"] == 300 << 30
    with grown.path.with_name("DiskDescriptor.xml").open() as file:
        assert f"<Disk_size>{(300 << 30) // 512}</Disk_size>" in file.read()
    pattern = "read -P 120 0 512"
    output = subprocess.run(
        ["qemu-io", "-f", "parallels", "-c", pattern, "-c", "read -P 3 7M 64k", grown.path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "failed" not in output


def test_ploop_image_of_2_tib_is_refused(ploop: FileSite) -> None:
    with pytest.raises(BackendError, match="at most"):
        planned(ploop, base(ploop), 2 << 40)


def test_ploop_disk_has_whole_mib(ploop: FileSite) -> None:
    disk = prepared(ploop, base(ploop), 8 * MIB + 512)
    assert disk.virtual_size == 9 * MIB
    assert info(disk)["virtual-size"] == 9 * MIB


@pytest.mark.parametrize(
    "backend", [Flat(preallocate=True), Qcow2(QemuImg(), preallocate=True)], ids=["flat", "qcow2"]
)
def test_preallocated_disk_has_all_its_space_and_reads_the_same(
    backend: Backend, flat: FileSite
) -> None:
    site = dataclasses.replace(flat, backend=backend)
    content = base(site)
    disk = prepared(site, content)
    assert disk.path.stat().st_blocks * 512 >= 8 * MIB
    assert site.read(disk) == content.path.read_bytes() + bytes(5 * MIB)
    blank = generated(site, b"y" * 512)
    assert blank.path.stat().st_blocks * 512 >= 8 * MIB
    assert site.read(blank)[MIB : MIB + 512] == b"y" * 512


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Flat(), Flat(preallocate=True)),
        (Qcow2(QemuImg()), Qcow2(QemuImg(), preallocate=True)),
    ],
    ids=["flat", "qcow2"],
)
def test_disk_that_a_crash_left_without_its_space_gets_it_in_the_next_run(
    before: Backend, after: Backend, flat: FileSite
) -> None:
    site = dataclasses.replace(flat, backend=before)
    content = base(site)
    disks = prepared(site, content), generated(site, b"y" * 512)
    held = [site.read(disk) for disk in disks]
    assert all(disk.path.stat().st_blocks * 512 < 8 * MIB for disk in disks)

    site = dataclasses.replace(flat, backend=after)
    again = prepared(site, content), generated(site, b"n")
    assert [disk.path for disk in again] == [disk.path for disk in disks]

    assert all(disk.path.stat().st_blocks * 512 >= 8 * MIB for disk in disks)
    assert [site.read(disk) for disk in disks] == held


def test_disk_whose_space_is_not_there_is_not_preallocated(flat: FileSite) -> None:
    site = dataclasses.replace(flat, backend=Flat(preallocate=True))
    with pytest.raises(InsufficientFreeSpace, match="preallocating"):
        generated(site, b"y", 1 << 43)


@pytest.mark.parametrize(
    "backend", [Flat(preallocate=True), Qcow2(QemuImg(), preallocate=True)], ids=["flat", "qcow2"]
)
def test_preallocated_disk_grows_with_its_space_or_not_at_all(
    backend: Backend, flat: FileSite
) -> None:
    site = dataclasses.replace(flat, backend=backend)
    content = base(site)
    disk = site.backend.grow(prepared(site, content), 20 * MIB)
    assert disk.native_io
    assert disk.path.stat().st_blocks * 512 >= 20 * MIB
    assert site.read(disk) == content.path.read_bytes() + bytes(17 * MIB)
    with pytest.raises(InsufficientFreeSpace, match="preallocating"):
        site.backend.grow(disk, 1 << 43)
    assert info(disk)["virtual-size"] == 20 * MIB


@pytest.mark.parametrize("earlier", [True, False], ids=["preallocated", "sparse"])
def test_next_run_leaves_alone_what_a_guest_has_been_given(earlier: bool) -> None:
    """As libvirt's dynamic_ownership does it: the agent may not even open the disks any more."""
    service_user.require_root()
    program = service_user.CHECKOUT / "tests/preparing_as_service.py"
    with service_user.directory() as directory:
        done = service_user.run(program, directory, "space" if earlier else "none")
        assert (done.returncode, done.stderr) == (0, "")
        disks = [path for path in directory.rglob("disk*") if path.is_file()]
        assert len(disks) == 4
        for disk in disks:
            os.chown(disk, 0, 0)
        before = {disk: (disk.stat().st_blocks, disk.read_bytes()) for disk in disks}

        done = service_user.run(program, directory, "space")

        assert (done.returncode, done.stderr) == (0, "")
        assert before == {disk: (disk.stat().st_blocks, disk.read_bytes()) for disk in disks}
