"""Writes what arrives in a thread of its own, in order.

A write waits for the disk, and beside it the network has more to bring: one
after the other they would take as long as both.
"""

import queue
import threading
from collections.abc import Callable

# Enough to ride out a flush. What is in it an agent that is killed asks for again.
_CHUNKS = 16


class Writer:
    """Used by one thread besides its own."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        """`write` is called in the thread, with each chunk; not again once it has raised."""
        self._write = write
        self._work: queue.Queue[bytes | None] = queue.Queue(_CHUNKS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="image-write")
        self._thread.start()

    def _run(self) -> None:
        while (chunk := self._work.get()) is not None:
            if self._error is not None:
                continue  # so that nobody waits for room
            try:
                self._write(chunk)
            except BaseException as e:  # noqa: BLE001 - whoever puts the next chunk gets it
                self._error = e

    def put(self, chunk: bytes) -> None:
        """Have `chunk` written after those before it. Raises what an earlier write has raised."""
        self.check()
        self._work.put(chunk)

    def check(self) -> None:
        """Raise what a write has raised."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until all is written that can be, and end the thread; may be called again."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()
