"""The registry of instances, on a real directory."""

import json
import resource
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from agent.disk import Disk, Link
from agent.errors import BackendError, InstanceExists, InsufficientFreeSpace, NotFound
from agent.instances import InstanceRecord, Instances, Rebuild, Rescue
from agent.job import ImagesType
from agent.origin import Origin
from agent.report import Role
from tests.small_file_system import mounted_file_system

full_file_system = mounted_file_system("tmpfs")

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
OTHER = "11111111-2222-4333-8444-555555555555"
BASE = "0d5e6b61602d758984b3bf038267614d6016eb2a"


@pytest.fixture
def instances(tmp_path: Path) -> Instances:
    return Instances(tmp_path)


def record(directory: Path, uuid: str = UUID, name: str = "web-1") -> InstanceRecord:
    return InstanceRecord(
        uuid=uuid,
        name=name,
        job_id="job-1",
        created_at=1.5,
        image_id="img-1",
        image_digest="sha512:00",
        images_type=ImagesType.QCOW2,
        metadata={"tier": "web"},
        disks=(
            Disk(
                backend=ImagesType.QCOW2,
                role=Role.ROOT,
                path=directory / uuid / "disk",
                format="qcow2",
                virtual_size=1 << 30,
                bus="virtio",
                device_name="vda",
                base_name=BASE,
                backing_chain=(Link(path=directory / "_base" / BASE, format="raw"),),
            ),
        ),
    )


def test_record_survives_a_restart_unchanged(instances: Instances, tmp_path: Path) -> None:
    instances.write(record(tmp_path))
    again = Instances(tmp_path)
    assert again.all() == [record(tmp_path)]
    assert again.find("web-1") == again.find(UUID) == record(tmp_path)
    assert again.standing_on(BASE) == [record(tmp_path)]
    assert again.standing_on("0" * 40) == []
    assert again.unreadable == ()


def test_what_comes_and_what_goes_is_the_instances_too(
    instances: Instances, tmp_path: Path
) -> None:
    known = record(tmp_path)
    swap = Disk(
        backend=ImagesType.RAW,
        role=Role.SWAP,
        path=tmp_path / UUID / "disk.swap",
        format="raw",
        virtual_size=1 << 20,
    )
    coming, going = (
        replace(known.root, path=tmp_path / UUID / name, base_name=base)
        for name, base in (("disk.rebuilt", "1" * 40), ("disk.old", "2" * 40))
    )
    rebuild = Rebuild(
        job_id="job-2",
        origin=Origin(root="img-2", kernel="img-3"),
        image_digest=None,
        image_properties={},
        disks=(coming, replace(swap, bus="scsi")),
        domain_xml=None,
        was_running=False,
    )
    known = replace(known, disks=(known.root, swap), rebuild=rebuild, replaced=(going,))
    instances.write(known)

    [again] = Instances(tmp_path).all()

    assert again == known
    names = [disk.path.name for disk in again.every_disk]
    assert names == ["disk", "disk.swap", "disk.rebuilt", "disk.old"]
    assert again.base_names == {BASE, "1" * 40, "2" * 40}


def test_what_a_job_has_made_of_an_instance_is_known(tmp_path: Path) -> None:
    known = record(tmp_path)
    rescue = Rescue(job_id="job-2", domain_xml="<domain/>", was_running=True)
    rescued = replace(known, rescue=rescue)
    settled = replace(known, unrescued_by="job-3", rebuilt_by="job-4")
    assert (known.has_of("job-1"), known.has_of("job-2")) == (True, False)
    assert rescued.has_of("job-2")
    assert [settled.has_of(f"job-{number}") for number in (2, 3, 4)] == [False, True, True]


def test_directory_lets_the_hypervisors_user_through_and_nobody_look(
    instances: Instances, tmp_path: Path
) -> None:
    directory = instances.write(record(tmp_path))
    assert directory.stat().st_mode & 0o777 == 0o711
    assert (directory / "instance.json").stat().st_mode & 0o777 == 0o640


