"""What can end a piece of work before it is done: a deadline, a cancel, a stop.

One `Cancellation` goes with a job through every layer. Whatever may take long
asks it (`check`), sleeps on it (`wait`) or bounds its own time-out by it
(`remaining`), so that no thread ever sleeps through a request to end.
"""

import threading
import time
from collections.abc import Callable

from agent.errors import AgentStopping, BootwrightError, DeadlineExceeded


class Cancellation:
    """May be shared by any number of threads."""

    def __init__(
        self,
        deadline_s: float | None = None,
        *,
        elapsed_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadline_s`: seconds after which `check` raises; None for never.

        `elapsed_s` of them are over already, before an earlier end of the agent for one.
        """
        self._clock = clock
        self._seconds = deadline_s
        self._deadline = None if deadline_s is None else clock() + deadline_s - elapsed_s
        self._reason: BootwrightError | None = None
        self._stopping: AgentStopping | None = None
        self._undoing: Cancellation | None = None
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def cancel(self, reason: BootwrightError) -> None:
        """End the work with `reason`; the first reason given stays."""
        if isinstance(reason, AgentStopping):
            self._stop(reason)
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            listeners, self._listeners = self._listeners, []
        self._event.set()
        for listener in listeners:
            listener()

    def _stop(self, reason: AgentStopping) -> None:
        with self._lock:
            self._stopping = reason
            undoing = self._undoing
        if undoing is not None:
            undoing.cancel(reason)

    def undoing(self) -> "Cancellation":
        """Return what goes with undoing the work: nothing but the agent's stop ends that."""
        with self._lock:
            if self._undoing is None:
                self._undoing = Cancellation(clock=self._clock)
                if self._stopping is not None:
                    self._undoing.cancel(self._stopping)
            return self._undoing

    def on_cancel(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` once at `cancel` (at once if that has been); returns its removal.

        For what blocks in a foreign call and has to be woken up: closing a
        socket, ending a process. A deadline does not call it: whoever blocks
        must bound the call by `remaining`.
        """
        with self._lock:
            if self._reason is None:
                self._listeners.append(listener)
                return lambda: self._forget(listener)
        listener()
        return lambda: None

    def _forget(self, listener: Callable[[], None]) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    @property
    def cancelled(self) -> bool:
        return self._reason is not None

    def remaining(self) -> float | None:
        """Seconds until the deadline, never below 0; None without a deadline."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self._clock())

    def check(self) -> None:
        """Return if the work may go on.

        Raises:
            BootwrightError: the reason given to `cancel`.
            DeadlineExceeded: the deadline has passed.
        """
        if self._reason is not None:
            raise self._reason
        if self._deadline is not None and self._clock() >= self._deadline:
            raise DeadlineExceeded(
                f"the job did not finish within its deadline of {self._seconds:g} s",
                "raise deadline_s, or find out from the timeline what took so long",
            )

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until the deadline or a cancel; then `check`."""
        remaining = self.remaining()
        self._event.wait(seconds if remaining is None else min(seconds, remaining))
        self.check()
