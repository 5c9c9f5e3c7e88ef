"""Which bases go and which stay: pure decisions, for the pruner to carry out.

A base that somebody needs (see `agent.usage`) stays, whatever else is true.
The others go, the longest unused first,

    by age          as Nova does it, unused for longer than a minimum
    by max_size     until the cache is as large as it may be
    by watermark    when more than `high` percent of the file system are used,
                    by whomever, until no more than `low` are
    for space       when an image would not fit, and only if it then does

An inode gives its bytes back with its last name, so images that share a file
go together when it is about bytes.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from agent.usage import Users
from agent.views import Decision, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the configuration says; sizes are bytes."""

    remove_unused: bool
    """If not, the agent removes no base unless somebody asks for just that one."""
    minimum_age_s: float
    max_size: int | None
    high_watermark: int
    """Percent of the file system; 100 is never reached."""
    low_watermark: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseState:
    name: str
    image_id: str
    inode: int
    allocated: int
    last_used_at: float
    users: Users | None
    """None if nobody can know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheState:
    """Sizes are bytes."""

    bases: tuple[BaseState, ...]
    allocated: int
    """By all that is in the cache's directory."""
    used: int
    """Of the file system, by whomever."""
    capacity: int
    """`used` and what an unprivileged writer may still use."""


def plan(state: CacheState, now: float, policy: Policy) -> list[Decision]:
    """Return what becomes of every base, the longest unused first."""
    bases = sorted(state.bases, key=lambda base: (base.last_used_at, base.inode, base.name))
    kept = {base.name: _protection(base, policy) for base in bases}
    aged = [
        base
        for base in bases
        if kept[base.name] is None and now - base.last_used_at > policy.minimum_age_s
    ]
    gone = _removals(
        state.bases, aged, Reason.AGE, f"unused for more than {policy.minimum_age_s:g} s"
    )
    for reason, excess in _excesses(state, policy):
        left = excess - sum(decision.bytes for decision in gone.values())
        remaining = [base for base in bases if base.name not in gone]
        victims = _oldest(remaining, left, policy)
        gone |= _removals(remaining, victims, reason, _WHY[reason])
    return [gone.get(base.name) or kept[base.name] or _recent(base, now) for base in bases]


def room(state: CacheState, needed: int, policy: Policy) -> list[Decision]:
    """Return the removals that give `needed` bytes back; none if all of them would not."""
    victims = _oldest(state.bases, needed, policy)
    removals = _removals(state.bases, victims, Reason.SPACE, _WHY[Reason.SPACE])
    freed = sum(decision.bytes for decision in removals.values())
    return list(removals.values()) if freed >= needed else []


_WHY: Mapping[Reason, str] = {
    Reason.MAX_SIZE: "unused, and the cache is larger than max_size",
    Reason.WATERMARK: "unused, and the file system is fuller than high_watermark",
    Reason.SPACE: "unused, and an image to be fetched needs the space",
}


def _excesses(state: CacheState, policy: Policy) -> Iterable[tuple[Reason, int]]:
    """Yield how many bytes have to go, and for which rule."""
    if policy.max_size is not None and state.allocated > policy.max_size:
        yield Reason.MAX_SIZE, state.allocated - policy.max_size
    if state.used * 100 > policy.high_watermark * state.capacity:
        yield Reason.WATERMARK, state.used - policy.low_watermark * state.capacity // 100


def _protection(base: BaseState, policy: Policy) -> Decision | None:
    """Return why the base stays whatever its age is; None if it need not."""
    if base.users is None:
        return _keep(base, Reason.UNKNOWN, "who needs it cannot be known; see the agent's log")
    if base.users.any:
        return _keep(base, Reason.IN_USE, f"needed by {base.users.describe()}")
    if not policy.remove_unused:
        return _keep(base, Reason.DISABLED, "remove_unused_base_images is false")
    return None


def _recent(base: BaseState, now: float) -> Decision:
    then = time.strftime("%F %T", time.localtime(base.last_used_at))
    age = max(0.0, now - base.last_used_at)
    return _keep(base, Reason.RECENT, f"unused, but last used only {age:.0f} s ago, at {then}")


def _keep(base: BaseState, reason: Reason, detail: str) -> Decision:
    return Decision(
        image_id=base.image_id, base_name=base.name, remove=False, reason=reason, detail=detail
    )


def _oldest(bases: Iterable[BaseState], needed: int, policy: Policy) -> list[BaseState]:
    """Return the longest unused files nobody needs, all names of each, until `needed` is met."""
    ordered = sorted(bases, key=lambda base: base.inode)
    files = [list(names) for _, names in groupby(ordered, key=lambda base: base.inode)]
    files.sort(key=lambda names: (max(base.last_used_at for base in names), names[0].name))
    victims: list[BaseState] = []
    for names in files:
        if needed <= 0:
            break
        if all(_protection(base, policy) is None for base in names):
            victims += names
            needed -= names[0].allocated
    return victims


def _removals(
    bases: Sequence[BaseState], victims: Sequence[BaseState], reason: Reason, detail: str
) -> dict[str, Decision]:
    """Return the decisions that remove `victims`; the last name of a file has its bytes."""
    names: dict[int, int] = {}
    for base in bases:
        names[base.inode] = names.get(base.inode, 0) + 1
    removals = {}
    for base in victims:
        names[base.inode] -= 1
        removals[base.name] = Decision(
            image_id=base.image_id,
            base_name=base.name,
            remove=True,
            reason=reason,
            detail=detail,
            bytes=0 if names[base.inode] else base.allocated,
        )
    return removals
