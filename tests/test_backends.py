"""One contract, every backend: what is on disk afterwards, read with qemu-img."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from agent.backends import Backend, by_type
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import BackendError, Cancelled
from agent.image import Image
from agent.job import ImagesType
from agent.report import Role

MIB = 1 << 20


@pytest.fixture(params=list(ImagesType))
def backend(request: pytest.FixtureRequest) -> Backend:
    images_type: ImagesType = request.param
    return by_type(images_type)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """3 MiB, of which the middle one is a hole."""
    path = tmp_path / "_base" / ("a1" * 20)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"begin" * (MIB // 5))
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))
    return Base(
        name=path.name,
        path=path,
        format="raw",
        virtual_size=3 * MIB,
        image=Image(id="1", name="", source="directory", status="active", disk_format="raw"),
        digest="sha512:00",
        origin="cache",
    )


@pytest.fixture
def instance_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
    directory.mkdir()
    return directory


def info(disk: Disk) -> dict[str, object]:
    result = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", disk.format, disk.path],
        capture_output=True,
        check=True,
    )
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def content(disk: Disk, tmp_path: Path) -> bytes:
    raw = tmp_path / "content"
    subprocess.run(
        ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.path, raw], check=True
    )
    return raw.read_bytes()


def prepared(backend: Backend, instance_dir: Path, base: Base, size: int = 8 * MIB) -> Disk:
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, size)
    backend.prepare(disk, base, Cancellation())
    return disk


def write(disk: Disk, text: str) -> None:
    """What a guest does, at byte 0."""
    command = f"write -q -P {ord(text)} 0 512"
    subprocess.run(["qemu-io", "-f", disk.format, "-c", command, disk.path], check=True)


def test_plan_makes_nothing(backend: Backend, instance_dir: Path, base: Base) -> None:
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    assert disk.path == instance_dir / "disk"
    assert (disk.base_name, disk.virtual_size, disk.role) == (base.name, 8 * MIB, Role.ROOT)
    assert list(instance_dir.iterdir()) == []


def test_disk_reads_as_its_base_and_then_zeros(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    disk = prepared(backend, instance_dir, base)
    assert content(disk, tmp_path) == base.path.read_bytes() + bytes(5 * MIB)
    assert info(disk)["virtual-size"] == 8 * MIB
    assert [path.name for path in instance_dir.iterdir()] == ["disk"]


def test_plan_says_what_the_disk_really_stands_on(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    disk = prepared(backend, instance_dir, base)
    answer = info(disk)
    chain = [(str(link.path), link.format) for link in disk.backing_chain]
    found = answer.get("full-backing-filename"), answer.get("backing-filename-format")
    assert chain == ([] if found == (None, None) else [found])


def test_nobody_but_owner_and_group_may_read_a_disk(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    assert prepared(backend, instance_dir, base).path.stat().st_mode & 0o777 == 0o640


def test_disk_that_exists_is_kept_with_what_the_guest_wrote(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    disk = prepared(backend, instance_dir, base)
    write(disk, "x")
    before = disk.path.stat()
    backend.prepare(disk, base, Cancellation())
    backend.create_empty(disk)
    after = disk.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert content(disk, tmp_path).startswith(b"x" * 512)


def test_what_the_guest_writes_does_not_reach_the_base(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    before = base.path.read_bytes()
    write(prepared(backend, instance_dir, base), "x")
    assert base.path.read_bytes() == before


def test_disk_cannot_be_smaller_than_its_base(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    with pytest.raises(BackendError, match=f"cannot hold the {3 * MIB} bytes"):
        backend.plan(instance_dir, Role.ROOT, "disk", base, 2 * MIB)


def test_something_else_in_its_place_is_left_alone(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s")
    (instance_dir / "disk").symlink_to(secret)
    with pytest.raises(BackendError, match="not a regular file"):
        prepared(backend, instance_dir, base)
    assert secret.read_bytes() == b"s"


def test_cancelled_job_makes_no_disk(backend: Backend, instance_dir: Path, base: Base) -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    with pytest.raises(Cancelled):
        backend.prepare(disk, base, cancellation)
    assert list(instance_dir.iterdir()) == []


def test_missing_base_leaves_no_disk_or_one_that_names_it(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    base.path.unlink()
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    if disk.backing_chain:
        backend.prepare(disk, base, Cancellation())
    else:
        with pytest.raises(BackendError, match=base.name):
            backend.prepare(disk, base, Cancellation())
        assert list(instance_dir.iterdir()) == []


def test_empty_disk_reads_as_zeros_and_takes_no_space(
    backend: Backend, instance_dir: Path, tmp_path: Path
) -> None:
    disk = backend.plan(instance_dir, Role.EPHEMERAL, "disk.eph0", None, 8 * MIB)
    backend.create_empty(disk)
    assert content(disk, tmp_path) == bytes(8 * MIB)
    assert disk.path.stat().st_blocks * 512 < MIB
    assert disk.path.stat().st_mode & 0o777 == 0o640


def test_disk_grows_and_keeps_its_content(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    disk = backend.grow(prepared(backend, instance_dir, base), 20 * MIB)
    assert disk.virtual_size == 20 * MIB
    assert info(disk)["virtual-size"] == 20 * MIB
    assert content(disk, tmp_path) == base.path.read_bytes() + bytes(17 * MIB)
    assert backend.grow(disk, 20 * MIB) == disk


def test_disk_never_shrinks(backend: Backend, instance_dir: Path, base: Base) -> None:
    disk = prepared(backend, instance_dir, base)
    with pytest.raises(BackendError, match="would shrink"):
        backend.grow(disk, 4 * MIB)
    # A record that says too little does not cost what lies beyond either.
    grown = backend.grow(disk, 20 * MIB)
    outdated = dataclasses.replace(grown, virtual_size=8 * MIB)
    with pytest.raises(BackendError):
        backend.grow(outdated, 16 * MIB)
    assert info(disk)["virtual-size"] == 20 * MIB


def test_growing_what_is_not_there_is_an_error(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    with pytest.raises(BackendError, match="growing"):
        backend.grow(disk, 9 * MIB)


def test_remove_takes_the_disk_and_nothing_else(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    disk = prepared(backend, instance_dir, base)
    (instance_dir / "console.log").touch()
    backend.remove(disk, instance_dir)
    backend.remove(disk, instance_dir)
    assert [path.name for path in instance_dir.iterdir()] == ["console.log"]
    assert base.path.exists()


def test_remove_refuses_what_is_not_the_instances(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    disk = prepared(backend, instance_dir, base)
    outside = tmp_path / "outside"
    outside.touch()
    for path in (base.path, outside, instance_dir / "../outside", instance_dir / "sub/disk"):
        with pytest.raises(BackendError, match=r"was not removed|not the name"):
            backend.remove(dataclasses.replace(disk, path=path), instance_dir)
    assert base.path.exists()
    assert outside.exists()


def test_remove_follows_no_link(
    backend: Backend, instance_dir: Path, base: Base, tmp_path: Path
) -> None:
    disk = prepared(backend, instance_dir, base)
    moved = instance_dir.rename(tmp_path / "moved")
    instance_dir.symlink_to(moved)
    with pytest.raises(BackendError):
        backend.remove(disk, instance_dir)
    assert (moved / "disk").exists()


def test_remove_of_an_instance_that_is_gone_is_no_error(
    backend: Backend, instance_dir: Path, base: Base
) -> None:
    disk = backend.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    instance_dir.rmdir()
    backend.remove(disk, instance_dir)


@pytest.mark.parametrize("name", ["", ".", "..", "../disk", "a/b", "/etc/passwd"])
def test_name_that_leaves_the_directory_is_refused(
    backend: Backend, instance_dir: Path, base: Base, name: str
) -> None:
    with pytest.raises(BackendError, match="not the name of a disk"):
        backend.plan(instance_dir, Role.ROOT, name, base, 8 * MIB)


def test_flat_disk_that_a_crash_left_too_short_is_completed(instance_dir: Path, base: Base) -> None:
    flat = by_type(ImagesType.RAW)
    disk = flat.plan(instance_dir, Role.ROOT, "disk", base, 8 * MIB)
    disk.path.write_bytes(base.path.read_bytes())
    flat.prepare(disk, base, Cancellation())
    assert disk.path.stat().st_size == 8 * MIB


def test_flat_disk_cannot_be_made_of_a_base_that_is_not_raw(instance_dir: Path, base: Base) -> None:
    with pytest.raises(BackendError, match="force_raw_images"):
        by_type(ImagesType.RAW).plan(
            instance_dir, Role.ROOT, "disk", dataclasses.replace(base, format="qcow2"), 8 * MIB
        )


def test_kernel_is_copied_to_the_byte(instance_dir: Path, base: Base) -> None:
    base.path.write_bytes(os.urandom(100_001))
    kernel = dataclasses.replace(base, virtual_size=100_001)
    disk = by_type(ImagesType.RAW).plan(instance_dir, Role.KERNEL, "kernel", kernel, 100_001)
    by_type(ImagesType.RAW).prepare(disk, kernel, Cancellation())
    assert disk.path.read_bytes() == base.path.read_bytes()
