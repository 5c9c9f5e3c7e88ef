"""The image cache over a source that does what a test tells it to."""

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
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
    ImageNotFound,
    ImageSourceUnavailable,
    ImageUnacceptable,
    NotFound,
)
from agent.image import Image
from agent.image_cache import ImageCache
from agent.manifest import base_name, manifest_path
from agent.qemu_img import QemuImg
from agent.report import Progress
from agent.transfer import RetryPolicy

MIB = 1 << 20
NAME = "0d5e6b61602d758984b3bf038267614d6016eb2a"
IMAGE_ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


class Source:
    """An image source in memory that counts, and stops where it is told to."""

    name = "memory"

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.images: dict[str, Image] = {}
        self.opened: list[tuple[str, int]] = []
        self.break_at: int | None = None
        self.available = True
        self.gate = threading.Event()
        self.gate.set()

    def add(self, data: bytes, *, image_id: str = IMAGE_ID, disk_format: str = "raw") -> Image:
        image = Image(
            id=image_id,
            name="test",
            source=self.name,
            status="active",
            disk_format=disk_format,
            size=len(data),
            digest=("sha512", hashlib.sha512(data).hexdigest()),
        )
        self.data[image_id] = data
        self.images[image_id] = image
        return image

    def get(self, image_id: str) -> Image:
        if not self.available:
            raise ImageSourceUnavailable("the source is away")
        try:
            return self.images[image_id]
        except KeyError:
            raise ImageNotFound(f"no image {image_id}") from None

    def open(self, image: Image, offset: int) -> "Body":
        if not self.available:
            raise ImageSourceUnavailable("the source is away")
        self.opened.append((image.id, offset))
        return Body(self, self.data[image.id], offset)


class Body:
    def __init__(self, source: Source, data: bytes, offset: int) -> None:
        self.offset = offset
        self._source = source
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        for position in range(self.offset, len(self._data), MIB):
            self._source.gate.wait(20)
            if self._source.break_at is not None and position >= self._source.break_at:
                raise ImageSourceUnavailable("the connection broke")
            yield self._data[position : position + MIB]

    def close(self) -> None:
        pass


@pytest.fixture
def source() -> Source:
    return Source()


MakeCache = Callable[[], ImageCache]


@pytest.fixture
def make_cache(tmp_path: Path, source: Source) -> MakeCache:
    (tmp_path / "instances").mkdir()

    def make() -> ImageCache:
        return ImageCache(
            tmp_path / "instances/_base",
            locks=tmp_path / "instances/locks",
            source=source,
            converter=QemuImg(),
            policy=RetryPolicy(num_retries=1, initial_s=0.01, max_s=0.01),
            require_hash=True,
            max_concurrent_fetches=4,
            in_use=lambda _: [],
        )

    return make


@pytest.fixture
def cache(make_cache: MakeCache) -> ImageCache:
    return make_cache()


def acquire(
    cache: ImageCache,
    image: Image,
    *,
    pin: str = "job-1",
    max_virtual_size: int | None = None,
    cancellation: Cancellation | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Base:
    return cache.acquire(
        image,
        pin=pin,
        max_virtual_size=max_virtual_size,
        cancellation=cancellation or Cancellation(),
        on_progress=on_progress,
    )


def leftovers(cache: ImageCache) -> list[str]:
    """Everything below the cache that is no entry."""
    return sorted(
        str(path.relative_to(cache.directory))
        for path in cache.directory.rglob("*")
        if path.name != ".partial" and len(path.name.removesuffix(".json")) != 40
    )


def random_bytes(mib: int) -> bytes:
    return os.urandom(mib * MIB)


def test_the_base_of_a_known_image_has_novas_name() -> None:
    assert base_name(IMAGE_ID) == NAME


def test_a_miss_makes_an_entry_and_a_hit_asks_for_no_byte(
    cache: ImageCache, source: Source
) -> None:
    data = random_bytes(3)
    image = source.add(data)

    first = acquire(cache, image)
    second = acquire(cache, image)

    assert first.path == cache.directory / NAME
    assert first.path.read_bytes() == data
    assert (first.origin, second.origin) == ("memory", "cache")
    assert (first.received, second.received) == (len(data), 0)
    assert source.opened == [(IMAGE_ID, 0)]
    assert leftovers(cache) == []
    assert first.path.stat().st_mode & 0o777 == 0o640


def test_a_qcow2_becomes_a_raw_base(cache: ImageCache, source: Source, tmp_path: Path) -> None:
    data = random_bytes(2) + bytes(MIB) + random_bytes(1)
    (tmp_path / "raw").write_bytes(data)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2"],
        check=True,
    )
    image = source.add((tmp_path / "qcow2").read_bytes(), disk_format="qcow2")

    base = acquire(cache, image)

    assert (base.format, base.virtual_size) == ("raw", len(data))
    assert base.path.read_bytes() == data
    assert leftovers(cache) == []


