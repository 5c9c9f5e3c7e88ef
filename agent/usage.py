"""Usage: who needs a base, and so keeps it in the cache.

    jobs          that run and have pinned it; in memory, a job that goes on
                  after a restart pins again
    operator      `bootwright image pin`; durable
    instances     of this host: running, stopped or unknown to libvirt, as long
                  as there is an `instance.json`
    hosts         that share the cache and claim it, up or down

A guest has no say in any of it: none of this is read from a disk it can write.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from agent.claims import Claims
from agent.errors import BackendError, BootwrightError
from agent.instances import Instances
from agent.pins import OperatorPin, OperatorPins
from agent.store import Store

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Users:
    """All who need one base; whoever is in here keeps it."""

    jobs: tuple[str, ...] = ()
    operator: OperatorPin | None = None
    instances: tuple[str, ...] = ()
    """Names."""
    hosts: tuple[str, ...] = ()
    """Names of other hosts."""

    @property
    def any(self) -> bool:
        return bool(self.jobs or self.operator or self.instances or self.hosts)

    def describe(self) -> str:
        """Return them as people read it."""
        found = [f"job {job}" for job in self.jobs]
        found += [f"instance {name}" for name in self.instances]
        found += [f"host {name}" for name in self.hosts]
        if self.operator is not None:
            until = self.operator.until
            end = "" if until is None else time.strftime(" until %F %T", time.localtime(until))
            found.append(f"a pin{end}")
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return ", ".join(found[:5]) + more


class Usage:
    """May be shared by any number of threads."""

    def __init__(self, store: Store, instances: Instances, *, host_id: str) -> None:
        self.pins = OperatorPins(store.directory / ".pins")
        self._claims = Claims(
            store.directory / ".hosts", lock=store.lock_of("claims"), host_id=host_id
        )
        self._instances = instances
        self._lock = threading.Lock()
        self._jobs: dict[str, set[str]] = {}
        self.settle()

    def pin(self, base_name: str, job: str) -> None:
        """Keep the base until `unpin`, whether it is there yet or not.

        Whoever looks for the base afterwards and finds it can rely on it.

        Raises:
            BackendError, InsufficientFreeSpace: the claim cannot be written.
        """
        with self._lock:
            self._jobs.setdefault(base_name, set()).add(job)
        self._claims.add(base_name)

    def unpin(self, job: str) -> None:
        """Give up every base the job holds."""
        with self._lock:
            for jobs in self._jobs.values():
                jobs.discard(job)
            self._jobs = {name: jobs for name, jobs in self._jobs.items() if jobs}

    def of(self, base_name: str) -> Users:
        """Raises: BackendError, as `survey`."""
        return self.survey([base_name])[base_name]

    def survey(self, names: Collection[str]) -> Mapping[str, Users]:
        """Return who needs each of the bases.

        Raises:
            BackendError: it cannot be known; nothing may be removed.
        """
        if self._instances.unreadable:
            raise BackendError(
                f"{self._instances.unreadable[0]} cannot be read, so what it stands on is unknown",
                "restore it from a backup, or remove it if the instance is gone, and restart the "
                "agent; until then nothing is removed from the image cache",
            )
        others = self._claims.of_others()
        # The jobs before the instances: a job writes its instance down before
        # it gives up its pin, so it is seen as the one or as the other.
        with self._lock:
            jobs = {name: tuple(sorted(self._jobs.get(name, ()))) for name in names}
        standing: dict[str, list[str]] = {}
        for record in self._instances.all():
            for name in record.base_names:
                standing.setdefault(name, []).append(record.name)
        return {
            name: Users(
                jobs=jobs[name],
                operator=self.pins.get(name),
                instances=tuple(standing.get(name, ())),
                hosts=others.get(name, ()),
            )
            for name in names
        }

    def may_need(self, base_name: str) -> bool:
        """Whether somebody needs the base, or nobody can know."""
        try:
            return self.of(base_name).any
        except BackendError:
            return True

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Let nobody pin a base during the block, on any host: what `of` says stays true.

        Raises:
            BackendError: another host does not let go of the lock on the claims.
        """
        with self._claims.held_still():
            yield

    def settle(self) -> None:
        """Tell other hosts which bases this one no longer needs, if they can be told."""
        if self._instances.unreadable:
            return
        try:
            self._claims.shrink(self._needed)
        except (BootwrightError, OSError) as e:
            # The file system may be full: what would free it must not wait for this.
            LOG.warning("the claims of this host stay as they are, and may keep too much: %s", e)

    def _needed(self) -> frozenset[str]:
        with self._lock:
            pinned = frozenset(self._jobs)
        return pinned.union(self.standing())

    def standing(self) -> frozenset[str]:
        """Return the names of the bases that instances of this host stand on."""
        return frozenset().union(*(record.base_names for record in self._instances.all()))
