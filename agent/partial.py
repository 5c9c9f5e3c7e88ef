"""A partial: bytes of an image that nobody has verified yet, kept for going on.

    <base name>/state.json    which image it is, and during which boot of the host
    <base name>/…             what the intake that fills it has put there

It is private to one writer, who holds the base's lock.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from agent.files import fsync_directory, write_durably
from agent.image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    version: int = 1
    image_id: str
    disk_format: str
    size: int | None
    digest: str | None
    boot_id: str
    """The boot of the host during which it was written."""
    durable: int
    """Bytes of the image known to have reached the disk."""


_STATE = TypeAdapter(_State)


class Partial:
    """What is there of one image; used by one thread, but for `mark`."""

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory = directory
        self.image = image
        self.same_boot = True
        """Whether the host has run since it was written: then a killed agent has lost nothing."""
        self.durable = 0
        """Bytes of the image that have survived whatever happened."""

    @property
    def data(self) -> Path:
        """The bytes as the source sent them, if they are kept like that."""
        return self.directory / "data"

    @property
    def raw(self) -> Path:
        """The raw disk, if it is another file than `data`."""
        return self.directory / "raw"

    def open(self) -> bool:
        """Return whether there is something of this very image to go on with; or begin anew."""
        state = self._read()
        if state is None:
            self.begin()
            return False
        self.same_boot = state.boot_id == _boot_id()
        self.durable = state.durable
        return True

    def begin(self) -> None:
        """Begin with nothing."""
        self.discard()
        self.directory.mkdir(mode=0o700)
        self.same_boot = True
        self.mark(0)

    def mark(self, durable: int) -> None:
        """Note that `durable` bytes of the image have reached the disk, as of this boot."""
        self.durable = durable
        state = self._state(durable, boot_id=_boot_id())
        write_durably(self.directory / "state.json", _STATE.dump_json(state))

    def discard(self) -> None:
        """Remove the partial; done already is fine."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
            fsync_directory(self.directory.parent)

    def _read(self) -> _State | None:
        try:
            state = _STATE.validate_json((self.directory / "state.json").read_bytes())
        except (OSError, ValidationError):
            return None
        expected = self._state(state.durable, boot_id=state.boot_id)
        return state if state == expected else None

    def _state(self, durable: int, *, boot_id: str) -> _State:
        digest = self.image.digest
        return _State(
            image_id=self.image.id,
            disk_format=self.image.disk_format,
            size=self.image.size,
            digest=None if digest is None else ":".join(digest),
            boot_id=boot_id,
            durable=durable,
        )


def _boot_id() -> str:
    """Return the kernel's name for this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
