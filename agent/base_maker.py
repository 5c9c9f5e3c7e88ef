"""Makes a base: the way from an image to what the cache may hand out.

The cheapest way to the bytes is taken:

    1. the base is there, but not as it was left   its bytes are read and hashed
    2. the base is there, its signature unproven    see `agent.provenance`
    3. a commit was interrupted                    its last step is taken
    4. another image has the same bytes            a second name for its file
    5. the image source                            a fetch

Where a signature is demanded there is no base without the proof, however it
came to be there. Who asked for it, and how many, is `agent.image_cache`'s
business. Other processes on the same directory are kept out by a file lock per
base, and by one for the bytes that several images may have in common.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from agent import manifest as manifests
from agent import metrics, provenance, twin
from agent.base import Base
from agent.cancellation import Cancellation
from agent.errors import BackendError, ImageCorrupt
from agent.files import reporting
from agent.flight import Flight
from agent.image import Image
from agent.ingest import Ingest
from agent.intake.plain import Converter
from agent.locks import held
from agent.manifest import Manifest, base_name
from agent.partial import Partial
from agent.proof import Demand, claimed
from agent.signatures import Check, Signatures
from agent.space import Reservation, Space
from agent.store import Entry, Store
from agent.transfer import ImageSource, RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier

LOG = logging.getLogger(__name__)


class BaseMaker:
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

    def ready(self, image: Image, demand: Demand | None) -> Base | None:
        """Return the base if it is there, the file that was verified, and all that is demanded.

        Raises:
            ImageUnacceptable: a signature is demanded, and the image has none.
            ImageCorrupt: the image is another one than when it was fetched.
        """
        return self._lookup(image, demand)

    def make(self, flight: Flight) -> Base:
        """Return the base of the flight's image with all that is demanded of it.

        What remains of a failure is a partial worth going on with, or nothing.

        Raises:
            FlavorDiskSmallerThanImage: it is larger than any disk that waits for it.
            ImageUnacceptable: its signature is demanded, and wrong or missing.
            ImageError, InsufficientFreeSpace, BackendError: no base could be made.
            BootwrightError: what the flight's cancellation was given.
        """
        image, cancellation = flight.image, flight.cancellation
        name, what = base_name(image.id), f"fetching image {image.id} into"
        with (
            reporting(what, self._store.directory / name, needed=image.size or 0),
            held(self._store.lock_of(name), cancellation),
            held(self._store.lock_of(twin.lock_name(image)), cancellation),
            self._slot(cancellation),
        ):
            return (
                self._lookup(image, flight.demand)
                or self._recognised(flight)
                or self._obtained(flight)
            )

    @contextmanager
    def _slot(self, cancellation: Cancellation) -> Iterator[None]:
        while not self._slots.acquire(timeout=0.2):
            cancellation.check()
        try:
            yield
        finally:
            self._slots.release()

    def _lookup(
        self, image: Image, demand: Demand | None, *, verified: bool = False
    ) -> Base | None:
        """Do as `ready` does; `verified`: its bytes have just been looked at, if that is wanted."""
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
