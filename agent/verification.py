"""Verification: reads a base from end to end and holds it against its manifest.

Bytes go bad where nobody looks: a disk that lies, a restore of the wrong
backup, a hand on the wrong file. What does not hash to what the manifest says
is taken out of the cache at once, and whoever stands on it is named.
"""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent import metrics
from agent.cancellation import Cancellation
from agent.errors import BackendError
from agent.locks import held
from agent.store import Entry, Store
from agent.usage import Usage
from agent.views import Soundness, Verification

LOG = logging.getLogger(__name__)

_STEP = 8 << 20  # bytes between two looks at the cancellation, and two pauses
_ALGORITHM = "sha512"

# What the kernel says of bytes that the disk or the file system has lost.
_LOST: Final = (errno.EIO, errno.EUCLEAN, errno.ENODATA)

Pread = Callable[[int, int, int], bytes]


class Verifier:
    """May be shared by any number of threads."""

    def __init__(self, store: Store, usage: Usage, *, pread: Pread = os.pread) -> None:
        """`pread` reads so many bytes of a descriptor from an offset on, or fewer."""
        self._store = store
        self._usage = usage
        self._pread = pread

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
            BackendError, InsufficientFreeSpace: it may not be read, or what was found
                cannot be written down.
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
        if expected is None and not entry.recognised:
            return self._unrecognised(entry)
        algorithm = _ALGORITHM if expected is None else expected.partition(":")[0]
        try:
            digest = f"{algorithm}:{self._digest(entry.path, algorithm, cancellation, pause)}"
            soundness = _judged(digest, expected)
        except _BytesLost as e:
            digest, soundness = str(e), Soundness.DAMAGED
        except OSError as e:
            raise BackendError(
                f"the base {entry.path} of image {image_id} cannot be read: {e.strerror}",
                "if libvirt has given it to another user, make bootwright a member of that "
                "user's group; otherwise look into the kernel's log",
            ) from e
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
            self._store.update(entry.name, verified)
        return Verification(
            image_id=image_id,
            path=str(entry.path),
            soundness=soundness,
            digest=digest,
            expected=expected,
            instances=instances,
        )

    def _unrecognised(self, entry: Entry) -> Verification:
        """Take a base out of the cache of which nobody can say whether it is right."""
        image_id = entry.manifest.image.id
        LOG.warning(
            "the base %s of image %s is not the file it was, as after a restore, and cannot be "
            "recognised: nobody had hashed its bytes; it is fetched anew when it is next needed",
            entry.path,
            image_id,
        )
        self._store.forget(entry.name)
        return Verification(
            image_id=image_id,
            path=str(entry.path),
            soundness=Soundness.UNRECOGNISED,
            digest="",
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
        instances: tuple[str, ...] = ()
        in_use, needed_by = True, ""
        try:
            with self._usage.held_still():
                users = self._usage.of(entry.name)
                in_use, needed_by, instances = users.any, users.describe(), users.instances
                if not in_use:
                    self._store.quarantine(entry.name, in_use=False)
        except BackendError as e:
            # Who needs it cannot be known, so somebody may.
            in_use, needed_by = True, str(e)
        if in_use:
            self._store.quarantine(entry.name, in_use=True)
        LOG.error(
            "the base %s of image %s is damaged: its bytes are %.31s…, right is %.24s…; it is "
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
        self, path: Path, algorithm: str, cancellation: Cancellation, pause: Callable[[], None]
    ) -> str:
        """Return the hash of a file's bytes as they are on the disk.

        Raises:
            _BytesLost: where they cannot be had from it.
            OSError: it cannot be asked.
        """
        hasher = hashlib.new(algorithm)
        position = 0
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            # What memory still knows would hide what the disk has lost; and what
            # is read here, nobody else needs in memory.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while position < size:
                cancellation.check()
                pause()
                piece = self._pread(fd, min(_STEP, size - position), position)
                if not piece:
                    raise _BytesLost(position)  # it was cut meanwhile
                hasher.update(piece)
                os.posix_fadvise(fd, position, len(piece), os.POSIX_FADV_DONTNEED)
                position += len(piece)
        except OSError as e:
            if e.errno in _LOST:
                raise _BytesLost(position) from e
            raise
        finally:
            os.close(fd)
        return hasher.hexdigest()


class _BytesLost(Exception):
    def __init__(self, position: int) -> None:
        super().__init__(f"unreadable at byte {position}")


def _judged(digest: str, expected: str | None) -> Soundness:
    if expected is None:
        return Soundness.RECORDED
    return Soundness.INTACT if digest == expected else Soundness.DAMAGED