def test_instances_are_listed_oldest_first(instances: Instances, tmp_path: Path) -> None:
    instances.write(replace(record(tmp_path), created_at=20.0))
    instances.write(replace(record(tmp_path, OTHER, "web-2"), created_at=10.0))
    assert [each.name for each in instances.all()] == ["web-2", "web-1"]


def test_name_that_is_the_uuid_of_another_does_not_hide_it(
    instances: Instances, tmp_path: Path
) -> None:
    instances.write(record(tmp_path))
    instances.write(record(tmp_path, uuid=OTHER, name=UUID))
    assert instances.find(UUID).uuid == UUID
    assert instances.find("web-1").uuid == UUID
    instances.remove(UUID)
    assert instances.find(UUID).uuid == OTHER
    with pytest.raises(NotFound):
        instances.find("web-1")


@pytest.mark.parametrize(("uuid", "name"), [(UUID, "web-2"), (OTHER, "web-1")])
def test_neither_name_nor_uuid_is_given_twice(
    instances: Instances, tmp_path: Path, uuid: str, name: str
) -> None:
    instances.write(record(tmp_path))
    with pytest.raises(InstanceExists, match=UUID):
        instances.claim(uuid=uuid, name=name, job_id="job-2")


@pytest.mark.parametrize(("uuid", "name"), [(UUID, "web-2"), (OTHER, "web-1")])
def test_what_a_job_has_claimed_is_nobody_elses_until_it_lets_go(
    instances: Instances, uuid: str, name: str
) -> None:
    instances.claim(uuid=UUID, name="web-1", job_id="job-1")
    with pytest.raises(InstanceExists, match="job-1"):
        instances.claim(uuid=uuid, name=name, job_id="job-2")
    instances.release("job-1")
    instances.claim(uuid=uuid, name=name, job_id="job-2")


def test_job_that_runs_again_gets_what_its_own_record_says(
    instances: Instances, tmp_path: Path
) -> None:
    instances.write(record(tmp_path))
    again = Instances(tmp_path)
    again.claim(uuid=UUID, name="web-1", job_id="job-1")
    with pytest.raises(InstanceExists):
        again.claim(uuid=UUID, name="web-1", job_id="job-2")


def test_removed_instance_leaves_nothing(instances: Instances, tmp_path: Path) -> None:
    directory = instances.write(record(tmp_path))
    (directory / "disk").write_bytes(b"overlay")
    (directory / "deeper").mkdir()
    (directory / "deeper" / "file").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (directory / "link").symlink_to(outside)

    instances.remove(UUID)
    instances.remove(UUID)

    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "precious").exists()
    assert instances.all() == []
    with pytest.raises(NotFound):
        instances.find("web-1")


