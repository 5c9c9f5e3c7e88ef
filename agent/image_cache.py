"""The image cache: verified bases, each fetched once, whoever asks and however many.

`acquire` is the only door. It answers from the cache, or joins the flight that
is fetching the image, or starts one. A flight has a thread of its own and no
owner: those who wait for it may leave one by one, and the last one out ends it.
Other processes on the same directory are kept out by a file lock per base.

Commit, and what a crash at any point of it leaves:

    1. manifest aside, in the partial     a partial, verified again when asked for
    2. rename of the data to its name     a file without a manifest: no entry; the
                                          manifest in the partial completes it
    3. rename of the manifest             the entry

A base is never changed and never replaced. It is protected from removal by a
pin (a job is about to stand on it) or by an instance that does.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent import manifest as manifests
from agent import transfer
from agent.base import Base, check_fits
from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    ImageCorrupt,
    ImageSourceUnavailable,
    InternalError,
    NotFound,
)
from agent.files import fsync_directory, remove_tree
from agent.flight import Flight, Seat
from agent.image import Image
from agent.ingest import Converter, Ingest, Ingested
from agent.locks import FileLock, held
from agent.manifest import Manifest, base_name, manifest_path
from agent.partial import Partial
from agent.report import Progress
from agent.transfer import ImageSource, RetryPolicy
from agent.views import Fetch

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A base, as it is listed."""

    path: Path
    manifest: Manifest
    allocated: int
    """Bytes on disk."""
    last_used_at: float
    pinned_by: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialEntry:
    name: str
    allocated: int
    being_fetched: bool
    changed_at: float