def test_holes_of_a_raw_image_stay_holes(cache: ImageCache, source: Source) -> None:
    data = random_bytes(1) + bytes(30 * MIB) + random_bytes(1)

    base = acquire(cache, source.add(data))

    assert base.path.read_bytes() == data
    assert base.path.stat().st_blocks * 512 < 4 * MIB


def test_many_callers_of_one_cold_image_make_one_fetch(cache: ImageCache, source: Source) -> None:
    image = source.add(random_bytes(4))
    source.gate.clear()
    bases: list[Base] = []
    threads = [
        threading.Thread(
            target=lambda pin=f"job-{number}": bases.append(acquire(cache, image, pin=pin))
        )
        for number in range(10)
    ]
    for thread in threads:
        thread.start()
    while sum(fetch.waiters for fetch in cache.fetches()) < len(threads):
        time.sleep(0.01)
    source.gate.set()
    for thread in threads:
        thread.join()

    assert len(source.opened) == 1
    assert {base.path for base in bases} == {cache.directory / NAME}
    assert sorted(base.received for base in bases) == [0] * 9 + [4 * MIB]


def test_a_waiter_that_is_cancelled_leaves_and_the_others_stay(
    cache: ImageCache, source: Source
) -> None:
    image = source.add(random_bytes(2))
    source.gate.clear()
    leaving = Cancellation()
    errors: list[BootwrightError] = []

    def leave() -> None:
        try:
            acquire(cache, image, pin="leaving", cancellation=leaving)
        except BootwrightError as e:
            errors.append(e)

    staying: list[Base] = []
    first = threading.Thread(target=leave)
    second = threading.Thread(target=lambda: staying.append(acquire(cache, image, pin="staying")))
    first.start()
    second.start()
    while sum(fetch.waiters for fetch in cache.fetches()) < 2:
        time.sleep(0.01)
    leaving.cancel(Cancelled("enough"))
    first.join(5)
    assert [type(error) for error in errors] == [Cancelled]
    source.gate.set()
    second.join()

    assert len(staying) == 1
    assert len(source.opened) == 1


def test_the_last_waiter_out_ends_the_fetch_and_what_came_is_gone_on_with(
    make_cache: MakeCache, source: Source
) -> None:
    image = source.add(random_bytes(8))
    cache = make_cache()
    only = Cancellation()

    def leave_halfway(progress: Progress) -> None:
        if progress.bytes_done >= 3 * MIB:
            only.cancel(Cancelled("enough"))

    source.break_at = 3 * MIB
    with pytest.raises((Cancelled, ImageSourceUnavailable)):
        acquire(cache, image, cancellation=only, on_progress=leave_halfway)
    cache.close(10)
    source.break_at = None

    base = acquire(make_cache(), image)

    assert base.resumed == 3 * MIB
    assert base.received == 5 * MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_a_damaged_partial_costs_one_fetch_from_the_start(
    make_cache: MakeCache, source: Source
) -> None:
    image = source.add(random_bytes(4))
    source.break_at = 2 * MIB
    cache = make_cache()
    with pytest.raises(ImageSourceUnavailable):
        acquire(cache, image)
    data = cache.directory / ".partial" / NAME / "data"
    with data.open("r+b") as file:
        file.write(b"damage")
    source.break_at = None

    base = acquire(make_cache(), image)

    assert base.path.read_bytes() == source.data[IMAGE_ID]
    assert source.opened[-2:] == [(IMAGE_ID, 2 * MIB), (IMAGE_ID, 0)]


def test_after_a_boot_of_the_host_only_what_was_synced_counts(
    make_cache: MakeCache, source: Source
) -> None:
    image = source.add(random_bytes(4))
    source.break_at = 2 * MIB
    cache = make_cache()
    with pytest.raises(ImageSourceUnavailable):
        acquire(cache, image)
    state = cache.directory / ".partial" / NAME / "state.json"
    record = json.loads(state.read_text())
    state.write_text(json.dumps({**record, "boot_id": "another", "durable": MIB}))
    source.break_at = None

    base = acquire(make_cache(), image)

    assert base.resumed == MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_wrong_bytes_are_fetched_twice_and_then_refused(cache: ImageCache, source: Source) -> None:
    image = replace(source.add(random_bytes(2)), digest=("sha512", "0" * 128))

    with pytest.raises(ImageCorrupt, match="promised"):
        acquire(cache, image)

    assert [offset for _, offset in source.opened] == [0, 0]
    assert leftovers(cache) == []
    assert list((cache.directory / ".partial").iterdir()) == []
    assert cache.entries() == []


