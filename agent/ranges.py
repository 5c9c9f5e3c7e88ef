"""The bytes of one image over several connections, where one of them is the limit.

A proxy, a store or a network may give each connection so much and no more. So
a transfer that mostly waits asks for a part of what lies ahead over another
connection. If that comes, parts are fetched side by side from then on, over
twice the connections as long as that brings something, and handed out in order.

Whatever goes wrong with that, one connection goes on alone. What had come
ahead of its turn is asked for again then, and after a restart of the agent.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from agent.cancellation import Cancellation
from agent.errors import BootwrightError, Cancelled
from agent.image import Image
from agent.transfer import ImageSource, RetryPolicy, Transfer

_LOG = logging.getLogger(__name__)

PART = 4 << 20
"""Bytes asked for at a time. As many parts as connections are in memory, and one more."""
_PIECE = 1 << 20
# How long to watch before anything is changed, and how much longer it must seem
# to take for that to be worth it.
WATCH_S = 2.0
_WORTH_S = 4.0
# Of the time spent waiting for the source: then nothing of ours is the limit.
_STARVED = 0.7
# How much faster twice the connections have to make it, or they are given up.
_GAIN = 1.2


class RangedTransfer:
    """Iterate over it once, in one thread; `received` may be read by any."""

    def __init__(
        self,
        source: ImageSource,
        image: Image,
        offset: int,
        policy: RetryPolicy,
        cancellation: Cancellation,
        *,
        max_connections: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`offset`: how many bytes the caller already has."""
        self._source = source
        self._image = image
        self._position = offset
        self._policy = policy
        self._cancellation = cancellation
        self._max_connections = max_connections
        self._clock = clock
        self._lock = threading.Lock()
        self.received = 0
        """Bytes that came from the source, those received twice included."""

    def __iter__(self) -> Generator[bytes, None, None]:
        """Yield the bytes from `offset` to the end, each once, in order; raises as `Transfer`."""
        with contextlib.closing(self._pieces()) as pieces:
            for piece in pieces:
                self._position += len(piece)
                yield piece

    def _pieces(self) -> Generator[bytes, None, None]:
        size = self._image.size
        if size is None or self._max_connections < 2:
            yield from self._alone()
            return
        with contextlib.closing(self._alone()) as alone:
            rate = yield from self._until_starved(alone, size)
            if rate is None:
                return
            begin = self._position + PART
            with _Ahead(self._fetch, begin, size, self._cancellation) as ahead:
                ahead.ask(1)
                for piece in alone:
                    room = begin - self._position
                    if len(piece) < room:
                        yield piece
                        continue
                    yield piece[:room]
                    # Only when it is known that parts come, the first connection may go.
                    if ahead.comes():
                        break
                    if piece[room:]:
                        yield piece[room:]
                    yield from alone
                    return
                alone.close()
                yield from self._side_by_side(ahead, rate)
        if self._position < size:
            yield from self._alone()

    def _alone(self) -> Generator[bytes, None, None]:
        yield from self._accounted(
            Transfer(self._source, self._image, self._position, self._policy, self._cancellation)
        )

    def _accounted(self, transfer: Transfer) -> Generator[bytes, None, None]:
        counted = 0
        with contextlib.closing(iter(transfer)) as pieces:
            for piece in pieces:
                with self._lock:
                    self.received += transfer.received - counted
                counted = transfer.received
                yield piece
        with self._lock:
            self.received += transfer.received - counted

    def _fetch(self, begin: int, end: int, cancellation: Cancellation) -> bytearray:
        """Return a part; in a thread of its own."""
        # One connection more is a favour: who refuses it need not be asked often.
        policy = dataclasses.replace(self._policy, num_retries=1)
        part = bytearray()
        for piece in self._accounted(
            Transfer(self._source, self._image, begin, policy, cancellation, end=end)
        ):
            part += piece
        return part

    def _until_starved(
        self, alone: Generator[bytes, None, None], size: int
    ) -> Generator[bytes, None, float | None]:
        """Yield what comes; return bytes a second, when it is worth to have it faster."""
        began, waited, received = self._clock(), 0.0, 0
        while True:
            asked = self._clock()
            piece = next(alone, None)
            if piece is None:
                return None
            now = self._clock()
            waited += now - asked
            received += len(piece)
            yield piece
            if now - began < WATCH_S:
                continue
            rate = received / (now - began)
            rest = size - self._position
            starved = waited > _STARVED * (now - began)
            if starved and rest > max(2 * PART, rate * _WORTH_S):
                return rate
            began, waited, received = self._clock(), 0.0, 0

    def _side_by_side(self, ahead: "_Ahead", rate: float) -> Generator[bytes, None, None]:
        """Yield parts until the end, or until one connection does as well."""
        width = min(2, self._max_connections)
        growing = True
        began, waited, received = self._clock(), 0.0, 0
        while ahead.ask(width):
            asked = self._clock()
            try:
                part = ahead.take()
            except BootwrightError as e:
                self._cancellation.check()
                _LOG.warning("image %s: one connection goes on alone: %s", self._image.id, e)
                return
            ahead.ask(width)
            now = self._clock()
            waited += now - asked
            received += len(part)
            yield from _pieces_of(part)
            if not growing or now - began < WATCH_S:
                continue
            before, rate = rate, received / (now - began)
            starved = waited > _STARVED * (now - began)
            if rate < before * _GAIN:
                growing, width = False, width // 2
            elif starved and width < self._max_connections:
                width = min(2 * width, self._max_connections)
            else:
                growing = False
            _LOG.info(
                "image %s comes at %.1f MiB/s; connections from now on: %d",
                self._image.id,
                rate / (1 << 20),
                width,
            )
            if width == 1:
                while ahead.comes():
                    yield from _pieces_of(ahead.take())
                return
            began, waited, received = self._clock(), 0.0, 0


def _pieces_of(part: bytearray) -> Generator[bytes, None, None]:
    view = memoryview(part)
    for at in range(0, len(part), _PIECE):
        yield bytes(view[at : at + _PIECE])


class _Ahead:
    """Parts that are being fetched, in order; a context manager that gives up the others."""

    def __init__(
        self,
        fetch: Callable[[int, int, Cancellation], bytearray],
        begin: int,
        size: int,
        cancellation: Cancellation,
    ) -> None:
        self._fetch = fetch
        self._next = begin
        self._size = size
        # Of its own, to end what nobody waits for any more; the deadline is the job's.
        self._cancellation = Cancellation(cancellation.remaining())
        self._forget = cancellation.on_cancel(self._give_up)
        self._pool = ThreadPoolExecutor(thread_name_prefix="image-part")
        self._parts: deque[Future[bytearray]] = deque()

    def ask(self, width: int) -> bool:
        """Have so many parts fetched at a time; return whether there is one to `take`."""
        while len(self._parts) < width and self._next < self._size:
            end = min(self._next + PART, self._size)
            self._parts.append(self._pool.submit(self._fetch, self._next, end, self._cancellation))
            self._next = end
        return bool(self._parts)

    def comes(self) -> bool:
        """Wait for the next part; return whether there is one to `take`."""
        return bool(self._parts) and self._parts[0].exception() is None

    def take(self) -> bytearray:
        """Return the next part.

        Raises:
            BootwrightError: as `Transfer`.
        """
        return self._parts.popleft().result()

    def _give_up(self) -> None:
        self._cancellation.cancel(Cancelled("nobody waits for this part of the image"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._forget()
        self._give_up()
        self._pool.shutdown(cancel_futures=True)
