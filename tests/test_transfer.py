"""Transfers from a Glance that misbehaves, over real connections on loopback."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from agent.cancellation import Cancellation
from agent.errors import (
    BootwrightError,
    Cancelled,
    DeadlineExceeded,
    ImageCorrupt,
    ImageNotFound,
    ImageSourceUnavailable,
)
from agent.glance import GlanceSource
from agent.image import Image
from agent.transfer import Body, RetryPolicy, Transfer, resolve
from tests.fake_glance import FakeGlance, Fault, fake_glance
from tests.waiting import AT_ONCE_S, LIMIT_S, until

DATA = random.Random(2).randbytes((2 << 20) + 4321)
SIZE = len(DATA)


@pytest.fixture
def glance() -> Iterator[FakeGlance]:
    with fake_glance() as glance:
        yield glance


@pytest.fixture
def source(glance: FakeGlance) -> Iterator[GlanceSource]:
    session = Session(auth=NoAuth(endpoint=glance.url), timeout=5)
    yield GlanceSource(session, endpoints=[glance.url], stall_timeout_s=0.3)
    session.session.close()


class Pauses:
    """Stands in for sleeping and for the dice: writes the longest pause down, sleeps none."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def highest(self, low: float, high: float) -> float:
        assert low == 0
        return high


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def transfer_of(
    glance: FakeGlance, source: GlanceSource, pauses: Pauses
) -> Callable[..., Transfer]:
    def transfer_of(*faults: Fault, offset: int = 0, size: int | None = SIZE) -> Transfer:
        image = source.get(glance.store(DATA, size=size))
        glance.faults = list(faults)
        return Transfer(
            source,
            image,
            offset,
            RetryPolicy(num_retries=3, initial_s=0.5, max_s=30),
            Cancellation(),
            sleep=pauses.sleep,
            uniform=pauses.highest,
        )

    return transfer_of


Make = Callable[..., Transfer]


def ranges(glance: FakeGlance) -> list[str | None]:
    return [wanted for _path, wanted in glance.requests]


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connection_is_resumed_at_the_byte(
    glance: FakeGlance, transfer_of: Make, reset: bool
) -> None:
    transfer = transfer_of(Fault(cut_after=1_000_000, reset=reset))
    assert b"".join(transfer) == DATA
    first, second = ranges(glance)
    assert first is None
    assert second is not None
    at = int(second.removeprefix("bytes=").removesuffix("-"))
    # What the kernel threw away at a RST has to be asked for again.
    assert 0 < at <= 1_000_000 if reset else at == 1_000_000
    assert transfer.received == SIZE
    assert transfer.resumes == 1


def test_every_fault_in_one_transfer(glance: FakeGlance, transfer_of: Make) -> None:
    transfer = transfer_of(
        Fault(refuse=True),
        Fault(status=503),
        Fault(cut_after=500_000),
        Fault(status=500),
        Fault(status=429, content_type=None),
        Fault(stall_after=600_000),
        Fault(status=200),
        Fault(status=502, body=b"\xff\xfe", content_type="text/plain"),
        Fault(cut_after=100_000, chunked=True),
        Fault(status=408),
        Fault(headers={"Content-Encoding": "gzip"}),
    )
    assert b"".join(transfer) == DATA
    assert glance.faults == []
    assert transfer.resumes == 11


def test_gives_up_after_so_many_attempts_without_a_new_byte(
    glance: FakeGlance, transfer_of: Make, pauses: Pauses
) -> None:
    transfer = transfer_of(*[Fault(status=503)] * 10)
    with pytest.raises(ImageSourceUnavailable, match="503 Service Unavailable"):
        list(transfer)
    assert len(glance.requests) == 4
    assert pauses.seconds == [0.5, 1.0, 2.0]


def test_progress_starts_count_and_backoff_anew(
    glance: FakeGlance, transfer_of: Make, pauses: Pauses
) -> None:
    down = [Fault(status=503)] * 2
    transfer = transfer_of(
        *down, Fault(cut_after=1), *down, Fault(cut_after=1), *down, *[Fault(cut_after=0)] * 20
    )
    received: list[bytes] = []
    with pytest.raises(ImageSourceUnavailable, match="closed before"):
        received.extend(transfer)
    assert b"".join(received) == DATA[:2]
    assert pauses.seconds == [0.5, 1.0, 0.5, 1.0, 2.0, 0.5, 1.0, 2.0]


