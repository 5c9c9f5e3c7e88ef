"""A call that its caller need not wait for to the end.

Some calls block where nothing can wake them: in a name server's silence, in a
connection that is never answered, on a token, before the first byte of an
answer, when there is no body yet that could be closed. So they run in a thread
of their own; a cancel or a deadline ends the wait at once, and what the call
brings later is thrown away. The call itself should end by a time-out of its own.
"""

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from agent.cancellation import Cancellation

_T = TypeVar("_T")


def run(
    call: Callable[[], _T],
    cancellation: Cancellation,
    *,
    discard: Callable[[_T], None] = lambda _: None,
    limit_s: float | None = None,
) -> _T:
    """Return what `call` returns; `discard` gets it if it comes too late.

    Raises:
        BootwrightError: what the cancellation was given.
        TimeoutError: it took longer than `limit_s`.
        And whatever `call` raises.
    """
    cancellation.check()
    errand = _Errand(call, discard)
    forget = cancellation.on_cancel(errand.wake)
    try:
        errand.start()
        remaining = cancellation.remaining()
        limits = [limit for limit in (remaining, limit_s) if limit is not None]
        if not errand.back(min(limits, default=None)):
            cancellation.check()
            raise TimeoutError(f"no answer within {limit_s} s")
        return errand.result()
    except BaseException:
        errand.give_up()
        raise
    finally:
        forget()


class _Errand(Generic[_T]):
    def __init__(self, call: Callable[[], _T], discard: Callable[[_T], None]) -> None:
        self._call = call
        self._discard = discard
        self._changed = threading.Condition()
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._done = False
        self._woken = False
        self._given_up = False

    def start(self) -> None:
        # The names that log lines go by are the caller's.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._run,), name="errand", daemon=True)
        thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as e:  # noqa: BLE001  # it is the caller's
            self._error = e
        with self._changed:
            self._done = True
            self._changed.notify_all()
            late = self._results if self._given_up else []
        for result in late:
            self._discard(result)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def back(self, timeout_s: float | None) -> bool:
        """Wait until it is back, for the time-out, or until woken; return whether it is back."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._woken, timeout_s)
            return self._done

    def result(self) -> _T:
        if self._error is not None:
            raise self._error
        return self._results[0]

    def give_up(self) -> None:
        with self._changed:
            self._given_up = True
            late = self._results if self._done else []
        for result in late:
            self._discard(result)
