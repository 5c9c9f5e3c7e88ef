"""The image cache over a source that does what a test tells it to."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import (
    BackendError,
    FlavorDiskSmallerThanImage,
    ImageCorrupt,
    ImageSourceUnavailable,
    ImageUnacceptable,
    NotFound,
)
from agent.manifest import base_name
from tests.cache_kit import (
    IMAGE_ID,
    MIB,
    NAME,
    CacheKit,
    Source,
    kit,
    leftovers,
    random_bytes,
    source,
)

__all__ = ["kit", "source"]


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
    assert first.path.stat().st_mode & 0o777 == 0o440


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
