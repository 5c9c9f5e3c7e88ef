"""Who may work on a volume at the same time."""

import threading

import pytest

from agent.backends.volume_work import VolumeWork
from agent.cancellation import Cancellation
from agent.errors import Cancelled

NAME = "base_1"


def test_many_work_on_a_volume_and_nobody_has_it_alone_meanwhile() -> None:
    work = VolumeWork()
    with work.on(NAME), work.on(NAME):
        with work.alone(NAME) as alone:
            assert not alone
        with work.alone("another") as alone:
            assert alone
    with work.alone(NAME) as alone:
        assert alone
        with work.alone(NAME) as again:
            assert not again


def test_who_wants_to_work_waits_for_the_one_who_is_alone() -> None:
    work, began = VolumeWork(), threading.Event()

    def begin() -> None:
        with work.on(NAME):
            began.set()

    thread = threading.Thread(target=begin)
    with work.alone(NAME) as alone:
        assert alone
        thread.start()
        assert not began.wait(0.1)
    assert began.wait(20)
    thread.join(20)
    with work.alone(NAME) as alone:
        assert alone


def test_one_makes_a_volume_and_who_waits_for_that_can_be_cancelled() -> None:
    work, cancellation = VolumeWork(), Cancellation()
    with work.making(NAME, cancellation):
        cancelled = Cancellation()
        threading.Timer(0.05, cancelled.cancel, [Cancelled("enough")]).start()
        with pytest.raises(Cancelled), work.making(NAME, cancelled):
            pass
        with work.making("another", cancellation):
            pass
    with work.making(NAME, cancellation):
        pass
