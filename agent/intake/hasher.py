"""Hashes, each in a thread of its own.

SHA-512 costs more than network and disk together (about 1.6 s a GiB on one
core); the library lets go of the interpreter lock, so beside them it costs
only itself.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

# Enough for the hash to ride out a slow write, little enough to count on.
_CHUNKS = 16


class Hash(Protocol):
    """What hashlib's objects and `agent.resumable_hash.Sha512` have in common."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Hasher:
    """Owns the hash from here on; used by one thread besides its own."""

    def __init__(self, hash_: Hash) -> None:
        self._hash = hash_
        self._work: queue.Queue[bytes | Callable[[], None] | None] = queue.Queue(_CHUNKS)
        self._thread = threading.Thread(target=self._run, name="image-hash")
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, bytes):
                self._hash.update(work)
            else:
                work()

    def update(self, chunk: bytes) -> None:
        self._work.put(chunk)

    def after(self, function: Callable[[], bytes]) -> "Future[bytes]":
        """Call `function` when all given to `update` so far has been hashed."""
        future: Future[bytes] = Future()
        self._work.put(lambda: future.set_result(function()))
        return future

    def hexdigest(self) -> str:
        """Wait for what was given to `update`, and return the digest."""
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread; may be called again."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()


class Hashers:
    """Several hashes of the same bytes, by algorithm; used by one thread besides theirs."""

    def __init__(self, hashes: Mapping[str, Hash]) -> None:
        self._hashers = {algorithm: Hasher(hash_) for algorithm, hash_ in hashes.items()}

    def update(self, chunk: bytes) -> None:
        for hasher in self._hashers.values():
            hasher.update(chunk)

    def after(self, algorithm: str, function: Callable[[], bytes]) -> "Future[bytes]":
        """As `Hasher.after`, of that hash."""
        return self._hashers[algorithm].after(function)

    def hexdigests(self) -> dict[str, str]:
        """Wait for what was given to `update`, and return the digests."""
        return {algorithm: hasher.hexdigest() for algorithm, hasher in self._hashers.items()}

    def close(self) -> None:
        """End the threads; may be called again."""
        for hasher in self._hashers.values():
            hasher.close()
