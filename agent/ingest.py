"""One pass of one image: from the image source to a verified raw file.

    transfer ──▶ inspection        what is it, may we have it?
             ──▶ hash, own thread  are these the bytes that were promised?
             ──▶ partial           sparse

Bytes are looked at once, while they pass. Nothing outside the partial's own
directory is touched, and nothing in it is believed before the hash of the
whole has matched.

The partial survives whatever ends the ingest for a passing reason (a restart
of the agent, a source that is away) and is taken up again; whatever is wrong
with the image itself removes it.
"""

import contextlib
import errno
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from agent.cancellation import Cancellation
from agent.errors import (
    BackendError,
    BootwrightError,
    ImageCorrupt,
    ImageSourceUnavailable,
    ImageUnacceptable,
)
from agent.files import SparseWriter, free_bytes, no_space
from agent.image import Image
from agent.inspection import Inspection, Verdict, refuse_nested
from agent.partial import Marker, Partial
from agent.report import TaskState
from agent.transfer import ImageSource, RetryPolicy, Transfer

LOG = logging.getLogger(__name__)

MIB = 1 << 20

# Enough for the hash to ride out a slow write, little enough to count on.
HASH_QUEUE_CHUNKS = 16

# Content that is a disk as it stands.
PLAIN_FORMATS = frozenset({"raw", "iso"})


