"""A base as a value: a verified, immutable file that disks may stand on."""

from dataclasses import dataclass
from pathlib import Path

from agent.errors import FlavorDiskSmallerThanImage
from agent.image import Image

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Sizes are bytes."""

    path: Path
    format: str
    virtual_size: int
    image: Image
    digest: str | None
    """`algorithm:hex` of what the source sent; None if nobody has read it, see `location`."""
    origin: str
    """`cache`, or the name of the image source it was fetched from just now."""
    received: int = 0
    """What the source sent for it just now."""
    resumed: int = 0
    """What an earlier run had left."""
    location: str | None = None
    """Where a backend has the bytes already: there is no file then, and nobody has read them."""

    @property
    def name(self) -> str:
        """Of the file, and what the privileged helper is told: 40 hex digits."""
        return self.path.name


def check_fits(image: Image, virtual_size: int, max_virtual_size: int | None) -> None:
    """Raises: FlavorDiskSmallerThanImage."""
    if max_virtual_size is not None and virtual_size > max_virtual_size:
        raise FlavorDiskSmallerThanImage(
            f"image {image.id} has a virtual size of {virtual_size} bytes, the flavor's disk "
            f"only {max_virtual_size}",
            f"use a flavor with disk: {-(-virtual_size // GIB)} or more",
        )