def test_an_image_without_any_hash_is_refused(cache: ImageCache, source: Source) -> None:
    image = replace(source.add(random_bytes(1)), digest=None)

    with pytest.raises(ImageUnacceptable, match="no hash"):
        acquire(cache, image)

    assert source.opened == []


def test_an_image_too_large_for_the_flavor_is_refused_at_its_header(
    cache: ImageCache, source: Source, tmp_path: Path
) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "big", "4G"], check=True)
    image = source.add((tmp_path / "big").read_bytes() + bytes(64 * MIB), disk_format="qcow2")

    with pytest.raises(FlavorDiskSmallerThanImage, match=str(4 << 30)):
        acquire(cache, image, max_virtual_size=1 << 30)

    assert list((cache.directory / ".partial").iterdir()) == []
    assert cache.entries() == []


def test_a_commit_interrupted_before_the_manifest_is_completed_without_a_fetch(
    make_cache: MakeCache, source: Source
) -> None:
    image = source.add(random_bytes(2))
    cache = make_cache()
    base = acquire(cache, image)
    partial = cache.directory / ".partial" / NAME
    partial.mkdir()
    manifest_path(base.path).rename(partial / "manifest.json")

    again = acquire(make_cache(), image)

    assert again.path.read_bytes() == source.data[IMAGE_ID]
    assert len(source.opened) == 1
    assert manifest_path(base.path).is_file()
    assert not partial.exists()


def test_a_file_without_a_manifest_is_no_entry(cache: ImageCache, source: Source) -> None:
    image = source.add(random_bytes(2))
    (cache.directory / NAME).write_bytes(b"who knows what this is")

    base = acquire(cache, image)

    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_a_verified_base_serves_while_the_source_is_away(cache: ImageCache, source: Source) -> None:
    image = source.add(random_bytes(1))
    acquire(cache, image)
    source.available = False

    assert acquire(cache, cache.resolve(IMAGE_ID, Cancellation())).origin == "cache"
    with pytest.raises(ImageSourceUnavailable):
        cache.resolve("another", Cancellation())


def test_a_base_in_use_is_not_removed(cache: ImageCache, source: Source) -> None:
    image = source.add(random_bytes(1))
    base = acquire(cache, image, pin="job-7")

    with pytest.raises(BackendError, match="job-7"):
        cache.remove(IMAGE_ID)
    cache.unpin("job-7")
    cache.remove(IMAGE_ID)

    assert not base.path.exists()
    with pytest.raises(NotFound):
        cache.entry(IMAGE_ID)


def test_an_image_that_changed_under_its_id_is_refused(cache: ImageCache, source: Source) -> None:
    acquire(cache, source.add(random_bytes(1)))

    with pytest.raises(ImageCorrupt, match="another hash"):
        acquire(cache, source.add(random_bytes(1)))


def test_closing_interrupts_a_fetch_and_keeps_what_came(
    make_cache: MakeCache, source: Source
) -> None:
    image = source.add(random_bytes(4))
    cache = make_cache()
    source.gate.clear()
    errors: list[BootwrightError] = []

    def wait() -> None:
        try:
            acquire(cache, image)
        except BootwrightError as e:
            errors.append(e)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not source.opened:
        time.sleep(0.01)
    closer = threading.Thread(target=cache.close, args=(10,))
    closer.start()
    time.sleep(0.05)
    source.gate.set()
    closer.join()
    waiter.join()

    assert [type(error) for error in errors] == [AgentStopping]
    with pytest.raises(AgentStopping):
        acquire(cache, image)


def test_sweep_removes_what_nobody_went_on_with_and_no_entry(
    cache: ImageCache, source: Source
) -> None:
    base = acquire(cache, source.add(random_bytes(1)))
    partial = cache.directory / ".partial" / ("1" * 40)
    partial.mkdir()
    (partial / "data").write_bytes(b"x")
    stray = cache.directory / ("2" * 40)
    stray.write_bytes(b"x")
    aside = cache.directory / f".{'3' * 40}.json.0123456789abcdef.tmp"
    aside.write_bytes(b"x")

    cache.sweep(older_than_s=3600)
    assert partial.exists()
    assert stray.exists()
    cache.sweep(older_than_s=-1)

    assert not partial.exists()
    assert not stray.exists()
    assert not aside.exists()
    assert base.path.exists()
    assert [entry.path for entry in cache.entries()] == [base.path]
