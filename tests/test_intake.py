"""Images decoded as they arrive, interrupted anywhere, gone on with."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import InsufficientFreeSpace
from agent.image import Image
from agent.inspection import HEAD, Inspection
from agent.intake import Undecodable, decoded
from agent.intake.decoded import DecodedIntake
from agent.intake.marker import MARK_EVERY, Marker
from agent.intake.plain import PlainIntake
from agent.intake.writer import Writer
from agent.partial import Partial
from agent.qemu_img import QemuImg
from tests.small_file_system import mounted_file_system

MIB = 1 << 20
SIZE = 200 * MIB

full_file_system = mounted_file_system("tmpfs")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk whose qcow2 takes three checkpoints."""
    path = tmp_path_factory.mktemp("disk") / "raw"
    with path.open("wb") as file:
        for _ in range(SIZE // MIB):
            file.write(os.urandom(MIB))
        file.truncate(SIZE + 40 * MIB)
    return path


@pytest.fixture(scope="module")
def qcow2(disk: Path) -> Path:
    path = disk.with_name("qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, path], check=True)
    return path


@pytest.fixture
def image(qcow2: Path) -> Image:
    data = qcow2.read_bytes()
    return Image(
        id="image",
        name="",
        source="memory",
        status="active",
        disk_format="qcow2",
        size=len(data),
        digest=("sha512", hashlib.sha512(data).hexdigest()),
    )


def pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(MIB, end - begin))):
            begin += len(piece)
            yield piece


def inspection(image: Image) -> Inspection:
    return Inspection(image.id, image.disk_format, size=image.size, vmdk_types=())


def begin(partial: Partial, image: Image, qcow2: Path) -> DecodedIntake:
    assert decoded.possible(image)
    partial.open()
    with qcow2.open("rb") as file:
        return DecodedIntake.begin(partial, algorithms=("sha512",), head=file.read(HEAD))


def resume(partial: Partial, look: Inspection) -> DecodedIntake:
    return DecodedIntake.resume(partial, look, algorithms=("sha512",), cancellation=Cancellation())


def take(intake: DecodedIntake, qcow2: Path, until: int, look: Inspection | None = None) -> None:
    for piece in pieces(qcow2, intake.offset, until):
        if look is not None:
            look.feed(piece)
        intake.take(piece)


def finish(intake: DecodedIntake, look: Inspection, image: Image, disk: Path, qcow2: Path) -> None:
    take(intake, qcow2, qcow2.stat().st_size, look)
    assert image.digest is not None
    assert intake.digests() == {"sha512": image.digest[1]}
    path = intake.disk(look.finish())
    intake.close()
    assert subprocess.run(["cmp", path, disk], check=False).returncode == 0


class LosingIntake(PlainIntake):
    """On a disk that loses what is written."""

    def _flush(self) -> None:
        raise OSError(errno.EIO, "lost")


def plain(partial: Partial, image: Image, kind: type[PlainIntake] = PlainIntake) -> PlainIntake:
    return kind(
        partial,
        inspection(image),
        algorithms=("sha512",),
        converter=QemuImg(),
        cancellation=Cancellation(),
    )


