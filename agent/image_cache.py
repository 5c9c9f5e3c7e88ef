"""The image cache: verified bases, each fetched once, whoever asks and however many.

`acquire` is the only door. It answers from the cache, or joins the flight that
is fetching the image, or starts one. A flight has a thread of its own and no
owner: those who wait for it may leave one by one, and the last one out ends it.
Other processes on the same directory are kept out by a file lock per base.

A flight looks for the cheapest way to the bytes:

    1. the base is there, but not as it was left   its bytes are read and hashed
    2. the base is there, its signature unproven    see `agent.provenance`
    3. a commit was interrupted                    its last step is taken
    4. another image has the same bytes            a second name for its file
    5. the image source                            a fetch

Where a signature is demanded nobody is given a base without the proof, however
it came to be there. Flights with different demands do not share an outcome:
one image may be good enough for one job and not for the other.

How bases lie on disk is `agent.store`'s business, who keeps them there
`agent.usage`'s, and how they go `agent.pruner`'s. A base is never changed.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from agent import logs, metrics, provenance, transfer, twin
from agent import manifest as manifests
from agent.base import Base, check_fits
from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    ImageCorrupt,
    ImageSourceUnavailable,
    InternalError,
)
from agent.files import free_bytes, no_space
from agent.flight import Flight, Seat
from agent.image import Image
from agent.ingest import Ingest
from agent.intake.plain import Converter
from agent.locks import held
from agent.manifest import Manifest, base_name
from agent.partial import Partial
from agent.proof import Demand, claimed
from agent.report import Progress
from agent.signatures import Check, Signatures
from agent.space import Reservation, Space
from agent.store import Entry, Store
from agent.transfer import ImageSource, RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier
from agent.views import Fetch

LOG = logging.getLogger(__name__)


class ImageCache:
    """May be shared by any number of threads."""

    def __init__(
        self,
        store: Store,
        usage: Usage,
        space: Space,
        verifier: Verifier,
        *,
        source: ImageSource,
        signatures: Signatures,
        converter: Converter,
        policy: RetryPolicy,
        require_hash: bool,
        verify_before_use: bool,
        vmdk_types: Sequence[str],
        max_concurrent_fetches: int,
        max_connections_per_image: int,
    ) -> None:
        self._store = store
        self._usage = usage
        self._space = space
        self._verifier = verifier
        self._source = source
        self._signatures = signatures
        self._converter = converter
        self._policy = policy
        self._require_hash = require_hash
        self._verify_before_use = verify_before_use
        self._vmdk_types = vmdk_types
        self._max_connections_per_image = max_connections_per_image
        self._slots = threading.BoundedSemaphore(max_concurrent_fetches)
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
            base = self._lookup(image, demand)
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

    def unpin(self, pin: str) -> None:
        """Give up every base that `pin` holds."""
        self._usage.unpin(pin)

    def _lookup(
        self, image: Image, demand: Demand | None, *, verified: bool = False
    ) -> Base | None:
        """Return the base if it is there, the file that was verified, and all that is demanded.

        `verified`: its bytes have just been looked at, as far as that is wanted.

        Raises:
            ImageUnacceptable: a signature is demanded, and the image has none.
            ImageCorrupt: the image is another one than when it was fetched.
        """
        # Before the look: who may not have an image need not know that it is here.
        claim = None if demand is None else claimed(image)
        entry = self._store.find(base_name(image.id))
        if entry is None or not entry.recognised or (self._verify_before_use and not verified):
            return None
        if image.digest is not None and entry.manifest.digest != ":".join(image.digest):
            raise ImageCorrupt(
                f"image {image.id} has another hash in {image.source} than when it was fetched: "
                f"{':'.join(image.digest):.24}… instead of {entry.manifest.digest:.24}…",
                "an image never changes under one id: upload the new content under a new id, or "
                f"remove the old base once nothing uses it: bootwright image remove {image.id}",
            )
        if demand is not None and not demand.is_met(claim, entry.manifest.proof):
            return None
        return _base(image, entry, origin="cache")

    # Fetching

    def _fly(self, flight: Flight) -> None:
        """Run a flight from take-off to landing; the body of its thread."""
        image = flight.image
        name = base_name(image.id)
        outcome: Base | BootwrightError
        try:
            with (
                logs.bind(image_id=image.id),
                held(self._store.lock_of(name), flight.cancellation),
                held(self._store.lock_of(twin.lock_name(image)), flight.cancellation),
                self._slot(flight),
            ):
                outcome = (
                    self._lookup(image, flight.demand)
                    or self._recognised(flight)
                    or self._obtained(flight)
                )
        except BootwrightError as e:
            outcome = e
        except OSError as e:
            outcome = self._translated(e, image)
        except Exception as e:
            LOG.exception("fetching image %s failed by a defect of ours", image.id)
            outcome = InternalError(
                f"fetching image {image.id} failed: {e!r}", "the traceback is in the agent's log"
            )
        with self._lock:
            # Gone before it lands: whoever asks from now on looks again.
            del self._flights[(name, flight.demand)]
        flight.land(outcome)

    def _translated(self, error: OSError, image: Image) -> BootwrightError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            directory = self._store.directory
            what = f"fetching image {image.id} into"
            return no_space(directory, image.size or 0, free_bytes(directory), what)
        return BackendError(
            f"fetching image {image.id}: {error}", "check the file system and the kernel's log"
        )

    @contextmanager
    def _slot(self, flight: Flight) -> Iterator[None]:
        while not self._slots.acquire(timeout=0.2):
            flight.cancellation.check()
        try:
            yield
        finally:
            self._slots.release()

    def _recognised(self, flight: Flight) -> Base | None:
        """Return a base that has to be verified first, if its bytes are right.

        One that has another identity than it had; or any, where that is wanted.
        """
        image = flight.image
        entry = self._store.find(base_name(image.id))
        if entry is None or (entry.recognised and not self._verify_before_use):
            return None
        if not entry.recognised:
            LOG.warning(
                "the base %s of image %s is not the file it was; verifying it before it is used",
                entry.path,
                image.id,
            )
        elif entry.manifest.content_digest is None:
            LOG.warning(
                "nobody has hashed the base %s of image %s since it was converted, so that nothing "
                "tells whether its bytes are right; the image is fetched anew",
                entry.path,
                image.id,
            )
            self._store.forget(entry.name)
            return None
        self._verifier.verify_locked(image.id, flight.cancellation)
        return self._lookup(image, flight.demand, verified=True)

    def _obtained(self, flight: Flight) -> Base:
        image, demand = flight.image, flight.demand
        check = (
            None if demand is None else self._signatures.check(image, demand, flight.cancellation)
        )
        return self._proven(flight, check) or self._made(flight, check)

    def _proven(self, flight: Flight, check: Check | None) -> Base | None:
        """Return a base that was fetched when nobody asked for its signature, proven now."""
        image = flight.image
        entry = self._store.find(base_name(image.id))
        if check is None or entry is None or not entry.recognised:
            return None
        proof = provenance.of_base(entry, check, flight.cancellation)
        if proof is None:
            LOG.info(
                "the base of image %s says nothing of the signature, which is demanded now; "
                "fetching the image anew",
                image.id,
            )
            return None
        # With the record as it is now: the old one may not have been signed.
        self._store.update(entry.name, replace(entry.manifest, image=image, proof=proof))
        return self._lookup(image, flight.demand, verified=True)

    def _made(self, flight: Flight, check: Check | None) -> Base:
        image = flight.image
        name = base_name(image.id)
        partial = self._store.partial_of(image)
        if self._store.complete(name, partial):
            base = (
                self._recognised(flight)
                or self._lookup(image, flight.demand)
                or self._proven(flight, check)
            )
            if base is not None:
                _discard(partial)
                return base
        with self._space.reservation(f"image {image.id}", partial.directory) as reservation:
            base = self._shared(flight, check, partial, reservation) or self._fetched(
                flight, check, partial, reservation
            )
        _discard(partial)
        return base

    def _shared(
        self, flight: Flight, check: Check | None, partial: Partial, reservation: Reservation
    ) -> Base | None:
        """Return a base made of another image's, if one has the very same bytes."""
        image = flight.image
        name = base_name(image.id)
        if self._verify_before_use:
            # The file would have to be read first, under the lock of the other image. Whoever
            # holds that one may be waiting for the lock of the bytes, which this flight holds.
            return None
        other = twin.find(self._store.entries(), image)
        if other is None:
            return None
        pin = f"twin of {name}"
        self._usage.pin(other.name, pin)
        try:
            proof = None
            if check is not None:
                proof = provenance.of_base(other, check, flight.cancellation)
                if proof is None:
                    return None
            flight.header_seen(other.manifest.virtual_size)
            data = twin.take(other, partial, reservation, flight.cancellation)
            if data is None:
                return None
            manifest = twin.manifest(other, image, manifests.identity(data), proof)
            reservation.end()
            self._store.commit(name, data, manifest, partial)
        finally:
            self._usage.unpin(pin)
        metrics.IMAGE_REQUESTS.labels(result="shared").inc()
        LOG.info(
            "image %s is in the cache: it has the bytes of image %s, which was there",
            image.id,
            other.manifest.image.id,
        )
        return _base(image, self._store.get(image.id), origin="cache")

    def _fetched(
        self, flight: Flight, check: Check | None, partial: Partial, reservation: Reservation
    ) -> Base:
        image = flight.image
        metrics.IMAGE_REQUESTS.labels(result="miss").inc()
        known = self._store.find(base_name(image.id))
        if known is not None and image.digest is None:
            # Overlays may stand on it, so that only the same bytes may take its place.
            algorithm, _, value = known.manifest.digest.partition(":")
            image = replace(image, digest=(algorithm, value))
        ingested = Ingest(
            image,
            self._source,
            partial,
            converter=self._converter,
            policy=self._policy,
            cancellation=flight.cancellation,
            require_hash=self._require_hash,
            vmdk_types=self._vmdk_types,
            max_connections=self._max_connections_per_image,
            check=check,
            on_header=flight.header_seen,
            reserve=reservation.need,
            on_advance=flight.advance,
        ).run()
        reservation.end()
        metrics.FETCH_BYTES.inc(ingested.received)
        ingested.path.chmod(0o640)
        now = time.time()
        manifest = Manifest(
            image=flight.image,
            virtual_size=ingested.virtual_size,
            source_format=ingested.source_format,
            source_size=ingested.source_size,
            digest=ingested.digest,
            proof=ingested.proof,
            content_digest=ingested.content_digest,
            identity=manifests.identity(ingested.path),
            verified_at=now,
            created_at=now,
        )
        self._store.commit(base_name(image.id), ingested.path, manifest, partial)
        if self._verify_before_use and ingested.content_digest is None:
            # Else there were nothing to hold its bytes against before its next use.
            self._verifier.verify_locked(image.id, flight.cancellation)
        LOG.info(
            "image %s is in the cache: %d bytes received, %d kept from before, %s, raw size %d",
            image.id,
            ingested.received,
            ingested.resumed,
            ingested.source_format,
            ingested.virtual_size,
        )
        return _base(
            image,
            self._store.get(image.id),
            origin=image.source,
            received=ingested.received,
            resumed=ingested.resumed,
        )

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


def _discard(partial: Partial) -> None:
    """Remove a partial whose base is there; it is no failure if that has to wait."""
    try:
        partial.discard()
    except (OSError, BackendError) as e:
        LOG.warning("%s is left to the next sweep: %s", partial.directory, e)


def _base(image: Image, entry: Entry, *, origin: str, received: int = 0, resumed: int = 0) -> Base:
    return Base(
        path=entry.path,
        format=entry.manifest.format,
        virtual_size=entry.manifest.virtual_size,
        image=image,
        digest=entry.manifest.digest,
        origin=origin,
        received=received,
        resumed=resumed,
    )
