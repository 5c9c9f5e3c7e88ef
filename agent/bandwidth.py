"""A limit on what all fetches together receive.

A token bucket that may be overdrawn: bytes that have come are paid for
afterwards, by waiting, in the order in which they came. What is not read in the
meantime waits in the socket, and TCP slows the sender down.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from agent.image import Image
from agent.transfer import Body, ImageSource

# What an idle line has saved up, in seconds: little enough that no second ever
# sees much more than the limit.
_BURST_S: Final = 0.1


class Bandwidth:
    """May be shared by any number of threads."""

    def __init__(self, bytes_per_s: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_until = clock()

    def take(self, size: int) -> float:
        """Account for bytes that have come; return the seconds to wait until they are paid for."""
        with self._lock:
            now = self._clock()
            self._paid_until = max(self._paid_until, now - _BURST_S) + size / self._rate
            return max(0.0, self._paid_until - now)


class Limited:
    """An image source that keeps to a limit; see `agent.transfer.ImageSource`."""

    def __init__(self, source: ImageSource, bandwidth: Bandwidth) -> None:
        self._source = source
        self._bandwidth = bandwidth

    @property
    def name(self) -> str:
        return self._source.name

    def get(self, image_id: str) -> Image:
        return self._source.get(image_id)

    def open(self, image: Image, offset: int, end: int | None = None) -> "_LimitedBody":
        return _LimitedBody(self._source.open(image, offset, end), self._bandwidth)


class _LimitedBody:
    def __init__(self, body: Body, bandwidth: Bandwidth) -> None:
        self._body = body
        self._bandwidth = bandwidth
        self._closed = threading.Event()

    @property
    def offset(self) -> int:
        return self._body.offset

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._body:
            # A close ends the wait. The body under it says that it was closed.
            self._closed.wait(self._bandwidth.take(len(piece)))
            yield piece

    def close(self) -> None:
        self._closed.set()
        self._body.close()
