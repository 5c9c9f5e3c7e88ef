"""Housekeeping: what has to be done now and then, in a thread of its own.

It waits for disks and for other hosts' locks, so nothing that must not wait is
in this thread. And it is nobody's condition: what cannot be done is logged and
done later, since the agent can still free the disk it fails for.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

from agent.cancellation import Cancellation
from agent.directory import DirectorySource
from agent.errors import AgentStopping, BootwrightError
from agent.journal import Journal
from agent.pruner import Pruner
from agent.store import Store
from agent.transfer import ImageSource
from agent.usage import Usage

LOG = logging.getLogger(__name__)

# A partial that nobody went on with for a day will not be asked for any more.
PARTIAL_AGE_S = 86400.0
# A damaged base is kept for people to look at, for a week.
QUARANTINE_AGE_S = 7 * 86400.0
# Long enough to look a failure up after a holiday, and not for ever.
JOB_AGE_S = 30 * 86400.0
SWEEP_EVERY_S = 3600.0


class Housekeeping:
    """A thread; started once, stopped once."""

    def __init__(
        self,
        store: Store,
        usage: Usage,
        pruner: Pruner,
        journal: Journal,
        source: ImageSource,
        *,
        touch: Callable[[str], object],
        tidy: Callable[[Cancellation], None] | None = None,
        mend: Callable[[], None],
        prune_interval_s: float | None,
    ) -> None:
        """`touch` notes the last use of a base, `tidy` is what else there is to do when bases have
        gone, `mend` what is to be done about those that should not have gone. Bases are
        never pruned by themselves if `prune_interval_s` is None.
        """
        self._store = store
        self._usage = usage
        self._pruner = pruner
        self._journal = journal
        self._source = source
        self._touch = touch
        self._tidy = tidy
        self._mend = mend
        self._prune_interval_s = prune_interval_s
        self._cancellation = Cancellation()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Begin nothing more; return whether what was under way has ended."""
        self._cancellation.cancel(AgentStopping("the agent is stopping"))
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        sweep_at = time.monotonic() + SWEEP_EVERY_S
        prune_at = self._next_prune()
        try:
            while True:
                # Also at the beginning: it may take longer than a start may.
                _attempt(self._tidy_up)
                _attempt(self._mend)
                self._cancellation.wait(max(0.0, min(sweep_at, prune_at) - time.monotonic()))
                if time.monotonic() >= sweep_at:
                    self.sweep()
                    sweep_at = time.monotonic() + SWEEP_EVERY_S
                if time.monotonic() >= prune_at:
                    self.prune()
                    prune_at = self._next_prune()
        except AgentStopping:
            pass

    def _next_prune(self) -> float:
        return time.monotonic() + (self._prune_interval_s or math.inf)

    def sweep(self) -> None:
        """Remove what a crash, a kill or the passing of time left; waits for no other host
        but to shrink this one's claims."""
        for chore in (self._usage.settle, self._sweep_store, self._sweep_source, self._forget_jobs):
            _attempt(chore)

    def prune(self) -> None:
        """Remove bases that nobody needs.

        What instances stand on counts as used until they are gone: a base is
        not old on the day its last instance goes.
        """
        _attempt(self._prune)

    def _sweep_store(self) -> None:
        self._store.sweep(
            partials_s=PARTIAL_AGE_S, quarantine_s=QUARANTINE_AGE_S, keep=self._usage.may_need
        )

    def _sweep_source(self) -> None:
        if isinstance(self._source, DirectorySource):
            self._source.sweep()

    def _forget_jobs(self) -> None:
        self._journal.forget(older_than_s=JOB_AGE_S)

    def _tidy_up(self) -> None:
        if self._tidy is not None:
            self._tidy(self._cancellation)

    def _prune(self) -> None:
        for name in self._usage.standing():
            self._touch(name)
        self._pruner.gc(dry_run=False)


def _attempt(chore: Callable[[], None]) -> None:
    try:
        chore()
    except AgentStopping:
        raise
    except (BootwrightError, OSError) as e:
        LOG.error("housekeeping was not finished and is tried again later: %s", e)
    except Exception:
        LOG.exception("housekeeping failed by a defect of ours")
