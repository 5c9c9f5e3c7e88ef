"""What is decided about bases, and that what is done is what was decided."""

import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import manifest as manifests
from agent import prune
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import BackendError, InsufficientFreeSpace, NotFound
from agent.job import ImagesType
from agent.locks import FileLock
from agent.partial import Partial
from agent.pins import OperatorPin
from agent.prune import BaseState, CacheState, Policy
from agent.report import Role
from agent.store import Store
from agent.usage import Users
from agent.views import Decision, Reason
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

NOW = 1_800_000_000.0
DAY = 86400.0
AGED = dataclasses.replace(NEVER, minimum_age_s=DAY)


def base(name: str, *, age: float, inode: int = 0, users: Users | None = Users()) -> BaseState:  # noqa: B008 - frozen
    return BaseState(
        name=name,
        image_id=f"image-{name}",
        inode=inode or abs(hash(name)),
        allocated=MIB,
        last_used_at=NOW - age,
        users=users,
    )


def state(*bases: BaseState, used: int = 0) -> CacheState:
    files = {base.inode: base.allocated for base in bases}
    return CacheState(
        bases=bases, allocated=sum(files.values()), used=used * MIB, capacity=100 * MIB
    )


def removed(decisions: Sequence[Decision]) -> dict[str, Reason]:
    return {d.base_name: d.reason for d in decisions if d.remove}


def test_an_unused_base_goes_when_it_is_old_enough() -> None:
    decisions = prune.plan(state(base("a", age=DAY + 1), base("b", age=DAY - 1)), NOW, AGED)
    assert removed(decisions) == {"a": Reason.AGE}
    assert [d.reason for d in decisions] == [Reason.AGE, Reason.RECENT]


@pytest.mark.parametrize(
    "users",
    [
        Users(jobs=("j",)),
        Users(instances=("web-1",)),
        Users(hosts=("other",)),
        Users(operator=OperatorPin(since=0.0, until=None)),
    ],
)
def test_whoever_needs_a_base_keeps_it(users: Users) -> None:
    tight = dataclasses.replace(AGED, max_size=0, high_watermark=1, low_watermark=0)
    (decision,) = prune.plan(state(base("a", age=9e9, users=users), used=99), NOW, tight)
    assert (decision.remove, decision.reason) == (False, Reason.IN_USE)


def test_nothing_goes_while_it_is_unknown_who_needs_it() -> None:
    (decision,) = prune.plan(state(base("a", age=9e9, users=None)), NOW, AGED)
    assert (decision.remove, decision.reason) == (False, Reason.UNKNOWN)


def test_nothing_goes_by_itself_when_removal_is_disabled() -> None:
    policy = dataclasses.replace(AGED, remove_unused=False, max_size=0)
    assert removed(prune.plan(state(base("a", age=9e9)), NOW, policy)) == {}
    assert prune.room(state(base("a", age=9e9)), 1, policy) == []


def test_max_size_removes_the_longest_unused_until_the_rest_fits() -> None:
    policy = dataclasses.replace(NEVER, max_size=2 * MIB)
    found = state(*(base(name, age=age) for name, age in zip("abcd", (5, 40, 30, 1), strict=True)))
    assert removed(prune.plan(found, NOW, policy)) == {
        "b": Reason.MAX_SIZE,
        "c": Reason.MAX_SIZE,
    }


def test_the_high_watermark_removes_down_to_the_low_one() -> None:
    policy = dataclasses.replace(NEVER, high_watermark=90, low_watermark=88)
    bases = [base(str(number), age=number) for number in range(10)]
    assert removed(prune.plan(state(*bases, used=90), NOW, policy)) == {}
    assert removed(prune.plan(state(*bases, used=91), NOW, policy)) == dict.fromkeys(
        ("9", "8", "7"), Reason.WATERMARK
    )


def test_names_of_one_file_go_together_and_its_bytes_count_once() -> None:
    policy = dataclasses.replace(NEVER, max_size=MIB)
    found = state(base("a", age=9, inode=1), base("b", age=9, inode=1), base("c", age=1))
    decisions = prune.plan(found, NOW, policy)
    assert set(removed(decisions)) == {"a", "b"}
    assert sum(d.bytes for d in decisions) == MIB


def test_a_file_with_a_name_in_use_is_not_removed_for_its_bytes() -> None:
    policy = dataclasses.replace(NEVER, max_size=0)
    found = state(
        base("a", age=9, inode=1), base("b", age=9, inode=1, users=Users(instances=("i",)))
    )
    assert removed(prune.plan(found, NOW, policy)) == {}


def test_room_is_made_only_if_it_is_enough() -> None:
    found = state(base("a", age=1), base("b", age=2), base("c", age=3, users=Users(jobs=("j",))))
    assert [d.base_name for d in prune.room(found, MIB + 1, NEVER)] == ["b", "a"]
    assert prune.room(found, 2 * MIB + 1, NEVER) == []


_USERS = st.one_of(
    st.just(Users()),
    st.builds(
        Users,
        jobs=st.sampled_from([(), ("j",)]),
        instances=st.sampled_from([(), ("i",)]),
        hosts=st.sampled_from([(), ("h",)]),
    ),
    st.none(),
)
_BASES = st.lists(
    st.builds(
        BaseState,
        name=st.text("abcdef", min_size=1, max_size=3),
        image_id=st.just("image"),
        inode=st.integers(1, 4),
        allocated=st.just(MIB),
        last_used_at=st.floats(NOW - 3 * DAY, NOW + DAY),
        users=_USERS,
    ),
    unique_by=lambda base: base.name,
    max_size=8,
)
_POLICIES = st.builds(
    Policy,
    remove_unused=st.booleans(),
    minimum_age_s=st.sampled_from([0.0, DAY, 1e9]),
    max_size=st.none() | st.integers(0, 5).map(lambda mib: mib * MIB),
    high_watermark=st.integers(50, 100),
    low_watermark=st.integers(0, 50),
)


@given(bases=_BASES, used=st.integers(0, 100), policy=_POLICIES, needed=st.integers(0, 9))
def test_in_any_state_nothing_in_use_goes_and_a_second_pass_finds_nothing_more(
    bases: list[BaseState], used: int, policy: Policy, needed: int
) -> None:
    found = state(*bases, used=max(used, 5))
    decisions = prune.plan(found, NOW, policy)
    assert sorted(d.base_name for d in decisions) == sorted(b.name for b in bases)
    free_to_go = {b.name for b in bases if b.users == Users() and policy.remove_unused}
    assert removed(decisions).keys() <= free_to_go
    assert {d.base_name for d in prune.room(found, needed * MIB, policy)} <= free_to_go
    assert removed(prune.plan(prune.after(found, decisions), NOW, policy)) == {}


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


@settings(max_examples=30, deadline=None)
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
    kit.usage.pins.put(made.name, seconds=0.3)
    kit = CacheKit(directory=tmp_path / "i", source=source)
    with pytest.raises(BackendError, match="a pin until"):
        kit.pruner.remove(made.image.id)
    time.sleep(0.4)
    kit.pruner.remove(made.image.id)
    assert list((kit.store.directory / ".pins").iterdir()) == []


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
