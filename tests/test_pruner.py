"""That what is done with bases is what was decided, and what a pass may meet."""

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import manifest as manifests
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import BackendError, NotFound
from agent.job import ImagesType
from agent.locks import FileLock
from agent.prune import Policy
from agent.report import Role
from agent.store import Store
from agent.views import Decision, Reason
from tests.cache_kit import (
    DAY,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A state of the cache on disk, and of all who have a say in it."""

    bases: list[tuple[str, float, int | None]]
    """Who needs it, its age in seconds, and whose bytes it has."""
    broken: str | None
    """What cannot be read, so that nobody knows who needs what."""
    partial: bool
    quarantined: bool
    remove_unused: bool
    minimum_age_s: float
    max_size: int | None
    room: int


_NEEDED_BY = ("job", "instance", "pin", "unreadable pin", "other host")
_SCENES = st.builds(
    Scene,
    bases=st.lists(
        st.tuples(
            st.sampled_from(["nobody", "expired pin", *_NEEDED_BY]),
            st.sampled_from([0.0, 2 * DAY, 3 * DAY]),
            st.sampled_from([None, 0, 1]),
        ),
        max_size=5,
    ),
    broken=st.sampled_from([None, None, None, "instance", "host"]),
    partial=st.booleans(),
    quarantined=st.booleans(),
    remove_unused=st.sampled_from([True, True, True, False]),
    minimum_age_s=st.sampled_from([DAY, 1e9]),
    max_size=st.none() | st.integers(0, 5).map(lambda mib: mib * MIB),
    room=st.integers(0, 4).map(lambda mib: mib * MIB),
)


class Stage:
    """A scene, set up in a directory: this host's cache, and another host's on the same bases."""

    def __init__(self, directory: Path, scene: Scene) -> None:
        self._directory = directory
        self._scene = scene
        self._source = Source()
        self.needed: set[str] = set()
        # A max_size would keep the cache from being filled in the first place.
        kit = self._kit("this", NEVER)
        other = self._kit("other", NEVER)
        contents = [random_bytes(1), random_bytes(1)]
        for number, (user, age, same_as) in enumerate(scene.bases):
            data = random_bytes(1) if same_as is None else contents[same_as]
            made = kit.fetch(self._source.add(data, image_id=f"image-{number}"))
            match user:
                case "instance":
                    kit.add_instance(made, name=f"web-{number}")
                case "pin":
                    kit.usage.pins.put(made.name, seconds=3600)
                case "unreadable pin":
                    (kit.store.directory / ".pins" / f"{made.name}.json").write_bytes(b"{")
                case "expired pin":
                    kit.usage.pins.put(made.name, seconds=-1)
                case "other host":
                    other.usage.pin(made.name, "job-2")
                case _:
                    pass
            if user in _NEEDED_BY:
                self.needed.add(made.name)
            manifest_time_back(kit, made.name, age)
        self._leave_leftovers(kit)
        self.kit = self._kit("this", self._policy())
        for number, (user, _, _) in enumerate(scene.bases):
            if user == "job":
                self.kit.usage.pin(self.kit.store.get(f"image-{number}").name, "job-1")

    def _kit(self, host_id: str, policy: Policy) -> CacheKit:
        return CacheKit(
            directory=self._directory / host_id,
            source=self._source,
            host_id=host_id,
            bases=self._directory / "bases",
            policy=policy,
        )

    def _policy(self) -> Policy:
        return dataclasses.replace(
            NEVER,
            remove_unused=self._scene.remove_unused,
            minimum_age_s=self._scene.minimum_age_s,
            max_size=self._scene.max_size,
        )

    def _leave_leftovers(self, kit: CacheKit) -> None:
        """Let lie what is no base: it takes space, and is none of gc's business."""
        if self._scene.partial:
            unfinished = kit.store.partial_of(self._source.add(b"", image_id="unfinished"))
            unfinished.directory.mkdir()
            (unfinished.directory / "data").write_bytes(random_bytes(1))
        if self._scene.quarantined:
            damaged = kit.fetch(self._source.add(random_bytes(1), image_id="damaged"))
            damaged.path.write_bytes(random_bytes(1))
            kit.verifier.verify("damaged", Cancellation())
        if self._scene.broken == "instance":
            lost = self._directory / "this/fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
            lost.mkdir()
            (lost / "instance.json").write_bytes(b"{")
        if self._scene.broken == "host":
            (kit.store.directory / ".hosts/third.json").write_bytes(b"{")

    def files(self) -> set[Path]:
        """All there is, but what pins and locks leave."""
        return {
            path
            for path in self._directory.rglob("*")
            if path.is_file() and path.parent.name not in (".pins", ".locks")
        }


@settings(max_examples=30)
@given(scene=_SCENES)
def test_gc_does_on_disk_what_its_dry_run_says_and_takes_nothing_in_use(scene: Scene) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stage = Stage(Path(directory), scene)
        kit = stage.kit
        before = stage.files()
        names = {entry.name for entry in kit.store.entries()}

        planned = kit.pruner.gc(dry_run=True)
        why = [kit.pruner.why(decision.image_id) for decision in planned.decisions]
        assert stage.files() == before
        done = kit.pruner.gc(dry_run=False)

        assert [told(d) for d in done.decisions] == [told(d) for d in planned.decisions]
        assert [told(d) for d in why] == [told(d) for d in planned.decisions]
        assert {d.base_name for d in done.decisions} == names
        gone = {d.base_name for d in planned.decisions if d.remove}
        if scene.broken or not scene.remove_unused:
            assert gone == set()
        assert gone.isdisjoint(stage.needed)
        of_gone = {kit.store.path_of(name) for name in gone}
        of_gone |= {manifests.manifest_path(path) for path in of_gone}
        assert stage.files() == before - of_gone
        assert not any(d.remove for d in kit.pruner.gc(dry_run=False).decisions)

        # Nor does anything in use make room, nor anything at all if it would not be enough.
        left, allocated = stage.files(), kit.store.allocated()
        kit.pruner.make_room(scene.room)
        assert all(kit.store.path_of(name).exists() for name in stage.needed)
        freed = allocated - kit.store.allocated()
        assert freed >= scene.room or stage.files() == left


def told(decision: Decision) -> Decision:
    """A decision without the seconds it speaks of."""
    return decision.model_copy(update={"detail": ""}) if not decision.remove else decision


def test_a_base_stays_for_an_instance_without_a_domain_and_why_tells_it(
    kit: CacheKit, source: Source
) -> None:
    made = kit.fetch(source.add(random_bytes(1)))
    record = kit.add_instance(made, name="stopped-1")
    assert "instance stopped-1" in kit.pruner.why(made.image.id).detail
    with pytest.raises(BackendError, match="stopped-1"):
        kit.pruner.remove(made.image.id)
    kit.instances.remove(record.uuid)
    kit.pruner.remove(made.image.id)
    assert not made.path.exists()
    with pytest.raises(NotFound):
        kit.pruner.why(made.image.id)


def test_an_instance_record_that_cannot_be_read_keeps_every_base(
    tmp_path: Path, source: Source
) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source)
    made = kit.fetch(source.add(random_bytes(1)))
    record = kit.add_instance(made)
    (kit.instances.directory_of(record.uuid) / "instance.json").write_bytes(b"{")
    kit = CacheKit(
        directory=tmp_path / "i",
        source=source,
        policy=dataclasses.replace(NEVER, minimum_age_s=-1, max_size=0),
    )
    (decision,) = kit.pruner.gc(dry_run=False).decisions
    assert decision.reason is Reason.UNKNOWN
    with pytest.raises(BackendError, match=r"instance\.json"):
        kit.pruner.remove(made.image.id)
    assert made.path.exists()


