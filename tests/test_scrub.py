"""Damaged bases: found, put away, fetched anew, and nobody given one."""

import dataclasses
import errno
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from agent import manifest as manifests
from agent.cancellation import Cancellation
from agent.errors import BackendError, ImageSourceUnavailable
from agent.image import Image
from agent.manifest import manifest_path
from agent.scrub import Scrub
from agent.store import Entry, Store
from agent.usage import Usage
from agent.verification import Verifier
from agent.views import Soundness, Verification
from tests.cache_kit import MIB, CacheKit, Source, kit, random_bytes, source
from tests.waiting import LIMIT_S, until

__all__ = ["kit", "source"]


def verify(kit: CacheKit, image: Image) -> Verification:
    return kit.verifier.verify(image.id, Cancellation())


def flip_a_bit(path: Path, offset: int = MIB // 2) -> None:
    """In place, leaving size and times as they were."""
    times = path.stat()
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        os.fsync(file.fileno())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def quarantined(kit: CacheKit) -> list[str]:
    return sorted(path.name[:40] for path in (kit.store.directory / ".quarantine").iterdir())


def test_a_sound_base_is_intact(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(2))
    base = kit.fetch(image)
    found = verify(kit, image)
    assert (found.soundness, found.digest) == (Soundness.INTACT, base.digest)
    assert quarantined(kit) == []


def test_a_flipped_bit_is_found_and_the_base_fetched_anew(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(2))
    base = kit.fetch(image)
    flip_a_bit(base.path)

    assert verify(kit, image).soundness is Soundness.DAMAGED
    assert not base.path.exists()
    assert quarantined(kit) == [base.name, base.name]  # the file and its manifest

    assert kit.fetch(image).path.read_bytes() == source.data[image.id]
    assert len(source.opened) == 2


def test_instances_on_a_damaged_base_are_named_and_keep_a_file(
    kit: CacheKit, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    image = source.add(random_bytes(2))
    base = kit.fetch(image)
    kit.add_instance(base, name="web-1")
    flip_a_bit(base.path)
    with base.path.open("rb") as guest:
        found = verify(kit, image)
        assert (found.soundness, found.instances) == (Soundness.DAMAGED, ("web-1",))
        assert any(r.levelname == "ERROR" and "web-1" in r.message for r in caplog.records)
        # Its overlay would not start without it; and nobody else is given it.
        assert base.path.exists()
        assert kit.store.entries() == []
        damaged = base.path.read_bytes()

        kit.fetch(image)

        assert base.path.read_bytes() == source.data[image.id]
        assert guest.read() == damaged


def test_a_damaged_file_is_taken_from_all_images_that_share_it(
    kit: CacheKit, source: Source
) -> None:
    data = random_bytes(1)
    first, second = (source.add(data, image_id=name) for name in ("first", "second"))
    base = kit.fetch(first)
    kit.fetch(second)
    flip_a_bit(base.path)

    verify(kit, second)

    assert kit.store.entries() == []


def test_a_base_that_was_replaced_is_verified_before_it_is_used(
    kit: CacheKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    base = kit.fetch(image)
    copy = base.path.with_suffix(".copy")
    shutil.copyfile(base.path, copy)
    copy.rename(base.path)
    # As a restore from a good backup.
    assert kit.fetch(image).origin == "cache"
    assert len(source.opened) == 1

    # And from a bad one.
    shutil.copyfile(base.path, copy)
    flip_a_bit(copy)
    copy.rename(base.path)
    again = kit.fetch(image)
    assert again.origin == "memory"
    assert again.path.read_bytes() == source.data[image.id]


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_flipped_bit_is_found_before_the_base_is_used_where_that_is_wanted(
    tmp_path: Path, source: Source, disk_format: str
) -> None:
    kit = CacheKit(directory=tmp_path / "paranoid", source=source, verify_before_use=True)
    disk, path = random_bytes(2), tmp_path / "image"
    (tmp_path / "raw").write_bytes(disk)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", disk_format, tmp_path / "raw", path], check=True
    )
    image = source.add(path.read_bytes(), disk_format=disk_format)
    base = kit.fetch(image)
    assert (kit.fetch(image).origin, len(source.opened)) == ("cache", 1)

    flip_a_bit(base.path)

    # However many ask at once, it is looked at, and fetched, once.
    with ThreadPoolExecutor(4) as pool:
        bases = list(pool.map(lambda _: kit.fetch(image), range(4)))
    assert [each.path.read_bytes() == disk for each in bases] == [True] * 4
    assert len(source.opened) == 2
    # Offline too, as long as it is sound.
    source.available = False
    assert kit.fetch(image).origin == "cache"
    flip_a_bit(base.path)
    with pytest.raises(ImageSourceUnavailable):
        kit.fetch(image)


def test_base_that_nobody_has_hashed_is_fetched_anew_where_bases_are_verified_before_use(
    tmp_path: Path, kit: CacheKit, source: Source
) -> None:
    (tmp_path / "raw").write_bytes(disk := random_bytes(2))
    converted = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", "-f", "raw", tmp_path / "raw", converted], check=True
    )
    image = source.add(converted.read_bytes(), disk_format="qcow2")
    base = kit.fetch(image)
    (entry,) = kit.store.entries()
    assert entry.manifest.content_digest is None
    flip_a_bit(base.path)

    kit = CacheKit(directory=kit.directory, source=source, verify_before_use=True)

    assert kit.fetch(image).origin == "memory"
    assert base.path.read_bytes() == disk
    assert kit.fetch(image).origin == "cache"
    assert len(source.opened) == 2


def test_bytes_nobody_has_hashed_are_hashed_and_remembered(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(1))
    base = kit.fetch(image)
    path = manifest_path(base.path)
    known = manifests.read(path)
    assert known is not None
    manifests.write(path, dataclasses.replace(known, content_digest=None))

    assert verify(kit, image).soundness is Soundness.RECORDED
    assert verify(kit, image).soundness is Soundness.INTACT
    flip_a_bit(base.path)
    assert verify(kit, image).soundness is Soundness.DAMAGED


def test_what_was_converted_is_due_at_once(kit: CacheKit, source: Source) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    path = manifest_path(base.path)
    known = manifests.read(path)
    assert known is not None
    manifests.write(path, dataclasses.replace(known, content_digest=None))

    Scrub(kit.store, kit.verifier, interval_s=3600, repair=not_repaired).run_once(Cancellation())

    (entry,) = kit.store.entries()
    assert entry.manifest.content_digest == base.digest


def not_repaired(image: Image) -> None:
    raise AssertionError(f"{image.id} needs no repair")


def test_the_scrub_verifies_what_is_due_and_repairs_what_instances_need(
    kit: CacheKit, source: Source, tmp_path: Path
) -> None:
    pressed = tmp_path / "pressure"
    pressed.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    image = source.add(random_bytes(1), image_id="in-use")
    unused = source.add(random_bytes(1), image_id="unused")
    bases = [kit.fetch(image), kit.fetch(unused)]
    kit.add_instance(bases[0])
    for base in bases:
        flip_a_bit(base.path)
    repaired: list[str] = []

    def repair(image: Image) -> None:
        repaired.append(image.id)
        kit.fetch(image)

    def scrub(interval_s: float) -> None:
        Scrub(
            kit.store, kit.verifier, interval_s=interval_s, repair=repair, pressure=pressed
        ).run_once(Cancellation())

    scrub(3600)
    assert len(kit.store.entries()) == 2  # none was due
    scrub(0)
    assert repaired == ["in-use"]
    assert [entry.manifest.image.id for entry in kit.store.entries()] == ["in-use"]
    assert bases[0].path.read_bytes() == source.data["in-use"]


def test_the_scrub_goes_on_when_one_repair_fails(kit: CacheKit, source: Source) -> None:
    for name in ("a", "b"):
        base = kit.fetch(source.add(random_bytes(1), image_id=name))
        kit.add_instance(base, name=f"on-{name}")
        flip_a_bit(base.path)

    def repair(_: Image) -> None:
        raise ImageSourceUnavailable("the source is away")

    Scrub(kit.store, kit.verifier, interval_s=0, repair=repair).run_once(Cancellation())
    assert kit.store.entries() == []


def test_the_scrub_gives_way_to_a_busy_disk_and_ends_when_told(
    kit: CacheKit, source: Source, tmp_path: Path
) -> None:
    pressed = tmp_path / "pressure"
    pressed.write_text("some avg10=80.00 avg60=0.00 avg300=0.00 total=0\n")
    kit.fetch(source.add(random_bytes(1)))
    before = kit.store.entries()[0].manifest.verified_at
    scrub = Scrub(kit.store, kit.verifier, interval_s=0, repair=not_repaired, pressure=pressed)
    begun = time.monotonic()
    scrub.start()
    until(lambda: kit.store.entries()[0].manifest.verified_at != before)
    assert time.monotonic() - begun > 0.9  # a pause, and then on
    scrub.stop(LIMIT_S)
    assert not any(thread.name == "scrub" for thread in threading.enumerate())


def test_the_scrub_outlives_what_the_disk_does_to_it(tmp_path: Path, source: Source) -> None:
    class FailingOnce(Store):
        failures = 1

        def entries(self) -> list[Entry]:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "Input/output error")
            return super().entries()

    kit = CacheKit(directory=tmp_path / "instances", source=source)
    kit.fetch(source.add(random_bytes(1)))
    before = kit.store.entries()[0].manifest.verified_at
    store = FailingOnce(kit.store.directory)
    scrub = Scrub(store, kit.verifier, interval_s=0, repair=not_repaired, look_every_s=0.05)
    scrub.start()
    try:
        until(lambda: kit.store.entries()[0].manifest.verified_at != before)
    finally:
        scrub.stop(LIMIT_S)


