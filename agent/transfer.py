"""The bytes of one image as one unbroken stream, however often the source breaks.

A `Transfer` asks an image source for the bytes from some offset on, and when
they stop coming asks again for what is missing. It knows nothing of hashes,
formats or files, and nothing of HTTP: an image source reports every trouble
that may pass as `ImageSourceUnavailable`, and everything else is final.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import tenacity

from agent import errand
from agent.cancellation import Cancellation
from agent.errors import DeadlineExceeded, ImageCorrupt, ImageSourceUnavailable
from agent.image import Image

_LOG = logging.getLogger(__name__)

_T = TypeVar("_T")


class Body(Protocol):
    """The answer to one request for bytes; read by one thread."""

    @property
    def offset(self) -> int:
        """Where in the image the first byte stands; 0 if the source ignored the range."""

    def __iter__(self) -> Iterator[bytes]:
        """The bytes in pieces of at most 1 MiB, each as soon as it is there.

        Raises:
            ImageSourceUnavailable: they stopped coming before their end.
        """

    def close(self) -> None:
        """Give up. Any thread may call it; a read that is blocked in another one ends."""


class ImageSource(Protocol):
    """Where images come from. Threads may share it."""

    @property
    def name(self) -> str:
        """`glance` or `directory`."""

    def get(self, image_id: str) -> Image:
        """Return the record of an image, whatever its status.

        Raises:
            ImageNotFound, ImageNotAuthorized, ImageCorrupt: for good.
            ImageSourceUnavailable: it may work another time.
        """

    def open(self, image: Image, offset: int, end: int | None = None) -> Body:
        """Ask for the bytes from `offset` on, which is less than the image's size.

        Those from `end` on are not wanted, but may come all the same.

        Raises:
            ImageNotFound, ImageNotActive, ImageNotAuthorized, ImageCorrupt: for good.
            ImageSourceUnavailable: it may work another time.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long to believe in an image source that brings nothing."""

    num_retries: int = 3
    """In a row, each without a single new byte; a new byte starts the count anew."""
    initial_s: float = 0.5
    """The first pause is anything up to this; each further one up to twice the last."""
    max_s: float = 30.0
    """No pause is longer, not even one the image source asked for."""
    least_rate: int = 4096
    """Bytes a second; one that brings less on average is as good as away."""
    rate_window_s: float = 30.0
    """Seconds of waiting for it over which the average is taken."""


def resolve(
    source: ImageSource,
    image_id: str,
    policy: RetryPolicy,
    cancellation: Cancellation,
    *,
    sleep: Callable[[float], None] | None = None,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Image:
    """Return the record of an image, asking again while the source is unavailable.

    Raises:
        ImageNotFound, ImageNotAuthorized, ImageCorrupt: as the source says.
        ImageSourceUnavailable: the last attempt's, when the retries are used up.
        DeadlineExceeded, or the reason of the cancel.
    """
    return persistently(
        lambda: source.get(image_id),
        f"the record of image {image_id} from {source.name}",
        policy,
        cancellation,
        sleep=sleep,
        uniform=uniform,
    )


def persistently(
    get: Callable[[], _T],
    what: str,
    policy: RetryPolicy,
    cancellation: Cancellation,
    *,
    limit_s: float | None = None,
    sleep: Callable[[float], None] | None = None,
    uniform: Callable[[float, float], float] = random.uniform,
) -> _T:
    """Return what `get` does, calling it again while that raises `ImageSourceUnavailable`.

    A call that takes longer than `limit_s` counts as that. One that is under way at a cancel
    or the deadline is left alone in its thread.

    Raises:
        ImageSourceUnavailable: the last attempt's, when the retries are used up.
        DeadlineExceeded, or the reason of the cancel.
    """
    retrying = _retrying(policy, sleep or cancellation.wait, uniform, lambda: what)

    def attempt() -> _T:
        try:
            return errand.run(get, cancellation, limit_s=limit_s)
        except TimeoutError as e:
            raise ImageSourceUnavailable(f"{what}: {e}") from e

    try:
        return retrying(attempt)
    except DeadlineExceeded as e:
        raise _late(e, what) from e


class Transfer:
    """Iterate over it once, in one thread; `received` and `resumes` may be read by any."""

    def __init__(
        self,
        source: ImageSource,
        image: Image,
        offset: int,
        policy: RetryPolicy,
        cancellation: Cancellation,
        *,
        end: int | None = None,
        sleep: Callable[[float], None] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`offset`: how many bytes the caller already has.

        `end`: where to stop, if not at the image's end; then a source that
        sends from elsewhere than `offset` is one that is not available.
        `sleep` and `uniform` are for tests: the default sleeps on the
        cancellation, which ends a pause at once.
        """
        self._source = source
        self._image = image
        self._cancellation = cancellation
        self._position = offset
        self._part = end is not None
        self._end = image.size if end is None else end
        self._retrying = _retrying(policy, sleep or cancellation.wait, uniform, self._waits_for)
        self._opened: _Opened | None = None
        self._gap_seen = False
        self._attempts = 0
        self._policy = policy
        self._pace = _Pace(policy)
        self._slow = 0
        self.received = 0
        """Bytes that came from the source, those received twice included."""
        self.resumes = 0
        """How many times the source has been asked again."""

    def __iter__(self) -> Generator[bytes, None, None]:
        """Yield the bytes from `offset` to `end`, each once, in order.

        Raises:
            ImageCorrupt: the source has more bytes than the record says.
            ImageNotFound, ImageNotActive, ImageNotAuthorized: as the source says.
            ImageSourceUnavailable: the last attempt's, when the retries are used up.
            DeadlineExceeded, or the reason of the cancel.
        """
        try:
            # One call is one run of attempts for one new piece, so tenacity's
            # own count and backoff start anew with each piece that came. A
            # call costs 9 us against some 700 us that the piece takes to come.
            while chunk := self._retrying(self._next):
                yield chunk
                self._judge_pace()
        except DeadlineExceeded as e:
            raise _late(e, self._waits_for()) from e
        finally:
            self._close()

    def _next(self) -> bytes:
        """Return bytes the caller has not had; none if the image is complete."""
        size = self._end
        self._cancellation.check()
        if self._opened is None and self._position == size:
            return b""
        try:
            opened = self._opened or self._open()
            for chunk in self._pace.timed(opened.chunks):
                self.received += len(chunk)
                new = chunk[max(0, self._position - opened.position) :]
                opened.position += len(chunk)
                if self._part:
                    new = new[: (size or 0) - self._position]
                    if self._position == size:
                        return b""
                if not new:
                    rate = self._pace.rate()
                    if rate is not None and rate < self._policy.least_rate:
                        raise self._trickle(rate)
                    continue
                if size is not None and self._position + len(new) > size:
                    raise ImageCorrupt(
                        f"image {self._image.id} goes on after its {size} bytes: "
                        f"{self._source.name} sends more than its record says",
                        "the record or the data is damaged: upload the image anew",
                    )
                self._position += len(new)
                return new
            if size is None or self._position == size:
                return b""
            raise ImageSourceUnavailable(
                f"{self._source.name} ended the transfer after byte {self._position} of {size}"
            )
        except ImageSourceUnavailable:
            self._close()
            # A body that was closed because of a cancel or the deadline looks
            # just like a broken one.
            self._cancellation.check()
            if self._position == size:
                return b""  # nothing was missing but the end of the answer
            raise

    def _judge_pace(self) -> None:
        """Give up an answer that only trickles, and in the end the source.

        New bytes come, so without this it could go on for ever and hold its place.
        """
        rate = self._pace.rate()
        if rate is None:
            return
        if rate >= self._policy.least_rate:
            self._slow = 0
            return
        self._slow += 1
        if self._slow > self._policy.num_retries:
            raise self._trickle(rate)
        _LOG.warning("%s; asking it again", self._trickle(rate).message)
        self._close()

    def _trickle(self, rate: float) -> ImageSourceUnavailable:
        return ImageSourceUnavailable(
            f"{self._source.name} sends image {self._image.id} at {rate:.0f} bytes a second, less "
            f"than {self._policy.least_rate}, at byte {self._position}",
            "look what slows it down, on the way or in its store",
        )

    def _open(self) -> "_Opened":
        if self._attempts:
            self.resumes += 1
        self._attempts += 1
        asked = 0 if self._gap_seen else self._position
        body = errand.run(
            lambda: self._source.open(self._image, asked, self._end if self._part else None),
            self._cancellation,
            discard=lambda late: late.close(),
        )
        self._opened = _Opened(body, self._cancellation)
        if self._part and body.offset != asked:
            raise ImageSourceUnavailable(
                f"{self._source.name} sends no parts of image {self._image.id}"
            )
        if body.offset > self._position:
            self._gap_seen = True
            raise ImageSourceUnavailable(
                f"{self._source.name} was asked for the bytes of image {self._image.id} from "
                f"{asked} on and sent those from {body.offset} on"
            )
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _waits_for(self) -> str:
        size = "an unknown size" if self._image.size is None else f"{self._image.size}"
        return (
            f"image {self._image.id} from {self._source.name}, at byte {self._position} of {size}"
        )


