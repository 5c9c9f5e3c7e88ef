"""The manifest beside a base: what it is, where it came from, that it is whole.

`_base/<name>` is an entry of the image cache if and only if
`_base/<name>.json` exists, and that is written last.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from agent.files import write_durably
from agent.image import Image
from agent.proof import Proof


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Which file it was that was verified.

    Times are no part of it: the last use is kept in one, and libvirt moves the
    other whenever it gives the file to another user. So a byte flipped in
    place is found by the scrub only; but whatever replaces the file (a restore
    from a backup, a copy to another disk) has another inode.
    """

    inode: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Sizes are bytes, instants seconds since the epoch."""

    version: int = 1
    image: Image
    """The image's record when it was fetched; stands in for the source when that is away."""
    format: str = "raw"
    """Of the base."""
    virtual_size: int
    source_format: str
    """Of the bytes the source sent."""
    source_size: int
    digest: str
    """`algorithm:hex` of the bytes the source sent."""
    content_digest: str | None
    """`algorithm:hex` of the base's own bytes; None until somebody has hashed them."""
    proof: Proof | None = None
    """That the image's signature is right; None as long as nobody has demanded it."""
    identity: Identity
    """Of the base, when its bytes were last known to be right."""
    verified_at: float
    created_at: float
    fetched_by: str = "bootwright"


_MANIFEST = TypeAdapter(Manifest)


def base_name(image_id: str) -> str:
    """Return the file name of an image's base: Nova's, the SHA-1 of the id.

    Only a name: nothing rests on the strength of the hash.
    """
    return hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()


def manifest_path(base: Path) -> Path:
    return base.with_name(base.name + ".json")


def identity(base: Path) -> Identity:
    """Raises: OSError."""
    status = base.lstat()
    return Identity(inode=status.st_ino, size=status.st_size)


def read(path: Path) -> Manifest | None:
    """Return the manifest at `path`, None if there is none or it cannot be understood.

    A manifest of a release that wrote other fields is as good as none: the
    base is fetched anew, and nothing is guessed about it.
    """
    try:
        status = path.stat()
        manifest = _parsed(path, status.st_ino, status.st_size, status.st_mtime_ns)
    except (FileNotFoundError, ValidationError):
        return None
    return manifest if manifest.version == 1 else None


# Each boot looks several times. What is written is never changed, but replaced.
@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, _inode: int, _size: int, _changed: int) -> Manifest:
    return _MANIFEST.validate_json(path.read_bytes())


def write(path: Path, manifest: Manifest) -> None:
    write_durably(path, _MANIFEST.dump_json(manifest, indent=2))