def test_bytes_received_again_are_no_progress(glance: FakeGlance, transfer_of: Make) -> None:
    transfer = transfer_of(*[Fault(ignore_range=True, cut_after=1000)] * 20)
    received: list[bytes] = []
    with pytest.raises(ImageSourceUnavailable):
        received.extend(transfer)
    assert b"".join(received) == DATA[:1000]
    assert len(glance.requests) == 4
    assert transfer.received == 4000


def test_pauses_have_an_upper_limit(
    glance: FakeGlance, source: GlanceSource, pauses: Pauses
) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(status=503)] * 60
    policy = RetryPolicy(num_retries=40, initial_s=0.5, max_s=30)
    transfer = Transfer(
        source, image, 0, policy, Cancellation(), sleep=pauses.sleep, uniform=pauses.highest
    )
    with pytest.raises(ImageSourceUnavailable):
        list(transfer)
    assert pauses.seconds[:7] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert set(pauses.seconds[7:]) == {30.0}


@pytest.mark.parametrize(("asked", "pause"), [("7", 7.0), ("0", 0.5), ("900", 30.0), ("x", 0.5)])
def test_retry_after_is_obeyed_within_the_limit(
    transfer_of: Make, pauses: Pauses, asked: str, pause: float
) -> None:
    transfer = transfer_of(Fault(status=429, headers={"Retry-After": asked}))
    assert b"".join(transfer) == DATA
    assert pauses.seconds == [pause]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(status=400),
        Fault(status=416),
        Fault(no_content_range=True),
    ],
)
def test_source_without_ranges_sends_the_beginning_again(transfer_of: Make, fault: Fault) -> None:
    transfer = transfer_of(fault, offset=1_500_000)
    assert b"".join(transfer) == DATA[1_500_000:]
    assert transfer.received == SIZE


def test_range_from_the_wrong_byte_is_not_believed(glance: FakeGlance, transfer_of: Make) -> None:
    transfer = transfer_of(Fault(shift=3), offset=1000)
    assert b"".join(transfer) == DATA[1000:]
    assert ranges(glance) == ["bytes=1000-", None]


def test_range_that_begins_too_early_is_used(glance: FakeGlance, transfer_of: Make) -> None:
    transfer = transfer_of(Fault(shift=-500), offset=1000)
    assert b"".join(transfer) == DATA[1000:]
    assert transfer.received == SIZE - 500


def test_complete_image_asks_nothing(glance: FakeGlance, transfer_of: Make) -> None:
    assert list(transfer_of(offset=SIZE)) == []
    assert glance.requests == []


def test_short_answer_is_resumed(glance: FakeGlance, transfer_of: Make) -> None:
    assert b"".join(transfer_of(Fault(end_after=10), Fault(end_after=20, chunked=True))) == DATA
    assert ranges(glance) == [None, "bytes=10-", "bytes=30-"]


@pytest.mark.parametrize("chunked", [False, True])
def test_image_longer_than_its_record_is_corrupt(transfer_of: Make, chunked: bool) -> None:
    received: list[bytes] = []
    transfer = transfer_of(Fault(extra=b"!", chunked=chunked))
    with pytest.raises(ImageCorrupt, match=f"{SIZE} bytes"):
        received.extend(transfer)
    assert DATA.startswith(b"".join(received))


def test_image_of_another_size_is_corrupt_at_the_first_range(transfer_of: Make) -> None:
    with pytest.raises(ImageCorrupt, match=f"has 7 bytes, its record says {SIZE}"):
        list(transfer_of(Fault(total=7), offset=5))


def test_all_bytes_without_a_proper_end_are_enough(glance: FakeGlance, transfer_of: Make) -> None:
    chunk_head = len(f"{SIZE:x}\r\n")
    assert b"".join(transfer_of(Fault(chunked=True, cut_after=SIZE + chunk_head))) == DATA
    assert len(glance.requests) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_unknown_size_ends_with_the_body(transfer_of: Make, chunked: bool) -> None:
    assert b"".join(transfer_of(Fault(chunked=chunked), size=None)) == DATA


@pytest.mark.parametrize("chunked", [False, True])
def test_unknown_size_is_resumed_too(transfer_of: Make, chunked: bool) -> None:
    assert b"".join(transfer_of(Fault(cut_after=100, chunked=chunked), size=None)) == DATA


