"""Space: what fetches may still write, promised to them together, before they write it.

Each fetch says how much it may still write as soon as a header has told; from
then on nobody else is promised the same bytes. Bases nobody needs make room
before anybody is refused. Other writers on the file system promise nothing, so
a fetch can still meet ENOSPC; it is only no longer the rule.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.errors import InsufficientFreeSpace
from agent.files import free_bytes
from agent.store import Store


class Space:
    """May be shared by any number of threads. Sizes are bytes."""

    def __init__(
        self,
        store: Store,
        *,
        reserved_free_space: int,
        max_size: int | None,
        make_room: Callable[[int], None],
    ) -> None:
        """`reserved_free_space` is left to others; `max_size` bounds the cache, None does not.

        `make_room` removes bases nobody needs if that gives so many bytes back.
        """
        self._store = store
        self._reserved = reserved_free_space
        self._max_size = max_size
        self._make_room = make_room
        self._lock = threading.Lock()
        self._reservations: set[Reservation] = set()

    @contextlib.contextmanager
    def reservation(self, what: str, directory: Path) -> Iterator["Reservation"]:
        """Give a fetch, `what` in messages, that writes in `directory` a reservation to grow."""
        reservation = Reservation(self, what, directory)
        try:
            yield reservation
        finally:
            with self._lock:
                self._reservations.discard(reservation)

    def reserve(self, reservation: "Reservation", count: int) -> None:
        """See `Reservation.need`."""
        with self._lock:
            self._reservations.discard(reservation)
            if self._shortage(count) > 0:
                self._make_room(self._shortage(count))
            if self._shortage(count) > 0:
                raise self._refusal(reservation.what, count)
            reservation.begin(count)
            self._reservations.add(reservation)

    def _promised(self) -> int:
        return sum(reservation.left() for reservation in self._reservations)

    def _shortage(self, count: int) -> int:
        wanted = count + self._promised()
        shortage = wanted + self._reserved - free_bytes(self._store.directory)
        if self._max_size is None:
            return shortage
        return max(shortage, wanted + self._store.allocated() - self._max_size)

    def _refusal(self, what: str, count: int) -> InsufficientFreeSpace:
        free = free_bytes(self._store.directory)
        promised = self._promised()
        rules = f"{free} bytes free, {promised} promised to other fetches, {self._reserved} kept"
        if self._max_size is not None:
            rules += f" free; the cache has {self._store.allocated()} of max_size {self._max_size}"
        else:
            rules += " free"
        return InsufficientFreeSpace(
            f"{what} needs up to {count} bytes more at {self._store.directory}: {rules}, and "
            "removing all bases that nobody needs would not make enough room",
            "free space there, delete instances, or see 'bootwright cache gc --dry-run' for what "
            "keeps each base",
        )


class Reservation:
    """What one fetch has been promised; belongs to one thread."""

    def __init__(self, space: Space, what: str, directory: Path) -> None:
        self.what = what
        self._space = space
        self._directory = directory
        self._promised = 0
        self._allocated_before = 0

    def need(self, count: int) -> None:
        """Have `count` bytes from now on, in place of what is left of earlier ones.

        Raises:
            InsufficientFreeSpace: even with all bases removed that nobody needs.
        """
        self._space.reserve(self, count)

    def end(self) -> None:
        """Need no more: all of it is written, and may leave the directory.

        What has left it would look as if it were still to be written, and be
        counted a second time.
        """
        self._promised = 0

    def begin(self, count: int) -> None:
        self._allocated_before = self._allocated()
        self._promised = count

    def left(self) -> int:
        """Return what it may still write: what the disk shows is written already.

        Holes stay promised until the end; nobody knows where the next one is.
        """
        return max(0, self._promised - (self._allocated() - self._allocated_before))

    def _allocated(self) -> int:
        total = 0
        with contextlib.suppress(FileNotFoundError):
            for path in self._directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += path.lstat().st_blocks * 512
        return total
