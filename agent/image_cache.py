"""The image cache: verified bases, each fetched once, whoever asks and however many.

`acquire` is the only door. It answers from the cache, or joins the flight that
is fetching the image, or starts one. A flight has a thread of its own and no
owner: those who wait for it may leave one by one, and the last one out ends it.

Flights with different demands of a signature do not share an outcome: one image
may be good enough for one job and not for the other.

How a base comes to be is `agent.base_maker`'s business, how it lies on disk
`agent.store`'s, who keeps it there `agent.usage`'s, and how it goes
`agent.pruner`'s. A base is never changed.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from agent import logs, metrics, transfer
from agent.base import Base, check_fits
from agent.base_maker import BaseMaker
from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    ImageSourceUnavailable,
    InternalError,
)
from agent.flight import Flight, Seat
from agent.image import Image
from agent.manifest import base_name
from agent.proof import Demand
from agent.report import Progress
from agent.signatures import Signatures
from agent.store import Store
from agent.transfer import ImageSource, RetryPolicy
from agent.usage import Usage
from agent.views import Fetch

LOG = logging.getLogger(__name__)


class ImageCache:
    """May be shared by any number of threads."""

    def __init__(
        self,
        store: Store,
        usage: Usage,
        maker: BaseMaker,
        *,
        source: ImageSource,
        signatures: Signatures,
        policy: RetryPolicy,
    ) -> None:
        self._store = store
        self._usage = usage
        self._maker = maker
        self._source = source
        self._signatures = signatures
        self._policy = policy
        self._lock = threading.Lock()
        self._flights: dict[tuple[str, Demand | None], Flight] = {}
        self._closing = False

    # Asking

    def resolve(self, image_id: str, cancellation: Cancellation) -> Image:
        """Return the image's record: the source's, or the cached one while that is away.

        Raises:
            ImageError: as the source says it.
        """
        cached = self._store.find(base_name(image_id))
        if cached is None:
            return transfer.resolve(self._source, image_id, self._policy, cancellation)
        try:
            return self._source.get(image_id)
        except ImageSourceUnavailable as e:
            LOG.warning(
                "%s; image %s is in the cache, verified, and is used as it was known",
                e.message,
                image_id,
            )
            return cached.manifest.image

    def has(self, image_id: str) -> bool:
        """Whether there is a base of the image, the file that was verified."""
        entry = self._store.find(base_name(image_id))
        return entry is not None and entry.recognised

    def acquire(
        self,
        image: Image,
        *,
        pin: str,
        max_virtual_size: int | None,
        trusted: Sequence[str] = (),
        cancellation: Cancellation,
        on_progress: Callable[[Progress], None],
    ) -> Base:
        """Return the base of `image`, pinned by `pin` until `unpin`.

        `max_virtual_size`: bytes; what the caller's disk will hold, None if it
        takes any size. `trusted`: ids of certificates one of which must have
        issued the one that the image is signed with; without any, the
        configuration says what is demanded. `on_progress` is called now and then while the image is
        being fetched.

        Raises:
            FlavorDiskSmallerThanImage: the image's virtual size is larger.
            ImageUnacceptable: its signature is demanded, and wrong or missing.
            ImageError, InsufficientFreeSpace, BackendError: no base could be made.
            BootwrightError: what the cancellation was given.
        """
        # Before the look, so that no removal can come between.
        self._usage.pin(base_name(image.id), pin)
        demand = self._signatures.demand(trusted)
        base = self._acquire(image, demand, max_virtual_size, cancellation, on_progress)
        check_fits(image, base.virtual_size, max_virtual_size)
        return base

    def unpin(self, pin: str) -> None:
        """Give up every base that `pin` holds."""
        self._usage.unpin(pin)

    def _acquire(
        self,
        image: Image,
        demand: Demand | None,
        max_virtual_size: int | None,
        cancellation: Cancellation,
        on_progress: Callable[[Progress], None],
    ) -> Base:
        while True:
            boarded = self._lookup_or_board(image, demand, max_virtual_size)
            if isinstance(boarded, Base):
                return boarded
            flight, seat = boarded
            if seat is not None:
                return flight.wait(seat, cancellation, on_progress)
            # Everybody else has just left it, and it ends as soon as it can.
            flight.landed.wait(0.05)
            cancellation.check()

    def _lookup_or_board(
        self, image: Image, demand: Demand | None, max_virtual_size: int | None
    ) -> Base | tuple[Flight, Seat | None]:
        key = (base_name(image.id), demand)
        with self._lock:
            if self._closing:
                raise AgentStopping("the agent is stopping")
            base = self._maker.ready(image, demand)
            if base is not None:
                metrics.IMAGE_REQUESTS.labels(result="hit").inc()
                return base
            flight = self._flights.get(key)
            if flight is not None:
                metrics.IMAGE_REQUESTS.labels(result="joined").inc()
                return flight, flight.board(max_virtual_size)
            flight = Flight(image, demand)
            seat = flight.board(max_virtual_size)
            thread = threading.Thread(target=self._fly, args=(flight,), name=f"fetch-{image.id}")
            try:
                thread.start()
            except RuntimeError as e:
                raise BackendError(
                    f"fetching image {image.id}: {e}",
                    "the host has no memory or no process left for the agent (TasksMax=)",
                ) from e
            # Only now: nobody would ever land one that did not take off.
            self._flights[key] = flight
            return flight, seat

    def _fly(self, flight: Flight) -> None:
        """Run a flight from take-off to landing; the body of its thread."""
        image = flight.image
        outcome: Base | BootwrightError
        with logs.bind(image_id=image.id):
            try:
                outcome = self._maker.make(flight)
            except BootwrightError as e:
                outcome = e
            except Exception as e:
                LOG.exception("fetching image %s failed by a defect of ours", image.id)
                outcome = InternalError(
                    f"fetching image {image.id} failed: {e!r}",
                    "the traceback is in the agent's log",
                )
        with self._lock:
            # Gone before it lands: whoever asks from now on looks again.
            del self._flights[(base_name(image.id), flight.demand)]
        flight.land(outcome)

    # What is going on

    def being_fetched(self) -> list[Image]:
        with self._lock:
            return [flight.image for flight in self._flights.values()]

    def fetches(self) -> list[Fetch]:
        """Return how far each image is that is being fetched."""
        with self._lock:
            flights = list(self._flights.values())
        return [flight.describe() for flight in flights]

    def close(self, timeout_s: float) -> None:
        """End every flight, keeping what it has, and wait for them."""
        with self._lock:
            self._closing = True
            flights = list(self._flights.values())
        for flight in flights:
            flight.cancellation.cancel(AgentStopping("the agent is stopping"))
        deadline = time.monotonic() + timeout_s
        for flight in flights:
            flight.landed.wait(max(0.0, deadline - time.monotonic()))
