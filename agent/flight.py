"""A flight: one image on its way into the cache, and everybody who waits for it.

It has no owner. Whoever wants the image takes a seat; those who wait leave one
by one, on their own cancel or deadline, without a word to the others; the last
one out ends the flight. Those who demand other proof of the image's signature
wait on another one.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from agent.base import Base, check_fits
from agent.cancellation import Cancellation
from agent.errors import BootwrightError, Cancelled, FlavorDiskSmallerThanImage
from agent.image import Image
from agent.ingest import Advance
from agent.proof import Demand
from agent.report import Progress, TaskState
from agent.views import Fetch

# How often a waiting caller is told how far it is.
TICK_S = 0.25
RATE_WINDOW_S = 5.0


class Seat:
    """One caller's place on a flight."""

    def __init__(self, max_virtual_size: int | None, *, first: bool) -> None:
        self.max_virtual_size = max_virtual_size
        self.first = first
        self.error: FlavorDiskSmallerThanImage | None = None


class Flight:
    def __init__(self, image: Image, demand: Demand | None = None) -> None:
        self.image = image
        self.demand = demand
        self.cancellation = Cancellation()
        self.landed = threading.Event()
        self._changed = threading.Condition()
        self._seats: set[Seat] = set()
        self._boarded = 0
        self._virtual_size: int | None = None
        self._advance: Advance | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=int(RATE_WINDOW_S / TICK_S))
        self._outcome: Base | BootwrightError | None = None
        # Nobody's disk is large enough: it ends, however many come now.
        self._too_large = False

    # Those who wait

    def board(self, max_virtual_size: int | None) -> Seat | None:
        """Take a seat; None if the flight is being given up and another one is needed."""
        with self._changed:
            if self.cancellation.cancelled or self._too_large:
                return None
            seat = Seat(max_virtual_size, first=self._boarded == 0)
            self._boarded += 1
            self._seats.add(seat)
            self._refuse_if_too_small(seat)
            return seat

    def wait(
        self,
        seat: Seat,
        cancellation: Cancellation,
        on_progress: Callable[[Progress], None],
    ) -> Base:
        """Return what the flight brought.

        Raises:
            FlavorDiskSmallerThanImage: the image turned out too large for this seat.
            BootwrightError: what the flight failed with, or what this caller's
                own cancellation says.
        """
        forget = cancellation.on_cancel(self._wake)
        on_progress(Progress(phase=TaskState.IMAGE_DOWNLOADING, bytes_total=self.image.size))
        try:
            while True:
                with self._changed:
                    outcome = self._outcome
                    if outcome is None and seat.error is None and not cancellation.cancelled:
                        remaining = cancellation.remaining()
                        self._changed.wait(TICK_S if remaining is None else min(TICK_S, remaining))
                        outcome = self._outcome
                    progress = self._progress()
                if seat.error is not None:
                    raise seat.error
                if outcome is not None:
                    return self._arrive(seat, outcome)
                cancellation.check()
                if progress is not None:
                    on_progress(progress)
        finally:
            forget()
            self._leave(seat)

    def _arrive(self, seat: Seat, outcome: Base | BootwrightError) -> Base:
        if isinstance(outcome, BootwrightError):
            if self._virtual_size is not None:
                check_fits(self.image, self._virtual_size, seat.max_virtual_size)
            # One exception object raised in many threads would mix up their tracebacks.
            raise type(outcome)(outcome.message, outcome.hint) from outcome
        return outcome if seat.first else replace(outcome, received=0, resumed=0)

    def _leave(self, seat: Seat) -> None:
        with self._changed:
            self._seats.discard(seat)
            if not self._seats and self._outcome is None:
                # Under the lock: nobody may board what is being given up.
                reason = f"nobody waits for image {self.image.id} any more"
                self.cancellation.cancel(Cancelled(reason))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _progress(self) -> Progress | None:
        advance = self._advance
        if advance is None:
            return None
        now = time.monotonic()
        if not self._samples or now - self._samples[-1][0] >= TICK_S:
            self._samples.append((now, advance.done))
        since, done = self._samples[0]
        rate = (advance.done - done) / (now - since) if now > since else 0.0
        return Progress(
            phase=advance.phase,
            bytes_done=advance.done,
            bytes_total=advance.total,
            rate=max(0.0, rate) if advance.phase is TaskState.IMAGE_DOWNLOADING else 0.0,
            last_byte_at=advance.at,
        )

    def describe(self) -> Fetch:
        with self._changed:
            progress = self._progress()
            waiters = len(self._seats)
        if progress is None:
            return Fetch(image_id=self.image.id, waiters=waiters)
        return Fetch(
            image_id=self.image.id,
            bytes_done=progress.bytes_done,
            bytes_total=progress.bytes_total,
            rate=progress.rate,
            waiters=waiters,
        )

    # The flight's own thread

    def header_seen(self, virtual_size: int) -> None:
        """Turn away those whose disk is too small.

        Raises:
            FlavorDiskSmallerThanImage: nobody remains.
        """
        with self._changed:
            self._virtual_size = virtual_size
            limits = [seat.max_virtual_size for seat in self._seats]
            largest = math.inf if None in limits else max(filter(None, limits), default=math.inf)
            if virtual_size > largest:
                self._too_large = True
                # They hear of it when the flight has landed and its partial is gone.
                check_fits(self.image, virtual_size, int(largest))
            for seat in self._seats:
                self._refuse_if_too_small(seat)
            self._changed.notify_all()

    def _refuse_if_too_small(self, seat: Seat) -> None:
        if self._virtual_size is None:
            return
        try:
            check_fits(self.image, self._virtual_size, seat.max_virtual_size)
        except FlavorDiskSmallerThanImage as e:
            seat.error = e

    def advance(self, advance: Advance) -> None:
        """Note how far it is; whoever waits looks at it in its own time."""
        self._advance = advance

    def land(self, outcome: Base | BootwrightError) -> None:
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()
        self.landed.set()
