"""The limit on what all fetches together receive."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bandwidth import Bandwidth, Limited
from agent.cancellation import Cancellation
from agent.errors import Cancelled
from agent.transfer import RetryPolicy, Transfer
from tests.cache_kit import IMAGE_ID, MIB, Source, random_bytes
from tests.waiting import AT_ONCE_S


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    takes=st.lists(st.tuples(st.integers(1, MIB), st.floats(0, 3)), min_size=1, max_size=50),
    rate=st.integers(1000, 10 * MIB),
)
def test_whoever_waits_as_told_never_exceeds_the_limit(
    takes: list[tuple[int, float]], rate: int
) -> None:
    clock = Clock()
    bandwidth = Bandwidth(rate, clock=clock)
    begin, received = clock.now, 0
    for size, idle in takes:
        received += size
        clock.now += bandwidth.take(size)
        # What was saved up in the tenth of a second before.
        assert received <= (clock.now - begin + 0.1) * rate * 1.000001
        clock.now += idle


def test_a_busy_line_is_used_to_the_limit_and_shared() -> None:
    clock = Clock()
    bandwidth = Bandwidth(10 * MIB, clock=clock)
    waits = [bandwidth.take(MIB) for _ in range(20)]  # of several fetches at one time
    assert waits == pytest.approx([0.1 * n for n in range(1, 21)])


def test_two_fetches_keep_the_limit_together() -> None:
    source = Source()
    bandwidth = Bandwidth(8 * MIB)
    limited = Limited(source, bandwidth)
    images = [source.add(random_bytes(4), image_id=f"image-{n}") for n in range(2)]
    got: list[bytes] = []

    def fetch(number: int) -> None:
        transfer = Transfer(limited, images[number], 0, RetryPolicy(), Cancellation())
        got.append(b"".join(transfer))

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(2)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(got) == sorted(source.data.values())
    assert time.monotonic() - begin > 0.8


def test_a_cancel_ends_a_long_wait() -> None:
    source = Source()
    image = source.add(random_bytes(2))
    cancellation = Cancellation()
    transfer = Transfer(
        Limited(source, Bandwidth(1000)), image, 0, RetryPolicy(num_retries=0), cancellation
    )
    threading.Timer(0.1, cancellation.cancel, [Cancelled("enough")]).start()
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        list(transfer)
    assert time.monotonic() - begin < AT_ONCE_S
    assert source.opened == [(IMAGE_ID, 0)]
