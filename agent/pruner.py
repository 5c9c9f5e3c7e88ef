"""The pruner: removes bases, and nothing else does.

It looks at the cache, has `agent.prune` decide, and carries out what was
decided. Between the two anybody may have begun to need a base, so each is
looked at once more at the moment of its removal, when nobody can pin it.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator

from agent import metrics, prune
from agent.errors import BackendError, BootwrightError, InsufficientFreeSpace
from agent.locks import FileLock
from agent.prune import BaseState, CacheState, Policy
from agent.store import Entry, Store
from agent.usage import Usage
from agent.views import Decision, GcReport, Reason

LOG = logging.getLogger(__name__)


class Pruner:
    """May be shared by any number of threads."""

    def __init__(
        self,
        store: Store,
        usage: Usage,
        policy: Policy,
    ) -> None:
        self._store = store
        self._usage = usage
        self._policy = policy

    def gc(self, *, dry_run: bool) -> GcReport:
        """Remove what the policy says; return what became, or would become, of every base."""
        decisions = prune.plan(self.state(), time.time(), self._policy)
        if not dry_run:
            decisions = list(self._carry_out(decisions))
        freed = sum(decision.bytes for decision in decisions)
        return GcReport(dry_run=dry_run, decisions=tuple(decisions), bytes=freed)

    def why(self, image_id: str) -> Decision:
        """Return what the next `gc` would do with an image's base.

        Raises:
            NotFound: it has none here.
        """
        name = self._store.get(image_id).name
        for decision in self.gc(dry_run=True).decisions:
            if decision.base_name == name:
                return decision
        raise BackendError(f"the base of image {image_id} has gone just now", "ask again")

    def make_room(self, needed: int) -> None:
        """Remove the longest unused bases if that gives `needed` bytes back, else none."""
        for decision in self._carry_out(prune.room(self.state(), needed, self._policy)):
            if not decision.remove:
                LOG.info("image %s is kept after all: %s", decision.image_id, decision.detail)

    def remove(self, image_id: str) -> None:
        """Remove an image's base, whatever its age is.

        Raises:
            NotFound: it is not here.
            BackendError: somebody needs it, or is at work on it.
        """
        entry = self._store.get(image_id)
        decision = self._removed(entry, _decision(entry, Reason.REQUEST, "asked for"))
        if not decision.remove:
            raise BackendError(
                f"image {image_id} stays in the cache: {decision.detail}",
                "delete what uses it, or take off its pin, first",
            )

    def state(self) -> CacheState:
        """Return what there is, and who needs it."""
        entries = self._store.entries()
        try:
            status = os.statvfs(self._store.directory)
        except FileNotFoundError:  # its share is not mounted, or somebody has removed it
            return CacheState(bases=(), allocated=0, used=0, capacity=0)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        try:
            survey = self._usage.survey([entry.name for entry in entries])
        except BootwrightError as e:
            LOG.error("no base can be removed: %s", e)
            survey = {}
        return CacheState(
            bases=tuple(
                BaseState(
                    name=entry.name,
                    image_id=entry.manifest.image.id,
                    inode=entry.identity.inode,
                    allocated=entry.allocated,
                    last_used_at=entry.last_used_at,
                    users=survey.get(entry.name),
                )
                for entry in entries
            ),
            allocated=self._store.allocated(),
            used=used,
            capacity=used + status.f_bavail * status.f_frsize,
        )

    def _carry_out(self, decisions: Iterable[Decision]) -> Iterator[Decision]:
        hindrance: BootwrightError | None = None
        for decision in decisions:
            entry = self._store.find(decision.base_name) if decision.remove else None
            if entry is None:
                yield decision
                continue
            if hindrance is None:
                try:
                    yield self._removed(entry, decision)
                    continue
                except (BackendError, InsufficientFreeSpace) as e:
                    # It would be no clearer for the next one who needs it, and each
                    # would wait anew for the host that holds the lock on the claims.
                    LOG.error("no more bases can be removed for now: %s", e)
                    hindrance = e
            yield _kept(decision, str(hindrance))

    def _removed(self, entry: Entry, decision: Decision) -> Decision:
        """Remove a base unless somebody needs it; return what became of it.

        Raises:
            BackendError: who needs it cannot be known.
        """
        lock = FileLock(self._store.lock_of(entry.name))
        if not lock.try_acquire():
            return _kept(decision, "somebody is at work on it right now")
        try:
            with self._usage.held_still():
                users = self._usage.of(entry.name)
                if users.any:
                    return _kept(decision, f"needed by {users.describe()}")
                self._store.remove(entry.name)
                self._usage.pins.remove(entry.name)  # an expired one
        except OSError as e:
            LOG.error("the base %s cannot be removed: %s", entry.path, e)
            return _kept(decision, str(e))
        finally:
            lock.release()
        metrics.EVICTIONS.labels(reason=decision.reason.name.lower()).inc()
        LOG.info(
            "image %s removed from the cache, %d bytes: %s",
            decision.image_id,
            decision.bytes,
            decision.detail,
        )
        return decision


def _decision(entry: Entry, reason: Reason, detail: str) -> Decision:
    return Decision(
        image_id=entry.manifest.image.id,
        base_name=entry.name,
        remove=True,
        reason=reason,
        detail=detail,
        bytes=entry.allocated,
    )


def _kept(decision: Decision, why: str) -> Decision:
    return decision.model_copy(
        update={"remove": False, "reason": Reason.IN_USE, "detail": why, "bytes": 0}
    )
