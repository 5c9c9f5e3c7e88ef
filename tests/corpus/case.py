"""What a case is, and what all of them are made with."""

import enum
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_random = random.Random(7)
CONTENT = _random.randbytes(MIB) + bytes(MIB) + _random.randbytes(300 * KIB)
"""Of a disk; begins with no format's magic."""

VMDK_TYPES: Final = ("monolithicSparse", "streamOptimized")
"""What is allowed by default."""

Answer = Callable[[bytes, int], Iterator[bytes]]
"""The body a source sends when asked for the image from an offset on."""


def honest_answer(data: bytes, offset: int) -> Iterator[bytes]:
    for position in range(offset, len(data), MIB):
        yield data[position : position + MIB]


class By(enum.Enum):
    """Who has to refuse an image, the first that can; no program of QEMU has run then."""

    INSPECTION = "inspection"
    """From the bytes alone."""
    CACHE = "cache"
    """From the record, the flavor, the free space, while it is decoded, or from all its tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image, as it is uploaded and as it arrives."""

    data: bytes
    truth: bytes | None = None
    """What the disk holds; None: the image's own bytes. Zeros may follow."""
    size: int | None = None
    """Of the record; None: what is true."""
    digest: tuple[str, str] | None = None
    """Of the record; None: what is true."""
    answers: tuple[Answer, ...] = field(default=(honest_answer,))
    """For the first request, the second …; the last one for all that follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    number: int
    name: str
    disk_format: str
    """Of the record."""
    make: Callable[[Path], Sample]
    """Given an empty directory to work in."""
    refused: str | None
    """What the message says (a regular expression); None: it is accepted."""
    by: By = By.INSPECTION
    max_virtual_size: int | None = None
    """The flavor's disk in bytes, if there is one."""
    hash_known: bool = True
    size_known: bool = True

    def __str__(self) -> str:
        return f"{self.number}-{self.name}".replace(" ", "-")


def bytes_of(make: Callable[[], bytes], truth: bytes | None = None) -> Callable[[Path], Sample]:
    """Return the `make` of a case that needs no directory."""
    return lambda _: Sample(data=make(), truth=truth)


def converted(
    work: Path,
    qemu_format: str,
    options: str = "",
    *,
    content: bytes = CONTENT,
    compress: bool = False,
) -> bytes:
    """Return what qemu-img makes of `content`."""
    raw, made = work / "content", work / "made"
    raw.write_bytes(content)
    words = [*(["-o", options] if options else []), *(["-c"] if compress else [])]
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", qemu_format, *words, raw, made], check=True
    )
    return made.read_bytes()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """Return `data` with other bytes at one place; a longer one if need be."""
    data = data.ljust(at, b"\0")
    return data[:at] + new + data[at + len(new) :]