def test_instance_whose_removal_was_interrupted_can_be_removed_again(
    instances: Instances, tmp_path: Path
) -> None:
    directory = instances.write(record(tmp_path))
    (directory / "disk").write_bytes(b"overlay")
    (directory / "disk").unlink()  # as far as a crash let it come

    again = Instances(tmp_path)
    again.sweep()
    assert again.find("web-1").uuid == UUID
    again.remove(UUID)
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_a_crash_left_and_nothing_else(
    instances: Instances, tmp_path: Path
) -> None:
    directory = instances.write(record(tmp_path))
    (directory / "disk").write_bytes(b"overlay")
    unfinished = directory / ".disk.eph0.0123456789abcdef.tmp"
    unfinished.write_bytes(b"half")
    unrecorded = tmp_path / OTHER
    unrecorded.mkdir()
    unwritten = unrecorded / ".instance.json.0123456789abcdef.tmp"
    unwritten.write_text("{")
    for name in ("_base", "locks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".something.tmp").touch()

    again = Instances(tmp_path)
    assert set(again.sweep()) == {unfinished, unwritten, unrecorded}
    assert again.sweep() == []

    assert {path.name for path in tmp_path.iterdir()} == {UUID, "_base", "locks"}
    assert {path.name for path in directory.iterdir()} == {"disk", "instance.json"}
    assert len(list(tmp_path.glob("*/.something.tmp"))) == 2


def test_sweep_keeps_disks_whose_record_was_moved_aside(
    instances: Instances, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = instances.write(record(tmp_path))
    (directory / "disk").write_bytes(b"precious")
    (directory / "instance.json").rename(tmp_path / "instance.json.bad")

    again = Instances(tmp_path)
    assert again.sweep() == []

    assert (directory / "disk").read_bytes() == b"precious"
    assert str(directory) in caplog.text
    assert "put the record back" in caplog.text


@pytest.mark.parametrize("left", ["disk", "instance.json"])
def test_files_of_an_instance_without_a_readable_record_reserve_its_uuid(
    tmp_path: Path, left: str
) -> None:
    (tmp_path / UUID).mkdir()
    (tmp_path / UUID / left).write_bytes(b"precious")
    with pytest.raises(InstanceExists, match=str(tmp_path / UUID)):
        Instances(tmp_path).claim(uuid=UUID, name="web-1", job_id="job-1")


def test_job_that_came_no_further_than_its_directory_runs_again(tmp_path: Path) -> None:
    (tmp_path / UUID).mkdir()
    (tmp_path / UUID / ".instance.json.0123456789abcdef.tmp").write_text("{")
    Instances(tmp_path).claim(uuid=UUID, name="web-1", job_id="job-1")


def test_record_of_another_release_is_not_guessed_at(instances: Instances, tmp_path: Path) -> None:
    path = instances.write(record(tmp_path)) / "instance.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    assert Instances(tmp_path).unreadable == (path,)


def test_instance_may_be_removed_by_several_at_once(instances: Instances, tmp_path: Path) -> None:
    for _ in range(20):
        directory = instances.write(record(tmp_path))
        for number in range(50):
            (directory / f"disk.eph{number}").touch()
        ready = threading.Barrier(4)
        failed: list[Exception] = []

        def remove(ready: threading.Barrier = ready, failed: list[Exception] = failed) -> None:
            ready.wait()
            try:
                instances.remove(UUID)
            except Exception as e:  # noqa: BLE001 - whatever it is, it shall not be
                failed.append(e)

        threads = [threading.Thread(target=remove) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert not directory.exists()


def test_what_the_file_system_refuses_is_an_error_of_the_job(
    instances: Instances, tmp_path: Path
) -> None:
    (tmp_path / OTHER).touch()
    with pytest.raises(BackendError, match=OTHER):
        instances.write(record(tmp_path, OTHER, "web-2"))
    with pytest.raises(BackendError, match=r"console\.log"):
        instances.create_console(OTHER)
    # Files that not even root may remove.
    (tmp_path / UUID).symlink_to("/proc/self/fdinfo")
    with pytest.raises(BackendError, match="removing"):
        instances.remove(UUID)


def test_record_that_could_not_be_written_leaves_no_directory(
    instances: Instances, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(BackendError, match="File too large"):
            instances.write(record(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(tmp_path.iterdir()) == []
    assert instances.get(UUID) is None


def test_full_disk_is_said_to_be_full(full_file_system: Path) -> None:
    instances = Instances(full_file_system)
    # For the directory alone.
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", full_file_system], check=True)
    with pytest.raises(InsufficientFreeSpace, match=UUID):
        instances.write(record(full_file_system))
    assert instances.get(UUID) is None


def test_rewrite_that_failed_leaves_the_record_as_it_was(
    instances: Instances, tmp_path: Path
) -> None:
    before = record(tmp_path)
    instances.write(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(BackendError):
            instances.write(replace(before, name="web-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert instances.get(UUID) == before
    assert Instances(tmp_path).get(UUID) == before


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"uuid": 1}', json.dumps({"version": 1})])
def test_record_that_cannot_be_read_is_named_and_kept(
    instances: Instances, tmp_path: Path, contents: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = instances.write(record(tmp_path)) / "instance.json"
    path.write_text(contents)

    again = Instances(tmp_path)
    again.sweep()

    assert again.unreadable == (path,)
    assert str(path) in caplog.text
    assert path.read_text() == contents
    assert again.all() == []
