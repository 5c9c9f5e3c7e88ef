"""Images over several connections, from a source that gives each of them little."""

import hashlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from agent.cancellation import Cancellation
from agent.errors import Cancelled, ImageSourceUnavailable
from agent.image import Image
from agent.ranges import PART, RangedTransfer, _Ahead
from agent.transfer import RetryPolicy

MIB = 1 << 20
SIZE = 64 * MIB + 12345
DATA = random.Random(3).randbytes(SIZE)
IMAGE = Image(id="x", name="", source="slow", status="active", disk_format="raw", size=SIZE)
PIECE = 128 << 10


class Wire:
    """What all connections share; time is what has gone over it, and nothing else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0

    def carry(self, seconds: float, _closed: threading.Event) -> None:
        with self._lock:
            self._seconds += seconds

    def clock(self) -> float:
        return self._seconds


_WAITS = {inspect.getfile(_Ahead), inspect.getfile(Future)}
"""The files of the functions in which the reader waits for a part."""


class Lanes:
    """One for each connection; time passes when there is nothing else left to do.

    That is when all connections wait for what comes next over their lanes, and the reader for
    one of them. So it passes in the same way in each run, whatever else the machine does.
    """

    def __init__(self) -> None:
        self._reader = threading.get_ident()
        self._changed = threading.Condition()
        self._seconds = 0.0
        self._due: dict[int, float] = {}
        """When the piece comes that a thread waits for."""

    def carry(self, seconds: float, closed: threading.Event) -> None:
        thread = threading.get_ident()
        with self._changed:
            due = self._due[thread] = self._seconds + seconds
            while self._seconds < due and not closed.is_set():
                if self._all_wait():
                    self._seconds = min(self._due.values())
                    self._changed.notify_all()
                if self._seconds < due:
                    self._changed.wait(0.001)
            del self._due[thread]

    def clock(self) -> float:
        return self._seconds

    def _all_wait(self) -> bool:
        """Whether the reader waits, and each part it has asked for; its stack tells for what."""
        parts: set[Future[bytearray]] = set()
        reader_waits = self._reader in self._due
        frame = sys._current_frames().get(self._reader)
        while frame is not None:
            known = frame.f_locals.values() if frame.f_code.co_filename in _WAITS else ()
            for value in known:
                if isinstance(value, _Ahead):
                    parts.update(value._parts)
                elif isinstance(value, Future):
                    parts.add(value)
                    reader_waits = reader_waits or not value.done()
            frame = frame.f_back
        coming = sum(not part.done() for part in parts)
        return reader_waits and coming == len(self._due.keys() - {self._reader})


class Slow:
    """A source that sends so many MiB a second to each connection, or to all together."""

    name = "slow"

    def __init__(self, rate: float, *, shared: bool = False, ranges: bool = True) -> None:
        self.pause = PIECE / MIB / rate
        self.way = Wire() if shared else Lanes()
        self.ranges = ranges
        self.asked: list[tuple[int, int | None]] = []
        self.breaks: Callable[[int, int], bool] = lambda _begin, _position: False
        """Whether the answer that begins there breaks off at a position."""
        self.lock = threading.Lock()
        self.opened = 0
        self.most_opened = 0

    def get(self, image_id: str) -> Image:
        raise NotImplementedError

    def open(self, image: Image, offset: int, end: int | None = None) -> "SlowBody":  # noqa: ARG002
        with self.lock:
            self.asked.append((offset, end))
            self.opened += 1
            self.most_opened = max(self.most_opened, self.opened)
        if not self.ranges:
            return SlowBody(self, 0, SIZE)
        return SlowBody(self, offset, end or SIZE)

    @property
    def parts(self) -> list[tuple[int, int]]:
        return [(begin, end) for begin, end in self.asked if end is not None]


class SlowBody:
    def __init__(self, source: Slow, offset: int, end: int) -> None:
        self.offset = offset
        self._source = source
        self._end = end
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for position in range(self.offset, self._end, PIECE):
            self._source.way.carry(self._source.pause, self._closed)
            if self._closed.is_set():
                raise ImageSourceUnavailable("closed")
            if self._source.breaks(self.offset, position):
                raise ImageSourceUnavailable("broken off")
            yield DATA[position : min(position + PIECE, self._end)]

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            with self._source.lock:
                self._source.opened -= 1


def transfer_of(
    source: Slow,
    *,
    offset: int = 0,
    max_connections: int = 4,
    cancellation: Cancellation | None = None,
) -> RangedTransfer:
    return RangedTransfer(
        source,
        IMAGE,
        offset,
        RetryPolicy(num_retries=2, initial_s=0.01, max_s=0.01),
        cancellation or Cancellation(),
        max_connections=max_connections,
        clock=source.way.clock,
    )


def assert_whole(transfer: RangedTransfer, source: Slow, offset: int = 0) -> None:
    digest = hashlib.sha256()
    count = 0
    for piece in transfer:
        assert 0 < len(piece) <= MIB
        digest.update(piece)
        count += len(piece)
    assert count == SIZE - offset
    assert digest.digest() == hashlib.sha256(DATA[offset:]).digest()
    assert source.opened == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("image-part")]


@pytest.mark.parametrize("max_connections", [2, 4])
def test_a_connection_that_is_the_limit_gets_company(max_connections: int) -> None:
    source = Slow(4)
    transfer = transfer_of(source, max_connections=max_connections)
    assert_whole(transfer, source)
    assert source.most_opened == max_connections
    # Nothing was asked for twice, but for what the first connection had under way.
    assert SIZE <= transfer.received < SIZE + MIB
    parts = sorted(source.parts)  # two that are asked for at one time may overtake each other
    assert [begin for begin, _end in parts[1:]] == [end for _, end in parts[:-1]]
    assert all(end - begin <= PART for begin, end in parts)


def test_it_goes_on_in_the_middle() -> None:
    source = Slow(4)
    assert_whole(transfer_of(source, offset=4 * MIB + 1), source, 4 * MIB + 1)
    assert source.parts


@pytest.mark.parametrize(
    ("rate", "max_connections"), [pytest.param(40, 4, id="fast"), pytest.param(4, 1, id="one")]
)
def test_one_request_where_more_would_not_pay(rate: float, max_connections: int) -> None:
    source = Slow(rate, shared=True)
    assert_whole(transfer_of(source, max_connections=max_connections), source)
    assert source.asked == [(0, None)]


def test_a_consumer_that_is_the_limit_is_not_helped() -> None:
    source = Slow(4, shared=True)
    for _ in transfer_of(source):
        source.way.carry(source.pause, threading.Event())  # as long as the piece took to come
    assert source.asked == [(0, None)]


def test_a_source_without_ranges_is_read_on_over_the_first_connection() -> None:
    source = Slow(4, ranges=False)
    transfer = transfer_of(source)
    assert_whole(transfer, source)
    assert source.asked[0] == (0, None)
    assert [begin for begin, _end in source.asked[1:]] == [source.asked[1][0]] * 2
    assert transfer.received == SIZE


def test_connections_that_bring_nothing_are_given_up() -> None:
    source = Slow(4, shared=True)
    assert_whole(transfer_of(source), source)
    assert source.most_opened == 2
    assert source.asked[-1][1] is None


def test_a_part_that_breaks_off_is_gone_on_with_at_the_byte() -> None:
    source = Slow(4)
    broken: list[int] = []

    def breaks(begin: int, position: int) -> bool:
        if len(source.parts) > 2 and not broken and position == begin + 5 * PIECE:
            broken.append(position)
            return True
        return False

    source.breaks = breaks
    transfer = transfer_of(source)
    assert_whole(transfer, source)
    assert [begin for begin, _end in source.parts if begin % PART == broken[0] % PART]
    assert SIZE <= transfer.received < SIZE + MIB


def test_when_parts_come_no_more_one_connection_goes_on() -> None:
    source = Slow(4)
    source.breaks = lambda begin, _position: begin > 40 * MIB and source.asked[-1][1] is not None
    assert_whole(transfer_of(source), source)
    begin, end = source.asked[-1]
    assert end is None
    assert begin > PART


def test_a_cancel_ends_all_connections_with_its_reason() -> None:
    source = Slow(1)
    cancellation = Cancellation()
    pieces = iter(transfer_of(source, cancellation=cancellation))
    while len(source.parts) < 3:
        next(pieces)
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled, match="enough"):
        list(pieces)
    assert source.opened == 0


def test_giving_up_ends_all_connections() -> None:
    source = Slow(4)
    pieces = iter(transfer_of(source))
    while len(source.parts) < 3:
        next(pieces)
    pieces.close()
    assert source.opened == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("image-part")]
