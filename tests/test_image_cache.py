"""The image cache over a source that does what a test tells it to."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from agent.base import Base
from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    Cancelled,
    FlavorDiskSmallerThanImage,
    ImageCorrupt,
    ImageSourceUnavailable,
    ImageUnacceptable,
    NotFound,
)
from agent.locks import FileLock
from agent.manifest import base_name, manifest_path
from agent.report import Progress
from tests import service_user
from tests.cache_kit import IMAGE_ID, MIB, CacheKit, Source, kit, random_bytes, source

__all__ = ["kit", "source"]

NAME = "0d5e6b61602d758984b3bf038267614d6016eb2a"


MakeKit = Callable[[], CacheKit]


@pytest.fixture
def make_kit(tmp_path: Path, source: Source) -> MakeKit:
    """Each call is a restart of the agent."""
    return lambda: CacheKit(directory=tmp_path / "instances", source=source)


def leftovers(kit: CacheKit) -> list[str]:
    """Everything below the cache that is no entry and not kept by design."""
    kept = (".locks", ".hosts")
    return sorted(
        str(path.relative_to(kit.store.directory))
        for path in kit.store.directory.rglob("*")
        if path.is_file()
        and path.parent.name not in kept
        and len(path.name.removesuffix(".json")) != 40
    )


def test_the_base_of_a_known_image_has_novas_name() -> None:
    assert base_name(IMAGE_ID) == NAME


def test_a_miss_makes_an_entry_and_a_hit_asks_for_no_byte(kit: CacheKit, source: Source) -> None:
    data = random_bytes(3)
    image = source.add(data)

    first = kit.acquire(image)
    second = kit.acquire(image)

    assert first.path == kit.store.directory / NAME
    assert first.path.read_bytes() == data
    assert (first.origin, second.origin) == ("memory", "cache")
    assert (first.received, second.received) == (len(data), 0)
    assert source.opened == [(IMAGE_ID, 0)]
    assert leftovers(kit) == []
    assert first.path.stat().st_mode & 0o777 == 0o640


def test_a_qcow2_becomes_a_raw_base(kit: CacheKit, source: Source, tmp_path: Path) -> None:
    data = random_bytes(2) + bytes(MIB) + random_bytes(1)
    (tmp_path / "raw").write_bytes(data)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2"],
        check=True,
    )
    image = source.add((tmp_path / "qcow2").read_bytes(), disk_format="qcow2")

    base = kit.acquire(image)

    assert (base.format, base.virtual_size) == ("raw", len(data))
    assert base.path.read_bytes() == data
    assert leftovers(kit) == []


def test_a_conversion_that_fails_names_the_image_and_leaves_nothing(
    kit: CacheKit, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(random_bytes(2))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized",
         tmp_path / "raw", tmp_path / "vmdk"],
        check=True,
    )  # fmt: skip
    # Tables and the first grains are sound; no more of one is known before it is unpacked.
    data = bytearray((tmp_path / "vmdk").read_bytes())
    data[-4096:-1024] = bytes(3072)
    image = source.add(bytes(data), disk_format="vmdk")

    with pytest.raises(ImageUnacceptable, match=f"image {image.id}: converting .* vmdk to raw"):
        kit.acquire(image)

    assert kit.store.entries() == []
    assert leftovers(kit) == []


def test_holes_of_a_raw_image_stay_holes(kit: CacheKit, source: Source) -> None:
    data = random_bytes(1) + bytes(30 * MIB) + random_bytes(1)

    base = kit.acquire(source.add(data))

    assert base.path.read_bytes() == data
    assert base.path.stat().st_blocks * 512 < 4 * MIB


def test_many_callers_of_one_cold_image_make_one_fetch(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(4))
    source.gate.clear()
    bases: list[Base] = []
    threads = [
        threading.Thread(
            target=lambda pin=f"job-{number}": bases.append(kit.acquire(image, pin=pin))
        )
        for number in range(10)
    ]
    for thread in threads:
        thread.start()
    while sum(fetch.waiters for fetch in kit.cache.fetches()) < len(threads):
        time.sleep(0.01)
    source.gate.set()
    for thread in threads:
        thread.join()

    assert len(source.opened) == 1
    assert {base.path for base in bases} == {kit.store.directory / NAME}
    assert sorted(base.received for base in bases) == [0] * 9 + [4 * MIB]


def test_no_more_images_are_fetched_at_a_time_than_configured(
    kit: CacheKit, source: Source
) -> None:
    images = [source.add(random_bytes(1), image_id=f"image-{number}") for number in range(7)]
    source.gate.clear()
    with ThreadPoolExecutor(len(images)) as pool:
        fetches = [pool.submit(kit.acquire, image) for image in images]
        deadline = time.monotonic() + 20
        while len(source.opened) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        # A fifth would not take long.
        time.sleep(0.3)
        assert len(source.opened) == 4
        source.gate.set()
        assert all(fetch.result().origin == "memory" for fetch in fetches)
    assert len(source.opened) == 7


def test_a_waiter_that_is_cancelled_leaves_and_the_others_stay(
    kit: CacheKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    source.gate.clear()
    leaving = Cancellation()
    errors: list[BootwrightError] = []

    def leave() -> None:
        try:
            kit.acquire(image, pin="leaving", cancellation=leaving)
        except BootwrightError as e:
            errors.append(e)

    staying: list[Base] = []
    first = threading.Thread(target=leave)
    second = threading.Thread(target=lambda: staying.append(kit.acquire(image, pin="staying")))
    first.start()
    second.start()
    while sum(fetch.waiters for fetch in kit.cache.fetches()) < 2:
        time.sleep(0.01)
    leaving.cancel(Cancelled("enough"))
    first.join(5)
    assert [type(error) for error in errors] == [Cancelled]
    source.gate.set()
    second.join()

    assert len(staying) == 1
    assert len(source.opened) == 1


def test_the_last_waiter_out_ends_the_fetch_and_what_came_is_gone_on_with(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(8))
    kit = make_kit()
    only = Cancellation()

    def leave_halfway(progress: Progress) -> None:
        if progress.bytes_done >= 3 * MIB:
            only.cancel(Cancelled("enough"))

    source.break_at = 3 * MIB
    with pytest.raises((Cancelled, ImageSourceUnavailable)):
        kit.acquire(image, cancellation=only, on_progress=leave_halfway)
    kit.cache.close(10)
    source.break_at = None

    base = make_kit().acquire(image)

    assert base.resumed == 3 * MIB
    assert base.received == 5 * MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_a_damaged_partial_costs_one_fetch_from_the_start(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(4))
    source.break_at = 2 * MIB
    kit = make_kit()
    with pytest.raises(ImageSourceUnavailable):
        kit.acquire(image)
    data = kit.store.directory / ".partial" / NAME / "data"
    with data.open("r+b") as file:
        file.write(b"damage")
    source.break_at = None

    base = make_kit().acquire(image)

    assert base.path.read_bytes() == source.data[IMAGE_ID]
    assert source.opened[-2:] == [(IMAGE_ID, 2 * MIB), (IMAGE_ID, 0)]


def test_after_a_boot_of_the_host_only_what_was_synced_counts(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(4))
    source.break_at = 2 * MIB
    kit = make_kit()
    with pytest.raises(ImageSourceUnavailable):
        kit.acquire(image)
    state = kit.store.directory / ".partial" / NAME / "state.json"
    record = json.loads(state.read_text())
    state.write_text(json.dumps({**record, "boot_id": "another", "durable": MIB}))
    source.break_at = None

    base = make_kit().acquire(image)

    assert base.resumed == MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_wrong_bytes_are_fetched_twice_and_then_refused(kit: CacheKit, source: Source) -> None:
    image = replace(source.add(random_bytes(2)), digest=("sha512", "0" * 128))

    with pytest.raises(ImageCorrupt, match="promised"):
        kit.acquire(image)

    assert [offset for _, offset in source.opened] == [0, 0]
    assert leftovers(kit) == []
    assert list((kit.store.directory / ".partial").iterdir()) == []
    assert kit.store.entries() == []


def test_an_image_without_any_hash_is_refused(kit: CacheKit, source: Source) -> None:
    image = replace(source.add(random_bytes(1)), digest=None)

    with pytest.raises(ImageUnacceptable, match="no hash"):
        kit.acquire(image)

    assert source.opened == []


def test_an_image_too_large_for_the_flavor_is_refused_at_its_header(
    kit: CacheKit, source: Source, tmp_path: Path
) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "big", "4G"], check=True)
    image = source.add((tmp_path / "big").read_bytes() + bytes(64 * MIB), disk_format="qcow2")

    with pytest.raises(FlavorDiskSmallerThanImage, match=str(4 << 30)):
        kit.acquire(image, max_virtual_size=1 << 30)

    assert list((kit.store.directory / ".partial").iterdir()) == []
    assert kit.store.entries() == []


def test_a_commit_interrupted_before_the_manifest_is_completed_without_a_fetch(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    kit = make_kit()
    base = kit.acquire(image)
    partial = kit.store.directory / ".partial" / NAME
    partial.mkdir()
    manifest_path(base.path).rename(partial / "manifest.json")

    again = make_kit().acquire(image)

    assert again.path.read_bytes() == source.data[IMAGE_ID]
    assert len(source.opened) == 1
    assert manifest_path(base.path).is_file()
    assert not partial.exists()


def test_a_file_without_a_manifest_is_no_entry(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(2))
    (kit.store.directory / NAME).write_bytes(b"who knows what this is")

    base = kit.acquire(image)

    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_a_verified_base_serves_while_the_source_is_away(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(1))
    kit.acquire(image)
    source.available = False

    assert kit.acquire(kit.cache.resolve(IMAGE_ID, Cancellation())).origin == "cache"
    with pytest.raises(ImageSourceUnavailable):
        kit.cache.resolve("another", Cancellation())


def test_a_base_in_use_is_not_removed(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(1))
    base = kit.acquire(image, pin="job-7")

    with pytest.raises(BackendError, match="job-7"):
        kit.pruner.remove(IMAGE_ID)
    kit.cache.unpin("job-7")
    kit.pruner.remove(IMAGE_ID)

    assert not base.path.exists()
    with pytest.raises(NotFound):
        kit.store.get(IMAGE_ID)


def test_an_image_that_changed_under_its_id_is_refused(kit: CacheKit, source: Source) -> None:
    kit.acquire(source.add(random_bytes(1)))

    with pytest.raises(ImageCorrupt, match="another hash"):
        kit.acquire(source.add(random_bytes(1)))


def test_closing_interrupts_a_fetch_and_keeps_what_came(make_kit: MakeKit, source: Source) -> None:
    image = source.add(random_bytes(4))
    kit = make_kit()
    source.gate.clear()
    errors: list[BootwrightError] = []

    def wait() -> None:
        try:
            kit.acquire(image)
        except BootwrightError as e:
            errors.append(e)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not source.opened:
        time.sleep(0.01)
    closer = threading.Thread(target=kit.cache.close, args=(10,))
    closer.start()
    time.sleep(0.05)
    source.gate.set()
    closer.join()
    waiter.join()

    assert [type(error) for error in errors] == [AgentStopping]
    with pytest.raises(AgentStopping):
        kit.acquire(image)


def sweep(kit: CacheKit, *, partials_s: float) -> None:
    kit.store.sweep(partials_s=partials_s, quarantine_s=3600, keep=kit.usage.may_need)


def test_sweep_removes_what_nobody_went_on_with_and_no_entry(kit: CacheKit, source: Source) -> None:
    base = kit.acquire(source.add(random_bytes(1)))
    partial = kit.store.directory / ".partial" / ("1" * 40)
    partial.mkdir()
    (partial / "data").write_bytes(b"x")
    half_committed = kit.store.directory / ("1" * 40)
    half_committed.write_bytes(b"x")
    stray = kit.store.directory / ("2" * 40)
    stray.write_bytes(b"x")
    aside = kit.store.directory / f".{'3' * 40}.json.0123456789abcdef.tmp"
    aside.write_bytes(b"x")

    sweep(kit, partials_s=3600)
    assert partial.exists()
    assert half_committed.exists()
    assert not stray.exists()
    assert not aside.exists()
    sweep(kit, partials_s=-1)

    assert not partial.exists()
    assert not half_committed.exists()
    assert [entry.path for entry in kit.store.entries()] == [base.path]


def test_sweep_spares_a_base_without_a_manifest_that_an_instance_stands_on(
    kit: CacheKit, source: Source
) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    kit.add_instance(base)
    manifest_path(base.path).unlink()

    sweep(kit, partials_s=-1)

    assert base.path.exists()


def test_sweep_leaves_alone_what_does_not_bear_a_name_of_ours(
    kit: CacheKit, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    # A base in use without its manifest, which a shorter name is the beginning of.
    kit.acquire(source.images[IMAGE_ID])
    manifest_path(base.path).unlink()
    foreign = [
        kit.store.directory / name
        for name in ("0", "0d", "0.json", f"{NAME}_20", f"{NAME.upper()}", "swap_1024", "README")
    ]
    for path in foreign:
        path.write_bytes(b"x")
    old_partial = kit.store.directory / ".partial/0"
    old_partial.mkdir()
    (kit.store.directory / ".partial/note").write_bytes(b"x")
    (kit.store.directory / "x.json").mkdir()

    sweep(kit, partials_s=-1)
    sweep(kit, partials_s=-1)

    assert base.path.exists()
    assert all(path.exists() for path in foreign)
    assert old_partial.exists()
    warned = [r.message for r in caplog.records if "left alone" in r.message]
    assert len(warned) == len(foreign)
    assert kit.store.entries() == []


def test_a_stray_name_takes_no_file_of_another_base_along(kit: CacheKit, source: Source) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    manifest_path(base.path).unlink()
    (kit.store.directory / "0").write_bytes(b"x")
    lock = FileLock(kit.store.lock_of(base.name))
    assert lock.try_acquire()

    sweep(kit, partials_s=-1)
    lock.release()

    assert base.path.exists()


def test_sweep_drops_at_once_the_partial_of_an_image_that_is_here(
    kit: CacheKit, source: Source
) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    # As a kill leaves it between the last step of the commit and the end.
    partial = kit.store.directory / ".partial" / base.name
    partial.mkdir()
    (partial / "data").write_bytes(b"x")

    sweep(kit, partials_s=3600)

    assert not partial.exists()
    assert [entry.path for entry in kit.store.entries()] == [base.path]


def test_a_manifest_that_cannot_be_read_is_as_good_as_none_but_is_not_swept(
    kit: CacheKit, source: Source
) -> None:
    other = kit.fetch(source.add(random_bytes(1), image_id="other"))
    base = kit.fetch(source.add(random_bytes(1)))
    manifest_path(base.path).unlink()
    manifest_path(base.path).mkdir()  # reading it fails, whoever reads

    assert [entry.path for entry in kit.store.entries()] == [other.path]
    sweep(kit, partials_s=3600)
    assert base.path.exists()
    # And a fetch says what is in its way.
    with pytest.raises(BackendError, match="cannot be changed"):
        kit.fetch(source.images[IMAGE_ID])


def test_a_base_that_is_there_is_handed_out_though_its_partial_cannot_be_removed(
    make_kit: MakeKit, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    image = source.add(random_bytes(1))
    kit = make_kit()
    base = kit.acquire(image)
    partial = kit.store.directory / ".partial" / NAME
    partial.mkdir()
    manifest_path(base.path).rename(partial / "manifest.json")
    with mounted_over(partial / "busy"):
        assert make_kit().acquire(image).path.read_bytes() == source.data[IMAGE_ID]
    assert any("next sweep" in record.message for record in caplog.records)


def test_a_commit_that_cannot_be_completed_is_no_defect_of_ours(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(1))
    kit = make_kit()
    base = kit.acquire(image)
    partial = kit.store.directory / ".partial" / NAME
    partial.mkdir()
    manifest_path(base.path).rename(partial / "manifest.json")
    manifest_path(base.path).mkdir()

    with pytest.raises(BackendError, match="cannot be changed"):
        make_kit().acquire(image)


def test_a_flight_that_cannot_take_off_is_gone(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(1))
    before = threading.stack_size(1 << 46)  # more than a process can have
    try:
        with pytest.raises(BackendError, match="thread"):
            kit.acquire(image)
    finally:
        threading.stack_size(before)
    assert kit.cache.being_fetched() == []
    assert kit.acquire(image).path.read_bytes() == source.data[IMAGE_ID]


@contextlib.contextmanager
def mounted_over(directory: Path) -> Iterator[None]:
    """Make a directory that nobody can remove."""
    service_user.require_root()
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_sweep_leaves_alone_what_somebody_is_at_work_on(kit: CacheKit) -> None:
    stray = kit.store.directory / ("2" * 40)
    stray.write_bytes(b"x")
    lock = FileLock(kit.store.lock_of(stray.name))
    assert lock.try_acquire()

    sweep(kit, partials_s=-1)
    lock.release()

    assert stray.exists()


def test_cache_has_a_base_as_long_as_it_is_the_file_that_was_verified(
    kit: CacheKit, source: Source
) -> None:
    image = source.add(random_bytes(1))
    assert not kit.cache.has(image.id)
    base = kit.fetch(image)
    assert kit.cache.has(image.id)
    base.path.chmod(0o600)
    base.path.write_bytes(b"another")
    assert not kit.cache.has(image.id)
