"""What is decided about bases."""

import dataclasses
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import prune
from agent.pins import OperatorPin
from agent.prune import BaseState, CacheState, Policy
from agent.usage import Users
from agent.views import Decision, Reason
from tests.cache_kit import DAY, MIB, NEVER

NOW = 1_800_000_000.0
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


def after(state: CacheState, decisions: Iterable[Decision]) -> CacheState:
    """Return the state once the removals among `decisions` have been carried out."""
    gone = {decision.base_name: decision.bytes for decision in decisions if decision.remove}
    freed = sum(gone.values())
    return dataclasses.replace(
        state,
        bases=tuple(base for base in state.bases if base.name not in gone),
        allocated=state.allocated - freed,
        used=state.used - freed,
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
    assert removed(prune.plan(after(found, decisions), NOW, policy)) == {}
