"""The scrub: verifies every base again and again, in the background, behind everybody else.

The longest unverified goes first. It runs in one thread of its own, at idle
I/O priority and the lowest CPU priority, and gives way while the host waits
for its disks; but not for ever, since a busy host wants sound bases too.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent import process
from agent.cancellation import Cancellation
from agent.errors import AgentStopping, BootwrightError, NotFound
from agent.image import Image
from agent.process import ProgramFailed
from agent.store import Entry, Store
from agent.verification import Verifier
from agent.views import Soundness

LOG = logging.getLogger(__name__)

_LOOK_EVERY_S = 600.0

_PRESSURE = Path("/proc/pressure/io")
_PRESSED = 10.0
"""Percent of the last ten seconds in which somebody waited for a disk."""

_PAUSE_S = 1.0
"""Before a piece of 8 MiB while the disks are busy: half a TiB a day goes on regardless."""


class Scrub:
    """A thread; started once, stopped once."""

    def __init__(
        self,
        store: Store,
        verifier: Verifier,
        *,
        interval_s: float,
        repair: Callable[[Image], None],
        pressure: Path = _PRESSURE,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        """Each base is verified every `interval_s`; whether one is due is looked
        for every `look_every_s`.

        `repair` has an image fetched anew that instances stand on. It only asks
        for that: what this thread started would have its priorities.
        """
        self._store = store
        self._verifier = verifier
        self._interval_s = interval_s
        self._repair = repair
        self._pressure = pressure
        self._look_every_s = look_every_s
        self._cancellation = Cancellation()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._cancellation.cancel(AgentStopping("the agent is stopping"))
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        _stand_back()
        try:
            while True:
                try:
                    self.run_once(self._cancellation)
                except OSError as e:
                    LOG.error("the scrub cannot look for bases, and tries again later: %s", e)
                except AgentStopping:
                    raise
                except Exception:
                    LOG.exception("the scrub failed by a defect of ours, and tries again later")
                self._cancellation.wait(self._look_every_s)
        except AgentStopping:
            pass

    def run_once(self, cancellation: Cancellation) -> None:
        """Verify the bases that are due.

        Raises:
            OSError: it cannot be found out which.
            BootwrightError: what the cancellation was given.
        """
        for entry in self._due():
            try:
                self._verify(entry, cancellation)
            except NotFound:
                continue  # removed meanwhile
            except (BootwrightError, OSError) as e:
                cancellation.check()
                LOG.error("scrubbing image %s: %s", entry.manifest.image.id, e)

    def _verify(self, entry: Entry, cancellation: Cancellation) -> None:
        image = entry.manifest.image
        found = self._verifier.verify(
            image.id, cancellation, pause=lambda: self._give_way(cancellation)
        )
        if found.soundness is Soundness.DAMAGED and found.instances:
            self._repair(image)

    def _due(self) -> list[Entry]:
        limit = time.time() - self._interval_s
        entries = [
            entry
            for entry in self._store.entries()
            # What was converted has no hash of its own until it is first read
            # here: the boot that waited for it did not have to wait for that.
            if entry.manifest.content_digest is None or entry.manifest.verified_at < limit
        ]
        return sorted(entries, key=lambda entry: entry.manifest.verified_at)

    def _give_way(self, cancellation: Cancellation) -> None:
        pressed = pressure(self._pressure)
        if pressed is not None and pressed > _PRESSED:
            cancellation.wait(_PAUSE_S)


def pressure(path: Path = _PRESSURE) -> float | None:
    """Return in how many percent of ten seconds somebody waited for a disk, if the kernel says."""
    try:
        # some avg10=1.22 avg60=1.18 avg300=1.10 total=64112393
        return float(path.read_text(encoding="ascii").split()[1].removeprefix("avg10="))
    except (OSError, ValueError, IndexError):
        return None


def _stand_back() -> None:
    """Take the lowest priorities for the calling thread only."""
    thread = threading.get_native_id()
    # Linux gives each thread a nice value of its own: setpriority(2), "C library/kernel
    # differences".
    try:
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        process.run(["ionice", "-c", "3", "-p", str(thread)], timeout_s=10)
    except (OSError, ProgramFailed) as e:
        LOG.warning("the scrub keeps the priorities of everybody else: %s", e)
