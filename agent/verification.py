"""Verification: reads a base from end to end and holds it against its manifest.

Bytes go bad where nobody looks: a disk that lies, a restore of the wrong
backup, a hand on the wrong file. What does not hash to what the manifest says
is taken out of the cache at once, and whoever stands on it is named.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agent import manifest as manifests
from agent import metrics
from agent.cancellation import Cancellation
from agent.errors import BackendError
from agent.locks import held
from agent.manifest import manifest_path
from agent.store import Entry, Store
from agent.usage import Usage
from agent.views import Soundness, Verification

LOG = logging.getLogger(__name__)

_STEP = 8 << 20  # bytes between two looks at the cancellation, and two pauses
_ALGORITHM = "sha512"


class Verifier:
    """May be shared by any number of threads."""

    def __init__(self, store: Store, usage: Usage) -> None:
        self._store = store
        self._usage = usage

    def verify(
        self,
        image_id: str,
        cancellation: Cancellation,
        *,
        pause: Callable[[], None] = lambda: None,
    ) -> Verification:
        """Read the base of an image; one that is damaged is in quarantine afterwards.

        `pause` is called every few MiB and may sleep.

        Raises:
            NotFound: it is not here.
            BackendError: it cannot be read.
            BootwrightError: what the cancellation was given.
        """
        name = self._store.get(image_id).name
        with held(self._store.lock_of(name), cancellation):
            return self.verify_locked(image_id, cancellation, pause=pause)

    def verify_locked(
        self,
        image_id: str,
        cancellation: Cancellation,
        *,
        pause: Callable[[], None] = lambda: None,
    ) -> Verification:
        """Like `verify`, for a caller that holds the lock of the base."""
        entry = self._store.get(image_id)
        expected = entry.manifest.content_digest
        algorithm = _ALGORITHM if expected is None else expected.partition(":")[0]
        try:
            digest = f"{algorithm}:{_digest(entry.path, algorithm, cancellation, pause)}"
        except OSError as e:
            raise BackendError(
                f"the base {entry.path} of image {image_id} cannot be read: {e.strerror}",
                "if libvirt has given it to another user, make bootwright a member of that "
                "user's group; otherwise look into the kernel's log",
            ) from e
        if expected is None and entry.recognised:
            soundness = Soundness.RECORDED
        else:
            soundness = Soundness.INTACT if digest == expected else Soundness.DAMAGED
        instances: tuple[str, ...] = ()
        if soundness is Soundness.DAMAGED:
            instances = self._quarantine(entry, digest)
        else:
            verified = replace(
                entry.manifest,
                content_digest=digest,
                identity=entry.identity,
                verified_at=time.time(),
            )
            manifests.write(manifest_path(entry.path), verified)
        return Verification(
            image_id=image_id,
            path=str(entry.path),
            soundness=soundness,
            digest=digest,
            expected=expected,
            instances=instances,
        )

    def _quarantine(self, damaged: Entry, digest: str) -> tuple[str, ...]:
        """Take the base away, under all its names; return the instances that stand on it."""
        metrics.VERIFY_FAILURES.inc()
        instances: list[str] = []
        for entry in self._store.entries():
            if entry.identity.inode == damaged.identity.inode:
                instances += self._quarantine_one(entry, digest)
        return tuple(instances)

    def _quarantine_one(self, entry: Entry, digest: str) -> tuple[str, ...]:
        with self._usage.held_still():
            try:
                users = self._usage.of(entry.name)
                in_use, needed_by = users.any, users.describe()
                instances = users.instances
            except BackendError as e:
                # Who needs it cannot be known, so somebody may.
                in_use, needed_by, instances = True, str(e), ()
            self._store.quarantine(entry.name, in_use=in_use)
        LOG.error(
            "the base %s of image %s is damaged: its bytes have %.24s…, right is %.24s…; it is "
            "out of the cache and is fetched anew when it is next needed. Check the disk. %s",
            entry.path,
            entry.manifest.image.id,
            digest,
            entry.manifest.content_digest,
            f"Needed by {needed_by}: an instance that stands on it may have read wrong bytes, and "
            f"reads the right ones once 'bootwright image fetch {entry.manifest.image.id}' is "
            "done and it has been started again"
            if in_use
            else "No instance stands on it",
        )
        return instances


def _digest(
    path: Path, algorithm: str, cancellation: Cancellation, pause: Callable[[], None]
) -> str:
    """Return the hash of a file's bytes as they are on the disk."""
    hasher = hashlib.new(algorithm)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        # What memory still knows would hide what the disk has lost; and what
        # is read here, nobody else needs in memory.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for offset in range(0, size, _STEP):
            cancellation.check()
            pause()
            hasher.update(os.pread(fd, _STEP, offset))
            os.posix_fadvise(fd, offset, _STEP, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return hasher.hexdigest()