def test_unknown_size_complete_already(transfer_of: Make) -> None:
    assert list(transfer_of(size=None, offset=SIZE)) == []


def test_permanent_error_is_not_retried(glance: FakeGlance, transfer_of: Make) -> None:
    with pytest.raises(ImageNotFound):
        list(transfer_of(Fault(cut_after=10), Fault(status=404)))
    assert len(glance.requests) == 2


def test_each_retry_is_one_warning_that_says_why_where_and_when(
    transfer_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "agent"):
        transfer = transfer_of(Fault(cut_after=1000), Fault(status=503))
        assert b"".join(transfer) == DATA
    first, second = caplog.records
    assert {first.levelname, second.levelname} == {"WARNING"}
    for part in ("at byte 1000 of", "attempt 1 of 4", "closed before", "next in 0.5 s"):
        assert part in first.getMessage()
    for part in ("at byte 1000 of", "attempt 2 of 4", "503", "next in 1.0 s"):
        assert part in second.getMessage()


def stalling_transfer(
    glance: FakeGlance, *, cancellation: Cancellation, stall_timeout_s: float = 60
) -> tuple[Transfer, Session]:
    session = Session(auth=NoAuth(endpoint=glance.url), timeout=60)
    source = GlanceSource(session, endpoints=[glance.url], stall_timeout_s=stall_timeout_s)
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(stall_after=1000)] * 100
    return Transfer(source, image, 0, RetryPolicy(), cancellation), session


def test_cancel_wakes_a_read_that_is_blocked(glance: FakeGlance) -> None:
    cancellation = Cancellation()
    transfer, session = stalling_transfer(glance, cancellation=cancellation)
    ended: list[tuple[BootwrightError, float]] = []
    received = threading.Event()

    def read() -> None:
        try:
            for _chunk in transfer:
                received.set()
        except BootwrightError as e:
            ended.append((e, time.monotonic()))

    reader = threading.Thread(target=read)
    reader.start()
    assert received.wait(LIMIT_S)
    time.sleep(0.1)
    reason = Cancelled("somebody asked")
    cancelled_at = time.monotonic()
    cancellation.cancel(reason)
    reader.join(LIMIT_S)
    ((error, ended_at),) = ended
    assert error is reason
    assert ended_at - cancelled_at < AT_ONCE_S
    session.session.close()


def test_stalled_read_ends_at_the_deadline_and_says_what_it_waited_for(
    glance: FakeGlance,
) -> None:
    transfer, session = stalling_transfer(glance, cancellation=Cancellation(0.5))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"waiting for image .* at byte 1000 of {SIZE}"):
        list(transfer)
    assert time.monotonic() - started < AT_ONCE_S
    session.session.close()


SLOW = RetryPolicy(num_retries=2, initial_s=0.01, max_s=0.01, rate_window_s=0.3)


def test_source_that_only_trickles_is_given_up(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(drip=1000)] * 10
    transfer = Transfer(source, image, 0, SLOW, Cancellation())
    started = time.monotonic()
    pieces: list[bytes] = []
    with pytest.raises(ImageSourceUnavailable, match="bytes a second, less than 4096, at byte"):
        pieces.extend(transfer)
    received = b"".join(pieces)
    assert time.monotonic() - started < AT_ONCE_S
    assert DATA.startswith(received)
    assert len(received) > 1000
    assert len(glance.requests) == 3


def test_trickle_of_bytes_that_are_there_already_is_given_up_too(
    glance: FakeGlance, source: GlanceSource
) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(drip=0, ignore_range=True)] * 10
    started = time.monotonic()
    with pytest.raises(ImageSourceUnavailable, match="bytes a second, less than 4096"):
        list(Transfer(source, image, 1 << 20, SLOW, Cancellation()))
    assert time.monotonic() - started < AT_ONCE_S
    assert len(glance.requests) == 3


def test_trickle_that_ends_costs_nothing_but_time(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(drip=1000), Fault(drip=200_000)]
    # So long a window that a source is not given up while the machine has no time for it.
    policy = replace(SLOW, rate_window_s=0.5)
    transfer = Transfer(source, image, 0, policy, Cancellation())
    assert b"".join(transfer) == DATA
    assert transfer.resumes == 2