class ImageCache:
    """May be shared by any number of threads."""

    def __init__(
        self,
        directory: Path,
        *,
        locks: Path,
        source: ImageSource,
        converter: Converter,
        policy: RetryPolicy,
        require_hash: bool,
        max_concurrent_fetches: int,
        in_use: Callable[[str], list[str]],
    ) -> None:
        """`directory` is `_base`; `in_use` names the instances that stand on a base."""
        self.directory = directory
        self._partials = directory / ".partial"
        self._locks = locks
        self._source = source
        self._converter = converter
        self._policy = policy
        self._require_hash = require_hash
        self._slots = threading.BoundedSemaphore(max_concurrent_fetches)
        self._in_use = in_use
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._pins: dict[str, set[str]] = {}
        self._closing = False
        for path in (directory, self._partials, locks):
            path.mkdir(exist_ok=True)
        # The hypervisor's user has to pass through to a base it is given, and
        # to see nothing else on the way.
        directory.chmod(0o711)
        self._partials.chmod(0o700)

    # Asking

    def resolve(self, image_id: str, cancellation: Cancellation) -> Image:
        """Return the image's record: the source's, or the cached one while that is away.

        Raises:
            ImageError: as the source says it.
        """
        cached = manifests.read(manifest_path(self.directory / base_name(image_id)))
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
            return cached.image

    def acquire(
        self,
        image: Image,
        *,
        pin: str,
        max_virtual_size: int | None,
        cancellation: Cancellation,
        on_progress: Callable[[Progress], None],
    ) -> Base:
        """Return the base of `image`, pinned by `pin` until `unpin`.

        `max_virtual_size`: bytes; what the caller's disk will hold, None if it
        takes any size. `on_progress` is called now and then while the image is
        being fetched.

        Raises:
            FlavorDiskSmallerThanImage: the image's virtual size is larger.
            ImageError, InsufficientFreeSpace, BackendError: no base could be made.
            BootwrightError: what the cancellation was given.
        """
        base = self._acquire(image, pin, max_virtual_size, cancellation, on_progress)
        check_fits(image, base.virtual_size, max_virtual_size)
        return base

    def _acquire(
        self,
        image: Image,
        pin: str,
        max_virtual_size: int | None,
        cancellation: Cancellation,
        on_progress: Callable[[Progress], None],
    ) -> Base:
        while True:
            boarded = self._lookup_or_board(image, pin, max_virtual_size)
            if isinstance(boarded, Base):
                return boarded
            flight, seat = boarded
            if seat is not None:
                return flight.wait(seat, cancellation, on_progress)
            # Everybody else has just left it, and it ends as soon as it can.
            flight.landed.wait(0.05)
            cancellation.check()

    def _lookup_or_board(
        self, image: Image, pin: str, max_virtual_size: int | None
    ) -> Base | tuple[Flight, Seat | None]:
        name = base_name(image.id)
        with self._lock:
            if self._closing:
                raise AgentStopping("the agent is stopping")
            # Before the look, so that no removal can come between.
            self._pins.setdefault(name, set()).add(pin)
            base = self._lookup(image, "cache")
            if base is not None:
                return base
            flight = self._flights.get(name)
            if flight is not None:
                return flight, flight.board(max_virtual_size)
            flight = self._flights[name] = Flight(image)
            seat = flight.board(max_virtual_size)
            threading.Thread(target=self._fly, args=(flight,), name=f"fetch-{image.id}").start()
            return flight, seat

    def unpin(self, pin: str) -> None:
        """Give up every base that `pin` holds."""
        with self._lock:
            for name in [name for name, pins in self._pins.items() if pin in pins]:
                self._pins[name].discard(pin)
                if not self._pins[name]:
                    del self._pins[name]

    def _lookup(self, image: Image, origin: str) -> Base | None:
        path = self.directory / base_name(image.id)
        manifest = manifests.read(manifest_path(path))
        if manifest is None:
            return None
        if not path.is_file():
            LOG.warning(
                "the base %s of image %s is gone although its manifest is there; fetching it anew",
                path,
                image.id,
            )
            return None
        if image.digest is not None and manifest.digest != ":".join(image.digest):
            raise ImageCorrupt(
                f"image {image.id} has another hash in {image.source} than when it was fetched: "
                f"{':'.join(image.digest):.24}… instead of {manifest.digest:.24}…",
                "an image never changes under one id: upload the new content under a new id, or "
                f"remove the old base once nothing uses it: bootwright image remove {image.id}",
            )
        return Base(
            name=path.name,
            path=path,
            format=manifest.format,
            virtual_size=manifest.virtual_size,
            image=image,
            digest=manifest.digest,
            origin=origin,
        )

    # Fetching

    def _fly(self, flight: Flight) -> None:
        """Run a flight from take-off to landing; the body of its thread."""
        image = flight.image
        name = base_name(image.id)
        outcome: Base | BootwrightError
        try:
            with held(self._locks / name, flight.cancellation), self._slot(flight):
                outcome = self._lookup(image, "cache") or self._fetch(flight)
        except BootwrightError as e:
            outcome = e
        except Exception as e:
            LOG.exception("fetching image %s failed by a defect of ours", image.id)
            outcome = InternalError(
                f"fetching image {image.id} failed: {e!r}", "the traceback is in the agent's log"
            )
        with self._lock:
            # Gone before it lands: whoever asks from now on looks again.
            del self._flights[name]
        flight.land(outcome)

    @contextmanager
    def _slot(self, flight: Flight) -> Iterator[None]:
        while not self._slots.acquire(timeout=0.2):
            flight.cancellation.check()
        try:
            yield
        finally:
            self._slots.release()

    def _fetch(self, flight: Flight) -> Base:
        image = flight.image
        path = self.directory / base_name(image.id)
        partial = Partial(self._partials / path.name, image)
        aside = partial.directory / "manifest.json"
        if self._complete(path, aside):
            base = self._lookup(image, image.source)
            if base is not None:
                partial.discard()
                return base
        # No manifest, so nobody was ever given this file.
        path.unlink(missing_ok=True)
        ingested = Ingest(
            image,
            self._source,
            partial,
            converter=self._converter,
            policy=self._policy,
            cancellation=flight.cancellation,
            require_hash=self._require_hash,
            on_header=flight.header_seen,
            on_advance=flight.advance,
        ).run()
        self._commit(image, ingested, path, aside)
        partial.discard()
        LOG.info(
            "image %s is in the cache: %d bytes received, %d kept from before, %s, raw size %d",
            image.id,
            ingested.received,
            ingested.resumed,
            ingested.source_format,
            ingested.virtual_size,
        )
        return Base(
            name=path.name,
            path=path,
            format="raw",
            virtual_size=ingested.virtual_size,
            image=image,
            digest=ingested.digest,
            origin=image.source,
            received=ingested.received,
            resumed=ingested.resumed,
        )

    def _commit(self, image: Image, ingested: Ingested, path: Path, aside: Path) -> None:
        try:
            ingested.path.chmod(0o640)
            manifests.write(
                aside,
                Manifest(
                    image=image,
                    virtual_size=ingested.virtual_size,
                    source_format=ingested.source_format,
                    source_size=ingested.source_size,
                    digest=ingested.digest,
                    created_at=time.time(),
                ),
            )
            ingested.path.rename(path)
            fsync_directory(self.directory)
            self._complete(path, aside)
        except OSError as e:
            raise BackendError(
                f"the base {path} cannot be committed: {e}",
                "check the file system and the kernel's log",
            ) from e

    def _complete(self, path: Path, aside: Path) -> bool:
        """Take the last step of a commit if all before it have been taken."""
        if not path.is_file() or not aside.is_file():
            return False
        aside.rename(manifest_path(path))
        fsync_directory(self.directory)
        return True

    # Keeping house

    def entries(self) -> list[Entry]:
        """Return the bases, most recently used first."""
        found = []
        for path in self.directory.glob("*.json"):
            entry = self._entry(path)
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: entry.last_used_at, reverse=True)

    def entry(self, image_id: str) -> Entry:
        """Raises: NotFound."""
        entry = self._entry(manifest_path(self.directory / base_name(image_id)))
        if entry is None:
            raise NotFound(
                f"image {image_id} is not in the cache of this host",
                f"bootwright image fetch {image_id} gets it",
            )
        return entry

    def _entry(self, path: Path) -> Entry | None:
        base = path.with_suffix("")
        manifest = manifests.read(path)
        try:
            stat = base.stat()
        except FileNotFoundError:
            return None
        if manifest is None:
            return None
        with self._lock:
            pins = tuple(sorted(self._pins.get(base.name, ())))
        return Entry(
            path=base,
            manifest=manifest,
            allocated=stat.st_blocks * 512,
            last_used_at=stat.st_mtime,
            pinned_by=pins,
        )

    def path_of(self, name: str) -> Path:
        """Return where the base of that name is, or would be."""
        return self.directory / name

    def being_fetched(self) -> list[Image]:
        with self._lock:
            return [flight.image for flight in self._flights.values()]

    def fetches(self) -> list[Fetch]:
        """Return how far each image is that is being fetched."""
        with self._lock:
            flights = list(self._flights.values())
        return [flight.describe() for flight in flights]

    def partials(self) -> list[PartialEntry]:
        """Return what is being fetched, or waits to be gone on with."""
        found = []
        for path in self._partials.iterdir():
            try:
                files = [file.stat() for file in path.iterdir()]
                changed_at = max([path.stat().st_mtime, *(file.st_mtime for file in files)])
            except FileNotFoundError:
                continue
            found.append(
                PartialEntry(
                    name=path.name,
                    allocated=sum(file.st_blocks for file in files) * 512,
                    being_fetched=path.name in self._flights,
                    changed_at=changed_at,
                )
            )
        return found

    def remove(self, image_id: str) -> None:
        """Remove an image's base.

        Raises:
            NotFound: it is not here.
            BackendError: a job or an instance stands on it.
        """
        entry = self.entry(image_id)
        with self._lock:
            users = [f"job {pin}" for pin in sorted(self._pins.get(entry.path.name, ()))]
            users += [f"instance {name}" for name in self._in_use(entry.path.name)]
            if users:
                raise BackendError(
                    f"image {image_id} is in use by {', '.join(users[:5])}"
                    + (f" and {len(users) - 5} more" if len(users) > 5 else ""),
                    "delete what uses it first",
                )
            # The manifest first: without it the rest is no entry.
            manifest_path(entry.path).unlink(missing_ok=True)
            entry.path.unlink(missing_ok=True)
            fsync_directory(self.directory)
        LOG.info("image %s removed from the cache, %d bytes", image_id, entry.allocated)

    def sweep(self, *, older_than_s: float) -> None:
        """Remove partials nobody went on with for so long, and files of no entry."""
        limit = time.time() - older_than_s
        stale = {entry.name for entry in self.partials() if entry.changed_at < limit}
        for path in self.directory.iterdir():
            if path.is_file() and path.stat().st_mtime < limit and not self._is_of_entry(path):
                stale.add(path.name.removeprefix(".")[:40])
        for name in sorted(stale):
            lock = FileLock(self._locks / name)
            if not lock.try_acquire():
                continue  # somebody is at work on it
            try:
                self._sweep_one(name)
            finally:
                lock.release()

    def _sweep_one(self, name: str) -> None:
        partial = self._partials / name
        if partial.is_dir():
            LOG.info("removing the partial %s, which nobody has gone on with", partial)
            remove_tree(partial)
        for path in [*self.directory.glob(f"{name}*"), *self.directory.glob(f".{name}*")]:
            if not self._is_of_entry(path):
                LOG.info("removing %s, which belongs to no entry of the cache", path)
                path.unlink(missing_ok=True)

    def _is_of_entry(self, path: Path) -> bool:
        base = path.with_suffix("") if path.suffix == ".json" else path
        return base.is_file() and manifests.read(manifest_path(base)) is not None

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