class Converter(Protocol):
    """What turns other formats into raw; `agent.qemu_img.QemuImg` does."""

    def convert(
        self,
        source: Path,
        source_format: str,
        target: Path,
        cancellation: Cancellation,
        *,
        virtual_size: int | None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """A verified raw file, durable, still under its private name."""

    path: Path
    virtual_size: int
    source_format: str
    source_size: int
    digest: str
    """`algorithm:hex` of the bytes the source sent."""
    received: int
    """Bytes the source sent in this run."""
    resumed: int
    """Bytes an earlier run had left, and that were not asked for again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advance:
    """How far an ingest has come; `total` is None when the source does not say."""

    phase: TaskState
    done: int
    total: int | None
    at: float
    """`time.time()` of the last byte."""


class Ingest:
    """Makes one verified raw file of `image`; used once, by one thread."""

    def __init__(
        self,
        image: Image,
        source: ImageSource,
        partial: Partial,
        *,
        converter: Converter,
        policy: RetryPolicy,
        cancellation: Cancellation,
        require_hash: bool,
        on_header: Callable[[int], None],
        on_advance: Callable[[Advance], None],
    ) -> None:
        """The caller holds the lock on the partial.

        `on_header` gets the virtual size in bytes as soon as it is known, and
        raises what should stop the ingest before more is written.
        """
        self._image = image
        self._source = source
        self._partial = partial
        self._converter = converter
        self._policy = policy
        self._cancellation = cancellation
        self._require_hash = require_hash
        self._on_header = on_header
        self._on_advance = on_advance
        self._algorithm = "sha512" if image.digest is None else image.digest[0]
        self._received = 0

    def run(self) -> Ingested:
        """Fetch, verify and convert.

        What remains of a failure is a partial worth going on with, or nothing.

        Raises:
            ImageError: what is wrong with the image or its source.
            InsufficientFreeSpace: it does not fit.
            BackendError: the file system or qemu-img failed.
            BootwrightError: what the cancellation was given.
        """
        if self._image.digest is None and self._require_hash:
            raise ImageUnacceptable(
                f"image {self._image.id} has no hash (os_hash_value or checksum) in "
                f"{self._source.name}, so its bytes cannot be verified",
                "upload it to an image service that computes hashes, or set "
                "[image_cache] require_hash = false",
            )
        try:
            return self._twice_if_corrupt()
        except BootwrightError as e:
            if self._cancellation.cancelled or isinstance(e, ImageSourceUnavailable):
                self._partial.discard_if_empty()
            else:
                self._partial.discard()
            raise

    def _twice_if_corrupt(self) -> Ingested:
        try:
            return self._attempt()
        except ImageCorrupt as e:
            # A proxy or a cable may have flipped a bit once, and a partial of an
            # earlier run may have been damaged. Whoever is corrupt twice is.
            LOG.warning("%s; fetching it once more from the start", e.message)
            self._partial.discard()
            return self._attempt()

    def _attempt(self) -> Ingested:
        inspection = Inspection(
            self._image.id,
            self._image.disk_format,
            container_format=self._image.container_format,
            size=self._image.size,
        )
        try:
            kept = self._partial.keep()
            with _Hasher(self._algorithm) as hasher:
                size = self._pass(kept, inspection, hasher)
                self._advance(TaskState.IMAGE_VERIFYING, size)
                digest = hasher.hexdigest()
        except OSError as e:
            raise self._translate(e) from e
        self._verify(digest, kept)
        verdict = inspection.finish()
        path = self._plain(verdict)
        return Ingested(
            path=path,
            # What a header says is a promise, and with some formats only a
            # bound; the disk is what came of it.
            virtual_size=path.stat().st_size,
            source_format=verdict.format,
            source_size=size,
            digest=f"{self._algorithm}:{digest}",
            received=self._received,
            resumed=kept,
        )

    def _pass(self, kept: int, inspection: Inspection, hasher: "_Hasher") -> int:
        """Let every byte of the image pass once; return how many there were."""
        header_seen = False

        def look(chunk: bytes) -> None:
            nonlocal header_seen
            hasher.update(chunk)
            inspection.feed(chunk)
            if not header_seen and inspection.virtual_size is not None:
                header_seen = True
                self._check_size(inspection.virtual_size)

        with (
            self._partial.data.open("rb", buffering=0) as file,
            SparseWriter(self._partial.data, kept) as writer,
            Marker(file.fileno(), self._partial.mark) as marker,
        ):
            while chunk := file.read(MIB):
                self._cancellation.check()
                look(chunk)
            transfer = Transfer(self._source, self._image, kept, self._policy, self._cancellation)
            with contextlib.closing(iter(transfer)) as chunks:
                for chunk in chunks:
                    look(chunk)
                    writer.write(chunk)
                    marker.reached(writer.size)
                    self._advance(TaskState.IMAGE_DOWNLOADING, writer.size)
            writer.flush()
            self._received += transfer.received
            return writer.size

    def _check_size(self, virtual_size: int) -> None:
        """Stop here what cannot end well, before more of it is written."""
        self._on_header(virtual_size)
        # Beside the source's bytes stands, for a while, the raw file made of
        # them. It may turn out sparse; but only in full is it sure to fit.
        needed = self._image.size or 0
        if self._image.disk_format not in PLAIN_FORMATS:
            needed += virtual_size
        present = self._partial.data.stat().st_blocks * 512
        free = free_bytes(self._partial.directory)
        if needed > free + present:
            raise self._no_space(needed)

    def _no_space(self, needed: int) -> BootwrightError:
        directory = self._partial.directory.parent
        return no_space(directory, needed, free_bytes(directory), f"image {self._image.id}")

    def _translate(self, error: OSError) -> BootwrightError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._no_space(self._image.size or 0)
        return BackendError(
            f"the partial of image {self._image.id} cannot be written: {error}",
            "check the file system and the kernel's log",
        )

    def _advance(self, phase: TaskState, done: int) -> None:
        self._on_advance(Advance(phase=phase, done=done, total=self._image.size, at=time.time()))

    def _verify(self, digest: str, kept: int) -> None:
        expected = self._image.digest
        if expected is None or expected[1] == digest:
            return
        after = f", with {kept} bytes kept from an earlier run" if kept else ""
        raise ImageCorrupt(
            f"the bytes of image {self._image.id} from {self._source.name} have {expected[0]} "
            f"{digest:.16}…, promised is {expected[1]:.16}…{after}",
            "compare the image in the source with the original; if it is damaged there, "
            "upload it again under a new id",
        )

    def _plain(self, verdict: Verdict) -> Path:
        """Return the file that holds the disk itself, converted if need be."""
        if verdict.format in PLAIN_FORMATS:
            return self._partial.data
        self._partial.raw.unlink(missing_ok=True)
        self._converter.convert(
            self._partial.data,
            verdict.format,
            self._partial.raw,
            self._cancellation,
            virtual_size=verdict.virtual_size,
        )
        refuse_nested(self._image.id, self._partial.raw)
        return self._partial.raw


class _Hasher:
    """A hash in a thread of its own.

    SHA-512 costs more than network and disk together (about 1.6 s a GiB on one
    core); hashlib lets go of the interpreter lock, so beside them it costs
    only itself.
    """

    def __init__(self, algorithm: str) -> None:
        self._hash = hashlib.new(algorithm)
        self._chunks: queue.Queue[bytes | None] = queue.Queue(HASH_QUEUE_CHUNKS)
        self._thread = threading.Thread(target=self._run, name="image-hash")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._hash.update(chunk)

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._chunks.put(None)
            self._thread.join()

    def update(self, chunk: bytes) -> None:
        self._chunks.put(chunk)

    def hexdigest(self) -> str:
        """Wait for what was given to `update`, and return the digest."""
        self._finish()
        return self._hash.hexdigest()
