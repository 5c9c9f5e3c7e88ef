"""Keeps the bytes of an image as they are, sparse; afterwards converts what is not raw.

    data    the bytes as the source sent them
    raw     what qemu-img made of them, if they were not raw

An earlier run's `data` is read once, to bring hash and inspection up to it.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent import disk_bounds, disk_start
from agent.cancellation import Cancellation
from agent.errors import BootwrightError, ImageUnacceptable
from agent.files import first_bytes, reporting_no_space
from agent.inspection import HEAD, Inspection, Verdict, refuse_nested
from agent.intake.hasher import Hashers
from agent.intake.marker import Marker
from agent.intake.writer import Writer
from agent.partial import Partial
from agent.sparse import SparseFile

_PIECE = 1 << 20

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
        virtual_size: int,
    ) -> None: ...


class PlainIntake:
    """See `Intake`."""

    def __init__(
        self,
        partial: Partial,
        inspection: Inspection,
        *,
        algorithms: Sequence[str],
        converter: Converter,
        cancellation: Cancellation,
    ) -> None:
        """Go on with what `partial` has, which `inspection` is shown.

        Raises:
            ImageUnacceptable: what is there already is not what it claims to be.
        """
        self._partial = partial
        self._inspection = inspection
        self._converter = converter
        self._cancellation = cancellation
        # What an agent that was killed had written is in the page cache or on
        # the disk; after a boot of the host only what was synced is certain.
        length = partial.data.stat().st_size if partial.data.exists() else 0
        self.kept = length if partial.same_boot else min(length, partial.durable)
        self._size = self._written = self.kept
        self._worth_marking = False
        with contextlib.ExitStack() as undo:
            # Holes are only right where nothing was: what lies beyond is dropped.
            self._file = SparseFile(partial.data, length=self.kept)
            undo.callback(self._file.close)
            partial.mark(min(self.kept, partial.durable))
            self._hashers = Hashers({name: hashlib.new(name) for name in algorithms})
            undo.callback(self._hashers.close)
            self._marker = Marker(self._settle, self.kept)
            undo.callback(self._marker.close)
            self._writer = Writer(self._write)
            undo.callback(self._writer.close)
            self._replay()
            self._closing = undo.pop_all()

    def _replay(self) -> None:
        with self._partial.data.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                self._cancellation.check()
                self._inspection.feed(piece)
                self._hashers.update(piece)

    @property
    def offset(self) -> int:
        return self._size

    def take(self, chunk: bytes) -> None:
        self._hashers.update(chunk)
        self._writer.put(chunk)
        self._size += len(chunk)

    def _write(self, chunk: bytes) -> None:
        """Write the next bytes; in the writer's thread."""
        self._worth_marking = False
        written = self._written + len(chunk)
        with reporting_no_space(self._partial.data, len(chunk), "writing"):
            self._file.write(chunk, 0, len(chunk), self._written)
            if chunk and not chunk[-1]:
                # The file's length alone says where a later run goes on.
                self._file.truncate(written)
        self._written = written
        self._marker.reached(written, lambda: written)
        self._worth_marking = True

    def _settle(self, offset: int) -> None:
        # Through the descriptor that was written to: another one, opened after
        # a write was lost, would not hear of it.
        self._flush()
        self._partial.mark(offset)

    def _flush(self) -> None:
        with reporting_no_space(self._partial.data, 0, "flushing"):
            self._file.flush()

    def digests(self) -> Mapping[str, str]:
        self._writer.close()
        self._worth_marking = False
        self._writer.check()
        self._marker.close()
        self._marker.check()
        self._flush()
        return self._hashers.hexdigests()

    def disk(self, verdict: Verdict) -> Path:
        if verdict.format in PLAIN_FORMATS:
            return self._partial.data
        self._look(verdict)
        raw = self._partial.raw
        raw.unlink(missing_ok=True)
        try:
            self._converter.convert(
                self._partial.data,
                verdict.format,
                raw,
                self._cancellation,
                virtual_size=verdict.virtual_size,
            )
        except ImageUnacceptable as e:
            raise ImageUnacceptable(f"image {self._partial.image.id}: {e.message}", e.hint) from e
        # Once more, of what QEMU has made of it.
        refuse_nested(self._partial.image.id, first_bytes(raw, HEAD))
        return raw

    def _look(self, verdict: Verdict) -> None:
        """Look at tables and at the disk within before anything of QEMU opens the image."""
        image_id = self._partial.image.id
        data, format_ = self._partial.data, verdict.format
        try:
            head = disk_start.read(data, format_, min(HEAD, verdict.virtual_size))
            disk_bounds.check(data, format_, self._cancellation)
        except ValueError as e:
            raise ImageUnacceptable(
                f"image {image_id}: it is cut short or damaged: {e}",
                "make it anew, with 'qemu-img convert -O qcow2', and upload that",
            ) from e
        refuse_nested(image_id, head)

    def close(self) -> None:
        self._writer.close()
        self._marker.close()
        try:
            self._marker.check()
            if self._worth_marking:
                # Whoever stops the agent may be about to reboot the host.
                self._settle(self._written)
        except (OSError, BootwrightError):
            # What the disk has lost the page cache still shows to a later run.
            with contextlib.suppress(OSError):
                self._file.truncate(self._partial.durable)
        self._worth_marking = False
        self._closing.close()
