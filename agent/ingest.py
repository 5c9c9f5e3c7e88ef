"""One pass of one image: from the image source to a verified raw disk.

    transfer ──▶ inspection          what is it, may we have it?
             ──▶ intake ──▶ hash, own thread  are these the bytes that were promised?
                        ──▶ partial     plain, or decoded on the way

Bytes are looked at once, while they pass. Nothing outside the partial's own
directory is touched, and nothing in it is believed before the hash of the
whole has matched.

The partial survives whatever ends the ingest for a passing reason (a restart
of the agent, a source that is away) and is taken up again; whatever is wrong
with the image itself removes it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.cancellation import Cancellation
from agent.errors import (
    AgentStopping,
    BootwrightError,
    Cancelled,
    ImageCorrupt,
    ImageSourceUnavailable,
    ImageUnacceptable,
)
from agent.files import reporting
from agent.image import Image
from agent.inspection import HEAD, Inspection
from agent.intake import Intake, Undecodable, decoded
from agent.intake.decoded import DecodedIntake
from agent.intake.plain import PLAIN_FORMATS, Converter, PlainIntake
from agent.partial import Partial
from agent.proof import Proof
from agent.qcow2_decoder import Unsupported
from agent.ranges import RangedTransfer
from agent.report import TaskState
from agent.signatures import Check
from agent.transfer import ImageSource, RetryPolicy

LOG = logging.getLogger(__name__)

# Of an image of unknown size so much is promised at a time.
_STEP = 64 << 20
# Tables, snapshots and what else an image may hold beside its disk.
_BESIDE = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """A verified raw file, durable, still under its private name."""

    path: Path
    virtual_size: int
    source_format: str
    source_size: int
    digest: str
    """`algorithm:hex` of the bytes the source sent."""
    proof: Proof | None
    """Of their signature, if that was asked for."""
    content_digest: str | None
    """`algorithm:hex` of the bytes of `path`, None if nobody has hashed those."""
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
        vmdk_types: Sequence[str],
        max_connections: int,
        check: Check | None = None,
        on_header: Callable[[int], None],
        reserve: Callable[[int], None],
        on_advance: Callable[[Advance], None],
    ) -> None:
        """The caller holds the lock on the partial.

        `check`: what the image's signature has to pass. `on_header` gets the
        virtual size in bytes as soon as it is known, and `reserve` the bytes
        the ingest may still write from then on; both raise what should stop it
        before more is written.
        """
        self._image = image
        self._source = source
        self._partial = partial
        self._converter = converter
        self._policy = policy
        self._cancellation = cancellation
        self._require_hash = require_hash
        self._vmdk_types = vmdk_types
        self._max_connections = max_connections
        self._check = check
        self._on_header = on_header
        self._reserve = reserve
        self._on_advance = on_advance
        self._algorithm = "sha512" if image.digest is None else image.digest[0]
        # As a rule one, since people sign with the hash that Glance uses.
        self._algorithms = tuple(
            dict.fromkeys([self._algorithm, *([check.algorithm] if check is not None else [])])
        )
        self._received = 0
        self._promised = 0

    def run(self) -> Ingested:
        """Fetch, verify and make raw.

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
            return self._twice_if_damaged()
        except BootwrightError as e:
            passing = isinstance(e, ImageSourceUnavailable | AgentStopping | Cancelled)
            if not (passing and self._worth_keeping()):
                self._partial.discard()
            raise

    def _worth_keeping(self) -> bool:
        data = self._partial.data
        return decoded.begun(self._partial) or (data.exists() and data.stat().st_size > 0)

    def _twice_if_damaged(self) -> Ingested:
        try:
            return self._attempt()
        except (ImageCorrupt, Undecodable) as e:
            # A proxy or a cable may have flipped a bit once, and a partial of an
            # earlier run may have been damaged. What is wrong twice is wrong.
            LOG.warning("image %s: %s; fetching it once more from the start", self._image.id, e)
            self._partial.discard()
        try:
            return self._attempt()
        except Undecodable as e:
            raise ImageUnacceptable(
                f"image {self._image.id} is not the {self._image.disk_format} it claims to be: {e}",
                "make it anew, with 'qemu-img convert -O qcow2', and upload that",
            ) from e

    def _attempt(self) -> Ingested:
        inspection = Inspection(
            self._image.id,
            self._image.disk_format,
            container_format=self._image.container_format,
            size=self._image.size,
            vmdk_types=self._vmdk_types,
        )
        what = f"fetching image {self._image.id} into"
        needed = self._image.size or 0
        with (
            reporting(what, self._partial.directory, needed=needed),
            contextlib.ExitStack() as stack,
        ):
            return self._ingested(inspection, self._pass(inspection, stack))

    def _ingested(self, inspection: Inspection, intake: Intake) -> Ingested:
        self._advance(TaskState.IMAGE_VERIFYING, intake.offset)
        digests = intake.digests()
        digest = digests[self._algorithm]
        self._verify(digest, intake.kept)
        proof = self._prove(digests)
        verdict = inspection.finish()
        # Of a very small image, and of a fixed VHD, the size is known only now.
        self._on_header(verdict.virtual_size)
        path = intake.disk(verdict)
        as_sent = path == self._partial.data
        return Ingested(
            path=path,
            # What a header says is a promise, and with some formats only a
            # bound; the disk is what came of it.
            virtual_size=path.stat().st_size,
            source_format=verdict.format,
            source_size=intake.offset,
            digest=f"{self._algorithm}:{digest}",
            proof=proof,
            content_digest=f"{self._algorithm}:{digest}" if as_sent else None,
            received=self._received,
            resumed=intake.kept,
        )

    def _pass(self, inspection: Inspection, stack: contextlib.ExitStack) -> Intake:
        """Let every byte of the image pass once."""
        intake: Intake | None = None
        if self._partial.open():
            intake = self._resume(inspection)
        if intake is not None:
            stack.callback(intake.close)
        kept = 0 if intake is None else intake.kept
        transfer = RangedTransfer(
            self._source,
            self._image,
            kept,
            self._policy,
            self._cancellation,
            max_connections=self._max_connections,
        )
        pieces = stack.enter_context(contextlib.closing(iter(transfer)))
        checked = False
        try:
            for chunk in _with_whole_head(pieces) if kept == 0 else pieces:
                # Before it is kept: of what is refused here nothing is written.
                inspection.feed(chunk)
                if not checked and inspection.virtual_size is not None:
                    checked = True
                    self._check_size(inspection.virtual_size, kept)
                if intake is None:
                    intake = self._begin(chunk[:HEAD], inspection)
                    stack.callback(intake.close)
                if self._image.size is None:
                    self._bound(intake.offset + len(chunk), inspection)
                intake.take(chunk)
                self._advance(TaskState.IMAGE_DOWNLOADING, intake.offset)
        finally:
            self._received += transfer.received
        if intake is None:
            intake = self._plain(inspection)
            stack.callback(intake.close)
        return intake

    def _resume(self, inspection: Inspection) -> Intake | None:
        if decoded.begun(self._partial):
            if not decoded.covered(self._partial, self._algorithms):
                # It was begun when nobody asked for the signature.
                self._partial.begin()
                return None
            return DecodedIntake.resume(
                self._partial,
                inspection,
                algorithms=self._algorithms,
                cancellation=self._cancellation,
            )
        if self._partial.data.exists():
            return self._plain(inspection)
        return None

    def _begin(self, head: bytes, inspection: Inspection) -> Intake:
        if decoded.possible(self._image):
            try:
                return DecodedIntake.begin(self._partial, algorithms=self._algorithms, head=head)
            except Unsupported as e:
                LOG.info("image %s goes through qemu-img: %s", self._image.id, e)
        return self._plain(inspection)

    def _plain(self, inspection: Inspection) -> PlainIntake:
        return PlainIntake(
            self._partial,
            inspection,
            algorithms=self._algorithms,
            converter=self._converter,
            cancellation=self._cancellation,
        )

    def _check_size(self, virtual_size: int, kept: int) -> None:
        """Stop here what cannot end well, before more of it is written."""
        self._on_header(virtual_size)
        missing = max(0, (self._image.size or 0) - kept)
        if self._image.disk_format in PLAIN_FORMATS:
            self._reserve(missing)
        elif decoded.possible(self._image):
            # The bytes themselves are not kept, but for those that come before
            # the tables they belong to.
            self._reserve(max(missing, virtual_size))
        else:
            # Beside the source's bytes stands, for a while, the raw file made
            # of them. It may turn out sparse; but only in full is it sure to fit.
            self._reserve(missing + virtual_size)

    def _bound(self, length: int, inspection: Inspection) -> None:
        """Stop an image of unknown size that has no end, before the next bytes are kept.

        Space for it is promised as it comes.
        """
        if length <= self._promised:
            return
        self._promised = length + _STEP
        if self._image.disk_format in PLAIN_FORMATS:
            self._on_header(length)
            self._reserve(_STEP)
            return
        virtual_size = inspection.virtual_size or 0
        if length > 2 * virtual_size + _BESIDE:
            raise ImageCorrupt(
                f"image {self._image.id} goes on after {length} bytes, more than any image of "
                f"{virtual_size} bytes of disk has; {self._source.name} does not know its size",
                "the data is damaged, or has no end: upload the image anew",
            )
        self._reserve(virtual_size + _STEP)

    def _advance(self, phase: TaskState, done: int) -> None:
        self._on_advance(Advance(phase=phase, done=done, total=self._image.size, at=time.time()))

    def _prove(self, digests: Mapping[str, str]) -> Proof | None:
        if self._check is None:
            return None
        try:
            return self._check.prove(digests[self._check.algorithm])
        except ImageUnacceptable as e:
            if self._image.digest is not None:
                raise
            # Nothing else has told yet whether the bytes were damaged on the way.
            raise ImageCorrupt(e.message, e.hint) from e

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


def _with_whole_head(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what `pieces` does, the first of them at least as long as the head."""
    head = bytearray()
    for piece in pieces:
        head += piece
        if len(head) >= HEAD:
            break
    if head:
        yield bytes(head)
    yield from pieces
