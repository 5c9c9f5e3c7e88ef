"""What a fetch or a commit leaves that was interrupted, and what becomes of it."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import BackendError, ImageSourceUnavailable
from agent.manifest import manifest_path
from tests import service_user
from tests.cache_kit import (
    IMAGE_ID,
    MIB,
    NAME,
    MakeKit,
    Source,
    kit,
    make_kit,
    random_bytes,
    source,
)

__all__ = ["kit", "make_kit", "source"]


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
