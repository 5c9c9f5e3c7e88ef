"""What a sweep of the image cache removes, and what it leaves alone."""

import pytest

from agent.errors import BackendError
from agent.locks import FileLock
from agent.manifest import manifest_path
from tests.cache_kit import IMAGE_ID, NAME, CacheKit, Source, kit, random_bytes, source

__all__ = ["kit", "source"]


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


def test_sweep_leaves_alone_what_somebody_is_at_work_on(kit: CacheKit) -> None:
    stray = kit.store.directory / ("2" * 40)
    stray.write_bytes(b"x")
    lock = FileLock(kit.store.lock_of(stray.name))
    assert lock.try_acquire()

    sweep(kit, partials_s=-1)
    lock.release()

    assert stray.exists()
