"""A twin: a base whose image has the very bytes of an image that is wanted.

Two ids with one content share one file, or its extents. The twin's bytes were
verified against the hash that the wanted image promises, so nothing is asked
of the image source. The caller has the twin pinned.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent import manifest as manifests
from agent.cancellation import Cancellation
from agent.errors import BackendError
from agent.files import copy_sparse
from agent.image import Image
from agent.manifest import Identity, Manifest
from agent.partial import Partial
from agent.proof import Proof
from agent.space import Reservation
from agent.store import Entry

LOG = logging.getLogger(__name__)

# Two files of one MD5 or SHA-1 can be made to order.
_FORGEABLE: Final = frozenset({"md5", "sha1"})


def find(entries: Iterable[Entry], image: Image) -> Entry | None:
    """Return a base with the bytes that `image` promises."""
    if image.digest is None or image.digest[0] in _FORGEABLE:
        return None
    digest = ":".join(image.digest)
    for entry in entries:
        known = entry.manifest
        if (
            entry.recognised
            and known.digest == digest
            # The same bytes may be read as something else under another claim.
            and known.image.disk_format == image.disk_format
            and known.image.container_format == image.container_format
            and known.image.id != image.id
        ):
            return entry
    return None


def lock_name(image: Image) -> str:
    """Return the name of the lock that lets the same bytes be fetched by one at a time."""
    key = image.id if image.digest is None else ":".join(image.digest)
    return f"bytes-{manifests.base_name(key)}"


def take(
    other: Entry, partial: Partial, reservation: Reservation, cancellation: Cancellation
) -> Path | None:
    """Put the twin's bytes into the partial; None if they cannot be had.

    Raises:
        InsufficientFreeSpace: a copy would not fit.
        BootwrightError: what the cancellation was given.
    """
    data = partial.directory / "twin"
    partial.directory.mkdir(mode=0o700, exist_ok=True)
    data.unlink(missing_ok=True)
    try:
        with contextlib.suppress(OSError):
            # fs.protected_hardlinks: not once libvirt has taken the file over.
            # Nor on a file system without links, or with too many of them.
            os.link(other.path, data, follow_symlinks=False)
            return _unchanged(other, data)
        reservation.need(other.allocated)
        copy_sparse(other.path, data, cancellation=cancellation)
        return _unchanged(other, data)
    except (OSError, BackendError) as e:
        LOG.warning(
            "image %s has the same bytes, but its base cannot be used: %s; fetching them",
            other.manifest.image.id,
            e,
        )
        return None


def _unchanged(other: Entry, data: Path) -> Path:
    """Return `data` if the twin is still the file that was verified."""
    if manifests.identity(other.path) != other.manifest.identity:
        raise BackendError(f"{other.path} is not the file it was")
    return data


def manifest(other: Entry, image: Image, identity: Identity, proof: Proof | None) -> Manifest:
    """Return the manifest of the same bytes under another image's id.

    `proof`: of that image's own signature; that of the twin's says nothing of it.
    """
    return replace(
        other.manifest, image=image, identity=identity, proof=proof, created_at=time.time()
    )