def test_a_pin_survives_a_restart_and_ends_when_it_expires(tmp_path: Path, source: Source) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source)
    made = kit.fetch(source.add(random_bytes(1)))
    kit.usage.pins.put(made.name, seconds=3600)
    kit = CacheKit(directory=tmp_path / "i", source=source)
    with pytest.raises(BackendError, match="a pin until"):
        kit.pruner.remove(made.image.id)
    pin = kit.store.directory / ".pins" / f"{made.name}.json"
    pin.write_text(json.dumps({**json.loads(pin.read_text()), "until": time.time() - 1}))
    kit.pruner.remove(made.image.id)
    assert list((kit.store.directory / ".pins").iterdir()) == []


# Passes that meet something


UNUSED = dataclasses.replace(NEVER, minimum_age_s=-1)


def test_an_image_its_source_has_forgotten_stays_for_its_instances(
    tmp_path: Path, source: Source
) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source, policy=UNUSED)
    root, kernel, ramdisk, unused = (
        kit.fetch(source.add(random_bytes(1), image_id=name))
        for name in ("root", "kernel", "ramdisk", "unused")
    )
    record = kit.add_instance(root)
    copies = tuple(
        Disk(
            role=role,
            backend=ImagesType.RAW,
            path=tmp_path / role.value,
            format="raw",
            virtual_size=MIB,
            base_name=base.name,
        )
        for role, base in ((Role.KERNEL, kernel), (Role.RAMDISK, ramdisk))
    )
    kit.instances.write(dataclasses.replace(record, disks=(*record.disks, *copies)))
    source.images.clear()
    done = kit.pruner.gc(dry_run=False)
    assert [d.image_id for d in done.decisions if d.remove] == ["unused"]
    assert root.path.exists()
    assert kernel.path.exists()
    assert ramdisk.path.exists()
    assert not unused.path.exists()