class _Pace:
    """How fast a source is, by the time that is spent waiting for it and for nothing else."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._window_s = policy.rate_window_s
        self._waited = 0.0
        self._received = 0

    def timed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            began = time.monotonic()
            chunk = next(chunks, b"")
            self._waited += time.monotonic() - began
            self._received += len(chunk)
            if not chunk:
                return
            yield chunk

    def rate(self) -> float | None:
        """Return bytes a second, once in a window."""
        if self._waited < self._window_s:
            return None
        rate = self._received / self._waited
        self._waited, self._received = 0.0, 0
        return rate


class _Opened:
    """A body together with what closes it when its time is over."""

    def __init__(self, body: Body, cancellation: Cancellation) -> None:
        self.chunks = iter(body)
        self.position = body.offset
        self._body = body
        # A read that waits for the next byte is woken by closing the body: by
        # the cancel itself, and at the deadline by a timer, since a deadline
        # calls nobody.
        self._alarm: threading.Timer | None = None
        remaining = cancellation.remaining()
        if remaining is not None:
            self._alarm = threading.Timer(min(remaining, threading.TIMEOUT_MAX), body.close)
            self._alarm.daemon = True
            self._alarm.start()
        self._forget = cancellation.on_cancel(body.close)

    def close(self) -> None:
        self._forget()
        if self._alarm is not None:
            self._alarm.cancel()
        self._body.close()


def _late(error: DeadlineExceeded, waited_for: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{error.message}; it was waiting for {waited_for}", error.hint)


def _retrying(
    policy: RetryPolicy,
    sleep: Callable[[float], None],
    uniform: Callable[[float, float], float],
    waits_for: Callable[[], str],
) -> tenacity.Retrying:
    def pause(state: tenacity.RetryCallState) -> float:
        # Full jitter: a fleet of hosts that lost Glance together must not come
        # back together.
        window = min(policy.max_s, policy.initial_s * 2.0 ** min(state.attempt_number - 1, 32))
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, ImageSourceUnavailable) else None
        return min(policy.max_s, max(uniform(0, window), asked or 0.0))

    def warn(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _LOG.warning(
            "%s: attempt %d of %d for a new byte: %s; next in %.1f s",
            waits_for(),
            state.attempt_number,
            policy.num_retries + 1,
            error.message if isinstance(error, ImageSourceUnavailable) else error,
            state.upcoming_sleep,
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ImageSourceUnavailable),
        stop=tenacity.stop_after_attempt(policy.num_retries + 1),
        wait=pause,
        sleep=sleep,
        before_sleep=warn,
        reraise=True,
    )
