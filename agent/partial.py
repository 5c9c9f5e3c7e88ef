"""A partial: bytes of an image that nobody has verified yet, kept for going on.

    <base name>/state.json    which image it is, and how far it surely reaches
    <base name>/data          the bytes as the source sent them
    <base name>/raw           what qemu-img made of them, if they were not raw

It is private to one writer, who holds the base's lock.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from os import fdatasync
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from agent.files import fsync_directory, write_durably
from agent.image import Image

# How much a crash of the whole host may cost: what lies beyond the last mark
# may be in the page cache only. A killed agent loses nothing of it.
MARK_EVERY = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    version: int = 1
    image_id: str
    disk_format: str
    size: int | None
    digest: str | None
    boot_id: str
    """The boot of the host during which `data` was written."""
    durable: int
    """Bytes of `data` known to have reached the disk."""


_STATE = TypeAdapter(_State)


class Partial:
    """What is there of one image; used by one thread, but for its `Marker`."""

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.raw = directory / "raw"
        self._image = image

    def keep(self) -> int:
        """Return how many bytes of `data` can be gone on with; 0 begins anew."""
        kept = self._surviving()
        if kept == 0:
            self.discard()
            self.directory.mkdir(mode=0o700)
            self.data.touch(mode=0o640)
        self.mark(kept)
        return kept

    def _surviving(self) -> int:
        try:
            state = _STATE.validate_json((self.directory / "state.json").read_bytes())
            length = self.data.stat().st_size
        except (OSError, ValidationError):
            return 0
        if state != self._state(state.durable, boot_id=state.boot_id):
            return 0
        # What an agent that was killed had written is in the page cache or on
        # the disk; after a boot of the host only what was synced is certain.
        kept = length if state.boot_id == _boot_id() else min(length, state.durable)
        return 0 if self._image.size is not None and kept > self._image.size else kept

    def mark(self, durable: int) -> None:
        """Note that `durable` bytes of `data` have reached the disk."""
        state = self._state(durable, boot_id=_boot_id())
        write_durably(self.directory / "state.json", _STATE.dump_json(state))

    def _state(self, durable: int, *, boot_id: str) -> _State:
        digest = self._image.digest
        return _State(
            image_id=self._image.id,
            disk_format=self._image.disk_format,
            size=self._image.size,
            digest=None if digest is None else ":".join(digest),
            boot_id=boot_id,
            durable=durable,
        )

    def discard(self) -> None:
        """Remove the partial; done already is fine."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
            fsync_directory(self.directory.parent)

    def discard_if_empty(self) -> None:
        if not self.data.exists() or self.data.stat().st_size == 0:
            self.discard()


class Marker:
    """Syncs `data` and marks the partial now and then, beside the writer.

    In a thread of its own: an fdatasync takes as long as the disk wants, and
    the network should not wait for it.
    """

    def __init__(self, fd: int, mark: Callable[[int], None]) -> None:
        self._fd = fd
        self._mark = mark
        self._condition = threading.Condition()
        self._reached = 0
        self._marked = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="partial-marker")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def reached(self, offset: int) -> None:
        """Tell that `data` has been written up to `offset`.

        Raises:
            OSError: an earlier sync failed; what was written may be lost.
        """
        with self._condition:
            if self._error is not None:
                raise self._error
            self._reached = offset
            if self._reached - self._marked >= MARK_EVERY:
                self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._closing or self._reached - self._marked >= MARK_EVERY
                )
                if self._closing:
                    return
                offset = self._reached
            try:
                fdatasync(self._fd)
                self._mark(offset)
            except OSError as e:
                with self._condition:
                    self._error = e
                return
            with self._condition:
                self._marked = offset


def _boot_id() -> str:
    """Return the kernel's name for this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
