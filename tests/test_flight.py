"""Several callers of one image, and the end of a fetch nobody waits for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.base import Base
from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    Cancelled,
    ImageSourceUnavailable,
)
from agent.report import Progress
from tests.cache_kit import (
    IMAGE_ID,
    MIB,
    NAME,
    CacheKit,
    MakeKit,
    Source,
    kit,
    make_kit,
    random_bytes,
    source,
)
from tests.waiting import LIMIT_S, until

__all__ = ["kit", "make_kit", "source"]


def test_many_callers_of_one_cold_image_make_one_fetch(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(4))
    source.gate.clear()
    bases: list[Base] = []
    threads = [
        threading.Thread(
            target=lambda pin=f"job-{number}": bases.append(kit.acquire(image, pin=pin))
        )
        for number in range(10)
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(fetch.waiters for fetch in kit.cache.fetches()) == len(threads))
    source.gate.set()
    for thread in threads:
        thread.join()

    assert len(source.opened) == 1
    assert {base.path for base in bases} == {kit.store.directory / NAME}
    assert sorted(base.received for base in bases) == [0] * 9 + [4 * MIB]


def test_no_more_images_are_fetched_at_a_time_than_configured(
    kit: CacheKit, source: Source
) -> None:
    images = [source.add(random_bytes(1), image_id=f"image-{number}") for number in range(7)]
    source.gate.clear()
    with ThreadPoolExecutor(len(images)) as pool:
        fetches = [pool.submit(kit.acquire, image) for image in images]
        until(lambda: len(source.opened) == 4)
        # A fifth would not take long.
        time.sleep(0.3)
        assert len(source.opened) == 4
        source.gate.set()
        assert all(fetch.result().origin == "memory" for fetch in fetches)
    assert len(source.opened) == 7


def test_a_waiter_that_is_cancelled_leaves_and_the_others_stay(
    kit: CacheKit, source: Source
) -> None:
    image = source.add(random_bytes(2))
    source.gate.clear()
    leaving = Cancellation()
    errors: list[BootwrightError] = []

    def leave() -> None:
        try:
            kit.acquire(image, pin="leaving", cancellation=leaving)
        except BootwrightError as e:
            errors.append(e)

    staying: list[Base] = []
    first = threading.Thread(target=leave)
    second = threading.Thread(target=lambda: staying.append(kit.acquire(image, pin="staying")))
    first.start()
    second.start()
    until(lambda: sum(fetch.waiters for fetch in kit.cache.fetches()) == 2)
    leaving.cancel(Cancelled("enough"))
    first.join(LIMIT_S)
    assert [type(error) for error in errors] == [Cancelled]
    source.gate.set()
    second.join()

    assert len(staying) == 1
    assert len(source.opened) == 1


def test_the_last_waiter_out_ends_the_fetch_and_what_came_is_gone_on_with(
    make_kit: MakeKit, source: Source
) -> None:
    image = source.add(random_bytes(8))
    kit = make_kit()
    only = Cancellation()

    def leave_halfway(progress: Progress) -> None:
        if progress.bytes_done >= 3 * MIB:
            only.cancel(Cancelled("enough"))

    source.break_at = 3 * MIB
    with pytest.raises((Cancelled, ImageSourceUnavailable)):
        kit.acquire(image, cancellation=only, on_progress=leave_halfway)
    kit.cache.close(10)
    source.break_at = None

    base = make_kit().acquire(image)

    assert base.resumed == 3 * MIB
    assert base.received == 5 * MIB
    assert base.path.read_bytes() == source.data[IMAGE_ID]


def test_closing_interrupts_a_fetch_and_keeps_what_came(make_kit: MakeKit, source: Source) -> None:
    image = source.add(random_bytes(4))
    kit = make_kit()
    source.gate.clear()
    errors: list[BootwrightError] = []

    def wait() -> None:
        try:
            kit.acquire(image)
        except BootwrightError as e:
            errors.append(e)

    waiter = threading.Thread(target=wait)
    waiter.start()
    until(lambda: source.opened)
    kit.cache.close(0)
    source.gate.set()
    kit.cache.close(LIMIT_S)
    waiter.join()

    assert [type(error) for error in errors] == [AgentStopping]
    with pytest.raises(AgentStopping):
        kit.acquire(image)


def test_a_flight_that_cannot_take_off_is_gone(kit: CacheKit, source: Source) -> None:
    image = source.add(random_bytes(1))
    before = threading.stack_size(1 << 46)  # more than a process can have
    try:
        with pytest.raises(BackendError, match="thread"):
            kit.acquire(image)
    finally:
        threading.stack_size(before)
    assert kit.cache.being_fetched() == []
    assert kit.acquire(image).path.read_bytes() == source.data[IMAGE_ID]