def test_one_base_the_disk_refuses_does_not_end_the_round(kit: CacheKit, source: Source) -> None:
    for name in ("a", "b"):
        kit.fetch(source.add(random_bytes(1), image_id=name))
    (before, first) = kit.store.entries()[:2]

    class Refusing(Verifier):
        def verify(self, image_id: str, *_: object, **__: object) -> Verification:
            if image_id == "a":
                raise OSError(errno.EROFS, "Read-only file system")
            return kit.verifier.verify(image_id, Cancellation())

    Scrub(kit.store, Refusing(kit.store, kit.usage), interval_s=0, repair=not_repaired).run_once(
        Cancellation()
    )

    verified = {e.manifest.image.id: e.manifest.verified_at for e in kit.store.entries()}
    earlier = {e.manifest.image.id: e.manifest.verified_at for e in (before, first)}
    assert verified["a"] == earlier["a"]
    assert verified["b"] > earlier["b"]


def reading(kit: CacheKit, *, fails_at: int, error: int) -> Verifier:
    """A verifier on a disk that fails for what lies beyond an offset."""

    def pread(fd: int, count: int, offset: int) -> bytes:
        if offset >= fails_at:
            raise OSError(error, os.strerror(error))
        return os.pread(fd, min(count, fails_at - offset), offset)

    return Verifier(kit.store, kit.usage, pread=pread)


@pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN, errno.ENODATA])
def test_a_base_the_disk_cannot_read_is_damaged(kit: CacheKit, source: Source, error: int) -> None:
    image = source.add(random_bytes(2))
    base = kit.fetch(image)
    kit.add_instance(base, name="web-1")

    found = reading(kit, fails_at=MIB, error=error).verify(image.id, Cancellation())

    assert (found.soundness, found.instances) == (Soundness.DAMAGED, ("web-1",))
    assert found.digest == f"unreadable at byte {MIB}"
    assert kit.store.entries() == []
    assert kit.fetch(image).origin == "memory"


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EMFILE])
def test_a_base_the_agent_may_not_read_is_no_damage(
    kit: CacheKit, source: Source, error: int
) -> None:
    image = source.add(random_bytes(1))
    kit.fetch(image)
    with pytest.raises(BackendError):
        reading(kit, fails_at=0, error=error).verify(image.id, Cancellation())
    assert len(kit.store.entries()) == 1


def test_reads_that_bring_less_than_asked_for_are_gone_on_with(
    kit: CacheKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    kit.fetch(image)
    verifier = Verifier(
        kit.store, kit.usage, pread=lambda fd, count, at: os.pread(fd, min(count, 100_001), at)
    )
    assert verifier.verify(image.id, Cancellation()).soundness is Soundness.INTACT


def test_a_restored_base_nobody_had_hashed_is_fetched_anew_and_not_called_damaged(
    kit: CacheKit, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    image = source.add(random_bytes(1))
    base = kit.fetch(image)
    kit.add_instance(base)
    path = manifest_path(base.path)
    known = manifests.read(path)
    assert known is not None
    manifests.write(path, dataclasses.replace(known, content_digest=None))
    copy = base.path.with_suffix(".copy")
    shutil.copyfile(base.path, copy)
    copy.rename(base.path)

    found = verify(kit, image)

    assert (found.soundness, found.instances) == (Soundness.UNRECOGNISED, ())
    assert [r.levelname for r in caplog.records if r.name == "agent.verification"] == ["WARNING"]
    assert base.path.exists()  # the instance goes on
    assert quarantined(kit) == []
    assert kit.fetch(image).origin == "memory"


def test_a_twin_that_is_removed_meanwhile_is_no_failure(kit: CacheKit, source: Source) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    kit.store.remove(base.name)
    kit.store.quarantine(base.name, in_use=False)
    assert quarantined(kit) == []


def test_damage_is_put_away_while_another_host_holds_the_claims(
    kit: CacheKit, source: Source
) -> None:
    class Held(Usage):
        def held_still(self) -> NoReturn:
            raise BackendError("another host holds the lock")

    image = source.add(random_bytes(1))
    base = kit.fetch(image)
    flip_a_bit(base.path)
    usage = Held(kit.store, kit.instances, host_id="this")

    found = Verifier(kit.store, usage).verify(image.id, Cancellation())

    assert found.soundness is Soundness.DAMAGED

    assert base.path.exists()
    assert kit.store.entries() == []
