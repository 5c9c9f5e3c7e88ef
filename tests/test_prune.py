"""What is decided about bases, and that what is done is what was decided."""

import dataclasses
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
from agent.errors import BackendError, InsufficientFreeSpace, NotFound
from agent.partial import Partial
from agent.pins import OperatorPin
from agent.prune import BaseState, CacheState, Policy
from agent.store import Store
from agent.usage import Users
from agent.views import Decision, Reason
from tests.cache_kit import MIB, NEVER, CacheKit, Source, make_old, random_bytes

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


@settings(max_examples=25, deadline=None)
@given(
    bases=st.lists(
        st.tuples(
            st.sampled_from(["nobody", "job", "instance", "pin", "expired pin", "other host"]),
            st.sampled_from([0.0, 2 * DAY, 3 * DAY]),
            st.sampled_from([None, 0, 1]),  # whose bytes it has
        ),
        max_size=5,
    ),
    max_size=st.none() | st.integers(0, 3),
    minimum_age_s=st.sampled_from([DAY, 1e9]),
)
def test_gc_does_on_disk_what_its_dry_run_says(
    bases: list[tuple[str, float, int | None]], max_size: int | None, minimum_age_s: float
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = Source()
        policy = dataclasses.replace(
            NEVER,
            minimum_age_s=minimum_age_s,
            max_size=None if max_size is None else max_size * MIB,
        )
        # A max_size would keep the cache from being filled in the first place.
        kit = CacheKit(directory=Path(directory) / "i", source=source)
        other = CacheKit(
            directory=Path(directory) / "o", source=source, host_id="o", bases=kit.store.directory
        )
        contents = [random_bytes(1), random_bytes(1)]
        needed = set()
        for number, (user, age, same_as) in enumerate(bases):
            data = random_bytes(1) if same_as is None else contents[same_as]
            image = source.add(data, image_id=f"image-{number}")
            made = kit.fetch(image)
            match user:
                case "job":
                    kit.usage.pin(made.name, "job-1")
                case "instance":
                    kit.add_instance(made, name=f"web-{number}")
                case "pin":
                    kit.usage.pins.put(made.name, seconds=3600)
                case "expired pin":
                    kit.usage.pins.put(made.name, seconds=-1)
                case "other host":
                    other.usage.pin(made.name, "job-2")
                case _:
                    pass
            if user not in ("nobody", "expired pin"):
                needed.add(made.name)
            manifest_time_back(kit, made.name, age)
        kit = CacheKit(directory=Path(directory) / "i", source=source, policy=policy)
        for number, (user, _, _) in enumerate(bases):
            if user == "job":
                kit.usage.pin(kit.store.get(f"image-{number}").name, "job-1")
        before = {entry.name for entry in kit.store.entries()}
        other.usage.settle()

        planned = kit.pruner.gc(dry_run=True)
        assert {entry.name for entry in kit.store.entries()} == before
        done = kit.pruner.gc(dry_run=False)

        assert done.decisions == planned.decisions
        gone = {d.base_name for d in planned.decisions if d.remove}
        assert {entry.name for entry in kit.store.entries()} == before - gone
        assert gone.isdisjoint(needed)
        for name in needed:
            assert kit.store.path_of(name).exists()


def manifest_time_back(kit: CacheKit, name: str, age: float) -> None:
    """Let a base, which has just been made, be of long ago."""
    path = manifests.manifest_path(kit.store.path_of(name))
    known = manifests.read(path)
    assert known is not None
    manifests.write(path, dataclasses.replace(known, created_at=time.time() - age))
    make_old(kit.store.path_of(name), age)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def kit(tmp_path: Path, source: Source) -> CacheKit:
    return CacheKit(directory=tmp_path / "instances", source=source)


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
