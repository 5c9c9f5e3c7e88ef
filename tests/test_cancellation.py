"""What ends a piece of work, and what ends the undoing of it."""

import pytest

from agent.cancellation import Cancellation
from agent.errors import AgentStopping, Cancelled, DeadlineExceeded

STOPPING = AgentStopping("the agent is stopping")


def test_first_reason_stays() -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    cancellation.cancel(STOPPING)
    with pytest.raises(Cancelled):
        cancellation.wait(60)


def test_undoing_goes_on_when_the_work_was_cancelled_or_is_late() -> None:
    cancellation = Cancellation(0)
    with pytest.raises(DeadlineExceeded):
        cancellation.check()
    cancellation.cancel(Cancelled("enough"))
    cancellation.undoing().wait(0)
    assert cancellation.undoing().remaining() is None


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
def test_stop_of_the_agent_ends_undoing_too(asked_before: bool, cancelled: bool) -> None:
    cancellation = Cancellation()
    if cancelled:
        cancellation.cancel(Cancelled("enough"))
    if asked_before:
        undoing = cancellation.undoing()
        cancellation.cancel(STOPPING)
    else:
        cancellation.cancel(STOPPING)
        undoing = cancellation.undoing()
    with pytest.raises(AgentStopping):
        undoing.wait(60)
