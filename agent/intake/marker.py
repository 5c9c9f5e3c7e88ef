"""Makes sure now and then that what was written so far survives a crash of the host.

In a thread of its own: an fdatasync takes as long as the disk wants, and the
network should not wait for it.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from agent.errors import BootwrightError

# How much a crash of the whole host may cost: what lies beyond the last mark
# may be in the page cache only. A killed agent loses nothing of it. Syncing
# this often also spreads the writing over the fetch: an image of 512 MiB is
# whole 8 % sooner than with marks every 64 MiB (benchmarks.cold).
MARK_EVERY = 16 << 20

Mark = TypeVar("Mark")


class Marker(Generic[Mark]):
    """Used by one thread besides its own."""

    def __init__(self, settle: Callable[[Mark], None], offset: int) -> None:
        """`settle` syncs the files and makes a mark durable; marks are due from `offset` on."""
        self._settle = settle
        self._condition = threading.Condition()
        self._marked = offset
        self._pending: Mark | None = None
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="partial-marker")
        self._thread.start()

    def reached(self, offset: int, mark: Callable[[], Mark]) -> None:
        """Tell that everything up to `offset` has been written; `mark` says so, if one is due.

        Raises:
            OSError: an earlier sync failed; what was written may be lost.
        """
        if offset - self._marked < MARK_EVERY:
            return
        self.check()
        with self._condition:
            if self._pending is not None:
                return  # the disk is behind; the next one covers this too
        made = mark()
        with self._condition:
            self._pending = made
            self._marked = offset
            self._condition.notify()

    def check(self) -> None:
        """Raises: OSError: a sync has failed; what was written may be lost.

        The kernel tells of a lost write once: a later sync that succeeds means nothing.
        """
        with self._condition:
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._pending is not None)
                mark = self._pending
                if mark is None or self._closing:
                    return
            try:
                self._settle(mark)
            except (OSError, BootwrightError) as e:
                with self._condition:
                    self._error = e
                return
            with self._condition:
                self._pending = None

    def close(self) -> None:
        """Wait for the sync that is under way, and end the thread; may be called again."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
