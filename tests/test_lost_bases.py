"""Bases that somebody has removed from under an instance."""

import dataclasses

import pytest

from agent.disk import Link
from agent.image import Image
from agent.lost_bases import LostBases
from tests.cache_kit import CacheKit, kit, random_bytes, source

__all__ = ["kit", "source"]


def instance(kit: CacheKit, image: Image, **changes: object) -> None:
    """An instance with an overlay on a base of `image`."""
    base = kit.fetch(image)
    record = kit.add_instance(base)
    disk = dataclasses.replace(record.root, backing_chain=(Link(path=base.path, format="raw"),))
    changed = {"disks": (disk,), "image_digest": base.digest, **changes}
    kit.instances.write(dataclasses.replace(record, **changed))  # type: ignore[arg-type]  # of fields


def mended(kit: CacheKit) -> list[str]:
    fetched: list[Image] = []
    LostBases(kit.instances, kit.source, fetch=fetched.append).mend()
    return [image.id for image in fetched]


def test_base_that_is_gone_is_fetched_again(
    kit: CacheKit, caplog: pytest.LogCaptureFixture
) -> None:
    image = kit.source.add(random_bytes(1))
    instance(kit, image)
    assert mended(kit) == []
    kit.store.remove(kit.store.get(image.id).name)
    assert mended(kit) == [image.id]
    assert "is gone from under web-1" in caplog.text


def test_image_that_has_other_bytes_now_is_not_put_under_an_old_overlay(
    kit: CacheKit, caplog: pytest.LogCaptureFixture
) -> None:
    image = kit.source.add(random_bytes(1))
    instance(kit, image, image_digest="sha512:00")
    kit.store.remove(kit.store.get(image.id).name)
    assert mended(kit) == []
    assert "has another hash now" in caplog.text
