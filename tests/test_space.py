"""The space that is promised to images, and what makes room for them."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from agent.errors import InsufficientFreeSpace
from agent.partial import Partial
from agent.store import Store
from tests.cache_kit import (
    MIB,
    NEVER,
    CacheKit,
    Source,
    kit,
    make_old,
    manifest_time_back,
    random_bytes,
    source,
)

__all__ = ["kit", "source"]


def test_unused_bases_make_room_before_an_image_is_refused(tmp_path: Path, source: Source) -> None:
    kit = CacheKit(
        directory=tmp_path / "i",
        source=source,
        policy=dataclasses.replace(NEVER, max_size=6 * MIB + MIB // 2),
    )
    old, recent, used = (
        kit.fetch(source.add(random_bytes(2), image_id=name)) for name in ("old", "recent", "used")
    )
    make_old(recent.path, 5)
    manifest_time_back(kit, old.name, 100)
    kit.add_instance(used)

    kit.fetch(source.add(random_bytes(2), image_id="new"))
    assert not old.path.exists()
    assert recent.path.exists()

    # Not even all of them would do, so none of them goes.
    with pytest.raises(InsufficientFreeSpace, match="max_size"):
        kit.fetch(source.add(random_bytes(5), image_id="large"))
    assert {entry.manifest.image.id for entry in kit.store.entries()} == {"recent", "used", "new"}
    assert list((kit.store.directory / ".partial").iterdir()) == []


def test_an_image_larger_than_the_file_system_is_refused_before_it_is_kept(
    tmp_path: Path, source: Source
) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source, reserved_free_space=1 << 62)
    with pytest.raises(InsufficientFreeSpace, match=r"needs up to \d+ bytes more"):
        kit.fetch(source.add(random_bytes(8)))
    assert kit.store.partials() == []


def test_fetches_at_the_same_time_are_not_promised_the_same_bytes(
    tmp_path: Path, source: Source
) -> None:
    kit = CacheKit(
        directory=tmp_path / "i",
        source=source,
        policy=dataclasses.replace(NEVER, max_size=5 * MIB),
    )
    space = kit.space
    with space.reservation("one", tmp_path / "one") as one:
        one.need(3 * MIB)
        with (
            space.reservation("two", tmp_path / "two") as two,
            pytest.raises(InsufficientFreeSpace, match="promised to other fetches"),
        ):
            two.need(3 * MIB)
        (tmp_path / "one").mkdir()
        (tmp_path / "one/data").write_bytes(random_bytes(2))
        assert one.left() <= MIB
    with space.reservation("two", tmp_path / "two") as two:
        two.need(3 * MIB)


class SlowToCommit(Store):
    """Takes the last step of the first commit when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def complete(self, name: str, partial: Partial) -> bool:
        if self.path_of(name).exists() and not self.reached.is_set():
            self.reached.set()
            self.go_on.wait(20)
        return super().complete(name, partial)


def test_what_is_being_committed_does_not_count_twice(tmp_path: Path, source: Source) -> None:
    kit = CacheKit(
        directory=tmp_path / "i",
        source=source,
        policy=dataclasses.replace(NEVER, max_size=6 * MIB),
        make_store=SlowToCommit,
    )
    store = kit.store
    assert isinstance(store, SlowToCommit)
    one = source.add(random_bytes(3), image_id="one")
    committing = threading.Thread(target=kit.fetch, args=(one,))
    committing.start()
    assert store.reached.wait(20)
    try:
        # 3 MiB are written and have left the partial; 2 more fit into 6.
        kit.acquire(source.add(random_bytes(2), image_id="two"), pin="other")
    finally:
        store.go_on.set()
        committing.join()
    assert {entry.manifest.image.id for entry in kit.store.entries()} == {"one", "two"}


def test_what_the_cache_takes_is_blocks_and_each_file_once(kit: CacheKit, source: Source) -> None:
    before = kit.store.allocated()
    made = kit.fetch(source.add(random_bytes(1) + bytes(7 * MIB), image_id="one"))
    kit.fetch(source.add(source.data["one"], image_id="two"))
    (kit.store.directory / ".quarantine/x").write_bytes(random_bytes(1))
    grown = kit.store.allocated() - before
    assert made.path.stat().st_nlink == 2
    assert 2 * MIB <= grown < 2 * MIB + MIB // 4
    os.truncate(made.path, 0)
    assert kit.store.allocated() - before < MIB + MIB // 4
