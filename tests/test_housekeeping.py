"""What is done now and then, and that nothing a disk does ends it or the agent."""

import contextlib
import dataclasses
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from agent.directory import DirectorySource
from agent.errors import BackendError, InsufficientFreeSpace
from agent.housekeeping import Housekeeping
from agent.journal import Journal
from agent.pruner import Pruner
from agent.transfer import ImageSource
from agent.usage import Usage
from agent.views import Reason
from tests import service_user
from tests.cache_kit import MIB, NEVER, CacheKit, Source, random_bytes, source
from tests.waiting import LIMIT_S, until

__all__ = ["source"]

UNUSED = dataclasses.replace(NEVER, minimum_age_s=-1)


@pytest.fixture
def kit(tmp_path: Path, source: Source) -> CacheKit:
    return CacheKit(directory=tmp_path / "instances", source=source, policy=UNUSED)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


def housekeeping(
    kit: CacheKit,
    journal: Journal,
    *,
    source: ImageSource | None = None,
    prune_interval_s: float | None = None,
) -> Housekeeping:
    return Housekeeping(
        kit.store,
        kit.usage,
        kit.pruner,
        journal,
        source or kit.source,
        touch=lambda _: None,
        mend=lambda: None,
        prune_interval_s=prune_interval_s,
    )


def test_bases_are_pruned_by_a_thread_of_its_own_until_it_is_stopped(
    kit: CacheKit, source: Source, journal: Journal
) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    thread = housekeeping(kit, journal, prune_interval_s=0.05)
    thread.start()
    until(lambda: not base.path.exists())
    assert thread.stop(LIMIT_S)
    assert not any(thread.name == "housekeeping" for thread in threading.enumerate())


def test_what_fails_keeps_nothing_else_from_being_done(
    kit: CacheKit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = kit.store.directory / ("2" * 40)
    stray.write_bytes(b"x")
    closed = Journal(tmp_path / "closed.db")
    closed.close()
    images = tmp_path / "images"
    images.mkdir()
    staged = images / ".fd0cb2f1.0123456789abcdef.staged"  # of a killed `image add`
    staged.write_bytes(b"x")

    housekeeping(kit, closed, source=DirectorySource(images)).sweep()

    assert not stray.exists()
    assert not staged.exists()
    assert any(record.levelname == "ERROR" for record in caplog.records)


def test_an_odd_directory_among_the_bases_ends_nothing(
    kit: CacheKit, source: Source, journal: Journal
) -> None:
    base = kit.fetch(source.add(random_bytes(1)))
    (kit.store.directory / "x.json").mkdir()
    (kit.store.directory / f"{'3' * 40}.json").mkdir()
    keeper = housekeeping(kit, journal)
    keeper.sweep()
    keeper.prune()
    assert not base.path.exists()


def test_a_pass_ends_at_the_first_lock_another_host_does_not_let_go(
    kit: CacheKit, source: Source
) -> None:
    class Held(Usage):
        waits = 0

        def held_still(self) -> NoReturn:
            self.waits += 1
            raise BackendError("another host holds the lock")

    bases = [kit.fetch(source.add(random_bytes(1), image_id=name)) for name in ("a", "b", "c")]
    usage = Held(kit.store, kit.instances, host_id="this")

    decisions = Pruner(kit.store, usage, UNUSED).gc(dry_run=False).decisions

    assert usage.waits == 1
    assert [decision.reason for decision in decisions] == [Reason.IN_USE] * 3
    assert all(base.path.exists() for base in bases)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    service_user.require_root()
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def fill(directory: Path) -> None:
    with (directory / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(4096))


def test_on_a_full_file_system_the_agent_starts_and_frees_it(
    small: Path, source: Source, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    directory = small / "instances"
    before = CacheKit(directory=directory, source=source, policy=UNUSED)
    base = before.fetch(source.add(random_bytes(4)))
    record = before.add_instance(base)
    before.usage.settle()
    before.instances.remove(record.uuid)
    fill(small)

    kit = CacheKit(directory=directory, source=source, policy=UNUSED)
    assert any("claims" in r.message and r.levelname == "WARNING" for r in caplog.records)
    keeper = housekeeping(kit, journal)
    keeper.sweep()
    keeper.prune()
    assert not base.path.exists()

    # And what needs a claim says why it cannot be.
    fill(small)
    with pytest.raises(InsufficientFreeSpace):
        kit.fetch(source.add(random_bytes(1), image_id="another"))
    (small / "ballast").unlink()
    assert kit.fetch(source.images["another"]).path.stat().st_size == MIB
