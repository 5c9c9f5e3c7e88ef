"""Proves the signature of an image whose base is there already, if that can be done.

A base is rarely what was signed: that are the bytes of the image, and a base is
the disk within. Where the digest of those bytes is known it suffices; where
they are the base's own they are read again. Otherwise they have to be fetched.
"""

import hashlib
import io
import os
from typing import Final

from agent.cancellation import Cancellation
from agent.errors import BackendError
from agent.proof import Proof
from agent.signatures import Check
from agent.store import Entry

_STEP: Final = 1 << 20


def of_base(entry: Entry, check: Check, cancellation: Cancellation) -> Proof | None:
    """Return the proof for a base, None if only the image's bytes could give it.

    Raises:
        ImageUnacceptable: the signature is wrong.
        BackendError: the base cannot be read.
        BootwrightError: what the cancellation was given.
    """
    known = entry.manifest
    digests = [known.digest] if known.proof is None else [known.digest, known.proof.digest]
    for digest in digests:
        algorithm, _, value = digest.partition(":")
        if algorithm == check.algorithm:
            return check.prove(value)
    if known.content_digest != known.digest:
        return None
    algorithm, _, value = known.digest.partition(":")
    try:
        signed, found = _read(entry, (check.algorithm, algorithm), cancellation)
    except OSError as e:
        raise BackendError(
            f"the base {entry.path} cannot be read: {e.strerror}",
            "if libvirt has given it to another user, make bootwright a member of that user's "
            "group; otherwise look into the kernel's log",
        ) from e
    if found != value:
        return None  # damaged, so that nothing it says of the signature would count
    return check.prove(signed)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _read(entry: Entry, algorithms: tuple[str, str], cancellation: Cancellation) -> tuple[str, str]:
    first, second = (hashlib.new(algorithm) for algorithm in algorithms)
    with io.FileIO(entry.path, opener=_opened) as file:
        while piece := file.read(_STEP):
            cancellation.check()
            first.update(piece)
            second.update(piece)
    return first.hexdigest(), second.hexdigest()
