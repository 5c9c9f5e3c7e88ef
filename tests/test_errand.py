"""Calls that nobody has to wait for."""

import threading
import time

import pytest

from agent import errand, logs
from agent.cancellation import Cancellation
from agent.errors import Cancelled, DeadlineExceeded, ImageNotFound
from tests.waiting import AT_ONCE_S, LIMIT_S


def test_the_result_and_the_error_are_the_callers() -> None:
    assert errand.run(lambda: 3, Cancellation()) == 3
    with pytest.raises(ImageNotFound, match="none"):
        errand.run(lambda: _raise(ImageNotFound("none")), Cancellation())


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_the_wait_ends_at_once_and_what_comes_late_is_thrown_away(how: str) -> None:
    cancellation = Cancellation(None if how == "cancel" else 0.1)
    silent, discarded = threading.Event(), threading.Event()

    def call() -> str:
        silent.wait(LIMIT_S)
        return "late"

    if how == "cancel":
        threading.Timer(0.1, cancellation.cancel, [Cancelled("enough")]).start()
    begin = time.monotonic()
    with pytest.raises((Cancelled, DeadlineExceeded)):
        errand.run(call, cancellation, discard=lambda _: discarded.set())

    assert time.monotonic() - begin < AT_ONCE_S
    assert not discarded.is_set()
    silent.set()
    assert discarded.wait(LIMIT_S)


def test_a_limit_ends_the_wait_too() -> None:
    silent = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        errand.run(lambda: silent.wait(LIMIT_S), Cancellation(), limit_s=0.05)
    silent.set()


def test_nothing_is_begun_after_the_cancel() -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    begun: list[int] = []
    with pytest.raises(Cancelled):
        errand.run(lambda: begun.append(1), cancellation)
    assert begun == []


def test_its_log_lines_bear_the_names_of_the_job() -> None:
    def fields() -> object:
        return logs._context.get()

    with logs.bind(image_id="one"):
        assert errand.run(fields, Cancellation()) == logs._context.get() != {}
