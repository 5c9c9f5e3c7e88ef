"""Waiting for what other threads and processes do, but not for ever."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

LIMIT_S: Final = 60.0
"""Far more than anything takes that is waited for, so that others may have the processors."""
AT_ONCE_S: Final = 10.0
"""What takes no longer has ended by itself: what would end it otherwise is further away."""


def until(condition: Callable[[], T | None]) -> T:
    """Return what `condition` says once that is true."""
    deadline = time.monotonic() + LIMIT_S
    while not (said := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)
    return said