def test_deadline_ends_a_pause(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(status=503)] * 100
    policy = RetryPolicy(num_retries=50, initial_s=20)
    transfer = Transfer(
        source, image, 0, policy, Cancellation(0.2), uniform=lambda _low, high: high
    )
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="at byte 0 of"):
        list(transfer)
    assert time.monotonic() - started < AT_ONCE_S
    assert len(glance.requests) == 1


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_whoever_waits_for_the_first_byte_is_let_go_at_once(glance: FakeGlance, how: str) -> None:
    session = Session(auth=NoAuth(endpoint=glance.url), timeout=30)
    source = GlanceSource(session, endpoints=[glance.url], stall_timeout_s=30)
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(silent=True)]
    cancellation = Cancellation(None if how == "cancel" else 0.3)
    if how == "cancel":
        threading.Timer(0.3, cancellation.cancel, [Cancelled("somebody asked")]).start()
    started = time.monotonic()
    with pytest.raises((Cancelled, DeadlineExceeded)):
        list(Transfer(source, image, 0, RetryPolicy(), cancellation))
    assert 0.2 < time.monotonic() - started < AT_ONCE_S
    assert len(glance.requests) == 1
    session.session.close()


def test_cancel_before_the_first_byte(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("early"))
    with pytest.raises(Cancelled):
        list(Transfer(source, image, 0, RetryPolicy(), cancellation))
    assert glance.requests == []


def test_cancel_between_two_pieces(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    cancellation = Cancellation()
    chunks = iter(Transfer(source, image, 0, RetryPolicy(), cancellation))
    next(chunks)
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        next(chunks)


class Trickle:
    """An image source whose one body counts how often it is closed."""

    name = "trickle"
    closed = 0

    def get(self, image_id: str) -> Image:
        return Image(id=image_id, name="", source=self.name, status="active", disk_format="raw")

    def open(self, image: Image, offset: int, end: int | None = None) -> Body:  # noqa: ARG002
        return self

    offset = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield b"."

    def close(self) -> None:
        self.closed += 1


def test_slow_reader_is_not_the_sources_fault() -> None:
    source = Trickle()
    policy = RetryPolicy(num_retries=0, rate_window_s=0.2)
    # Each byte comes at once; by the time of the reader, too, it would be ten bytes a second.
    for number, _byte in enumerate(Transfer(source, source.get("x"), 0, policy, Cancellation(60))):
        time.sleep(0.1)
        if number == 5:
            break
    assert source.closed == 1


def test_leaving_the_stream_early_closes_the_body() -> None:
    source = Trickle()
    transfer = Transfer(source, source.get("x"), 0, RetryPolicy(), Cancellation(60))
    before = set(threading.enumerate())
    for _chunk in transfer:
        [alarm] = set(threading.enumerate()) - before
        break
    assert source.closed == 1
    until(lambda: not alarm.is_alive())


def test_record_is_asked_for_again_while_the_source_is_away(
    glance: FakeGlance, source: GlanceSource, pauses: Pauses, caplog: pytest.LogCaptureFixture
) -> None:
    image_id = glance.store(DATA)
    glance.record_fault = Fault(status=503)

    def sleep(seconds: float) -> None:
        pauses.sleep(seconds)
        if len(pauses.seconds) == 2:
            glance.record_fault = None

    image = resolve(
        source, image_id, RetryPolicy(), Cancellation(), sleep=sleep, uniform=pauses.highest
    )
    assert image.size == SIZE
    assert pauses.seconds == [0.5, 1.0]
    assert f"the record of image {image_id} from glance: attempt 2 of 4" in caplog.text


def test_record_of_no_image_is_asked_for_once(
    glance: FakeGlance, source: GlanceSource, pauses: Pauses
) -> None:
    with pytest.raises(ImageNotFound):
        resolve(source, "nothing", RetryPolicy(), Cancellation(), sleep=pauses.sleep)
    assert pauses.seconds == []


def test_record_does_not_come_before_the_deadline(glance: FakeGlance, source: GlanceSource) -> None:
    glance.record_fault = Fault(status=503)
    policy = RetryPolicy(num_retries=50, initial_s=20)
    with pytest.raises(DeadlineExceeded, match="waiting for the record of image x"):
        resolve(source, "x", policy, Cancellation(0.2), uniform=lambda _low, high: high)