def left_by_a_killed_one(directory: Path, image: Image, qcow2: Path, reached: int) -> Partial:
    """Return the partial of a process that was killed when it had taken so many bytes."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            take(begin(Partial(directory, image), image, qcow2), qcow2, reached)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    return Partial(directory, image)


@pytest.mark.parametrize("reached", [MIB // 2 * 3, 70 * MIB, 131 * MIB, 190 * MIB + 12345])
def test_an_agent_that_dies_has_to_ask_for_nothing_again(
    tmp_path: Path, image: Image, disk: Path, qcow2: Path, reached: int
) -> None:
    partial = left_by_a_killed_one(tmp_path / "partial", image, qcow2, reached)

    assert partial.open()
    assert decoded.begun(partial)
    look = inspection(image)
    intake = resume(partial, look)

    assert intake.kept == intake.offset == reached
    finish(intake, look, image, disk, qcow2)


def test_a_host_that_crashes_goes_on_a_few_marks_back(
    tmp_path: Path, image: Image, disk: Path, qcow2: Path
) -> None:
    partial = left_by_a_killed_one(tmp_path / "partial", image, qcow2, 190 * MIB)
    state = partial.directory / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "boot_id": "another"}))

    assert partial.open()
    look = inspection(image)
    intake = resume(partial, look)

    assert 190 * MIB - intake.kept <= 65 * MIB
    assert not list(partial.directory.glob("tail-*"))
    finish(intake, look, image, disk, qcow2)


def test_after_a_stop_nothing_is_lost_to_a_reboot(
    tmp_path: Path, image: Image, disk: Path, qcow2: Path
) -> None:
    partial = Partial(tmp_path / "partial", image)
    stopped = begin(partial, image, qcow2)
    take(stopped, qcow2, 100 * MIB)
    stopped.close()
    state = partial.directory / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "boot_id": "another"}))

    partial = Partial(tmp_path / "partial", image)
    assert partial.open()
    look = inspection(image)
    intake = resume(partial, look)

    assert intake.kept == 100 * MIB
    finish(intake, look, image, disk, qcow2)


def test_what_is_kept_for_going_on_stays_small(tmp_path: Path, image: Image, qcow2: Path) -> None:
    partial = Partial(tmp_path / "partial", image)
    intake = begin(partial, image, qcow2)
    take(intake, qcow2, qcow2.stat().st_size)
    intake.digests()

    beside = [path for path in partial.directory.iterdir() if path.name != "raw"]
    assert sum(path.stat().st_blocks * 512 for path in beside) < 140 * MIB
    intake.close()


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path: Path, image: Image, qcow2: Path) -> None:
    partial = Partial(tmp_path / "partial", image)
    dying = begin(partial, image, qcow2)
    take(dying, qcow2, 100 * MIB)
    dying.close()
    checkpoint = partial.directory / "checkpoint.json"
    record = json.loads(checkpoint.read_text())
    checkpoint.write_text(json.dumps({**record, "hash_state": record["hash_state"][:-2] + "00"}))

    partial = Partial(tmp_path / "partial", image)
    assert partial.open()
    with pytest.raises(Undecodable, match="checkpoint"):
        resume(partial, inspection(image))


def test_a_decoder_that_failed_is_no_checkpoint(tmp_path: Path, image: Image, qcow2: Path) -> None:
    """Its hash has the bytes that its disk has not, and would match in the end."""
    partial = Partial(tmp_path / "partial", image)
    failing = begin(partial, image, qcow2)
    take(failing, qcow2, 10 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The next write to `raw` fails as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            take(failing, qcow2, 20 * MIB)
        failing.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not (partial.directory / "checkpoint.json").exists()


def test_a_disk_that_is_full_is_said_to_be_so(full_file_system: Path, image: Image) -> None:
    raw = dataclasses.replace(image, disk_format="raw")
    partial = Partial(full_file_system / "partial", raw)
    partial.open()
    with contextlib.closing(plain(partial, raw)) as intake:
        intake.take(os.urandom(3 * MIB))
        with pytest.raises(InsufficientFreeSpace, match="data"):
            intake.digests()
    assert partial.durable == 0


def test_what_a_failed_sync_may_have_lost_is_no_part_of_a_partial(
    tmp_path: Path, image: Image
) -> None:
    """The page cache would show it to the next run, and that run's sync tell of nothing."""
    raw = dataclasses.replace(image, disk_format="raw")
    partial = Partial(tmp_path / "partial", raw)
    partial.open()
    intake = plain(partial, raw)
    intake.take(os.urandom(MIB))
    intake.close()
    assert partial.durable == MIB

    again = plain(partial, raw, LosingIntake)
    again.take(os.urandom(MIB))
    again.close()
    assert partial.data.stat().st_size == MIB


def test_the_network_does_not_wait_for_the_disk_but_for_an_error_of_it() -> None:
    held, written = threading.Event(), []

    def write(chunk: bytes) -> None:
        held.wait(10)
        if chunk == b"bad":
            raise OSError(errno.EIO, "lost")
        written.append(chunk)

    writer = Writer(write)
    with contextlib.closing(writer):
        for chunk in (b"one", b"two", b"bad", b"three"):
            writer.put(chunk)
        assert written == []
        held.set()
        writer.close()
        with pytest.raises(OSError, match="lost"):
            writer.put(b"four")
    assert written == [b"one", b"two"]


def test_a_sync_that_failed_is_not_forgotten() -> None:
    called = threading.Event()

    def fail(_mark: int) -> None:
        called.set()
        raise OSError(errno.EIO, "lost")

    marker = Marker(fail, 0)
    marker.reached(MARK_EVERY, lambda: 1)
    assert called.wait(10)
    marker.close()

    with pytest.raises(OSError, match="lost"):
        marker.check()
