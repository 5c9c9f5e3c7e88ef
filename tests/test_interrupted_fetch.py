"""What a fetch or a commit leaves that was interrupted, and what becomes of it."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.base import Base
from agent.errors import BackendError, ImageSourceUnavailable
from agent.image import Image
from agent.manifest import manifest_path
from tests import service_user
from tests.cache_kit import (
    IMAGE_ID,
    MIB,
    NAME,
    CacheKit,
    MakeKit,
    Source,
    kit,
    make_kit,
    random_bytes,
    source,
)

__all__ = ["kit", "make_kit", "source"]


def broken_off(kit: CacheKit, source: Source) -> Path:
    """Have 2 MiB of the image come, and the rest with the next fetch; return the partial."""
    source.break_at = 2 * MIB
    with pytest.raises(ImageSourceUnavailable):
        kit.acquire(source.images[IMAGE_ID])
    source.break_at = None
    return kit.store.directory / ".partial" / NAME


def half_committed(kit: CacheKit, image: Image) -> tuple[Base, Path]:
    """Leave what a commit leaves that was interrupted before its last step: base and partial."""
    base = kit.acquire(image)
    partial = kit.store.directory / ".partial" / base.name
    partial.mkdir()
    manifest_path(base.path).rename(partial / "manifest.json")
    return base, partial


def test_a_damaged_partial_costs_one_fetch_from_the_start(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(4))
    partial = broken_off(make_kit(), source)
    with (partial / "data").open("r+b") as file:
        file.write(b"damage")

    base = make_kit().acquire(image)

    assert base.path.read_bytes() == source.data[IMAGE_ID]
    assert source.opened[-2:] == [(IMAGE_ID, 2 * MIB), (IMAGE_ID, 0)]


def test_after_a_boot_of_the_host_only_what_was_synced_counts(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(4))
    state = broken_off(make_kit(), source) / "state.json"
    record = json.loads(state.read_text())
    state.write_text(json.dumps({**record, "boot_id": "another", "durable": MIB}))

    base = make_kit().acquire(image)

    assert base.resumed == MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_a_commit_interrupted_before_the_manifest_is_completed_without_a_fetch(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    base, partial = half_committed(make_kit(), image)

    again = make_kit().acquire(image)

    assert again.path.read_bytes() == source.data[IMAGE_ID]
    assert len(source.opened) == 1
    assert manifest_path(base.path).is_file()
    assert not partial.exists()


def test_a_base_that_is_there_is_handed_out_though_its_partial_cannot_be_removed(
    make_kit: MakeKit, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    image = source.add(random_bytes(1))
    _, partial = half_committed(make_kit(), image)
    with mounted_over(partial / "busy"):
        assert make_kit().acquire(image).path.read_bytes() == source.data[IMAGE_ID]
    assert any("next sweep" in record.message for record in caplog.records)


def test_a_commit_that_cannot_be_completed_is_no_defect_of_ours(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(1))
    base, _ = half_committed(make_kit(), image)
    manifest_path(base.path).mkdir()

    with pytest.raises(BackendError, match="cannot be changed"):
        make_kit().acquire(image)


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