def test_nothing_is_removed_that_somebody_is_at_work_on(tmp_path: Path, source: Source) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source, policy=UNUSED)
    made = kit.fetch(source.add(random_bytes(1)))
    lock = FileLock(kit.store.lock_of(made.name))
    assert lock.try_acquire()
    (decision,) = kit.pruner.gc(dry_run=False).decisions
    assert (decision.remove, decision.detail) == (False, "somebody is at work on it right now")
    with pytest.raises(BackendError, match="at work on it"):
        kit.pruner.remove(made.image.id)
    lock.release()
    assert kit.pruner.gc(dry_run=False).decisions[0].remove
    # Two who wait for one lock have to meet in one file.
    assert kit.store.lock_of(made.name).exists()


class Stubborn(Store):
    """Does not let go of the first base."""

    def remove(self, name: str) -> None:
        if name == manifests.base_name("first"):
            raise PermissionError(1, "Operation not permitted", str(self.path_of(name)))
        super().remove(name)


def test_a_removal_that_fails_is_logged_and_the_pass_goes_on(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    kit = CacheKit(directory=tmp_path / "i", source=source, policy=UNUSED, make_store=Stubborn)
    first, second = (
        kit.fetch(source.add(random_bytes(1), image_id=name)) for name in ("first", "second")
    )
    make_old(first.path, 100)
    done = kit.pruner.gc(dry_run=False)
    assert {d.image_id: d.remove for d in done.decisions} == {"first": False, "second": True}
    assert (first.path.exists(), second.path.exists()) == (True, False)
    assert [r.levelname for r in caplog.records if str(first.path) in r.message] == ["ERROR"]
    assert done.bytes == second.virtual_size


def test_what_has_gone_meanwhile_is_no_failure(kit: CacheKit, source: Source) -> None:
    made = kit.fetch(source.add(random_bytes(1)))
    kit.store.remove(made.name)
    kit.store.remove(made.name)
    assert kit.pruner.gc(dry_run=False).decisions == ()


def test_without_a_cache_directory_a_pass_does_nothing(kit: CacheKit, source: Source) -> None:
    """As when its share is not mounted: then the agent makes nothing in its place either."""
    kit.fetch(source.add(random_bytes(1)))
    shutil.rmtree(kit.store.directory)
    assert kit.pruner.gc(dry_run=False).decisions == ()
    assert kit.store.allocated() == 0
    kit.store.sweep(partials_s=0, quarantine_s=0, keep=lambda _: False)
    with pytest.raises(BackendError):
        kit.fetch(source.images[next(iter(source.images))])
    assert not kit.store.directory.exists()
