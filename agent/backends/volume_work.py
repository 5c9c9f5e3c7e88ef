"""Who works on which volume, in this process: many on one, or somebody alone."""

import collections
import contextlib
import threading
from collections.abc import Iterator

from agent.cancellation import Cancellation


class VolumeWork:
    """Of one volume group; may be shared by any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._busy: collections.Counter[str] = collections.Counter()
        self._alone: set[str] = set()
        self._makers: dict[str, threading.Lock] = {}

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Work on a volume, whatever state it is in, beside others; wait while one has it alone."""
        with self._lock:
            self._lock.wait_for(lambda: name not in self._alone)
            self._busy[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[name] -= 1
                self._busy += collections.Counter()  # forgets what is at zero

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Give whether nobody works on a volume; if so, who wants to waits for the block's end."""
        with self._lock:
            alone = not self._busy[name] and name not in self._alone
            if alone:
                self._alone.add(name)
        try:
            yield alone
        finally:
            if alone:
                with self._lock:
                    self._alone.discard(name)
                    self._lock.notify_all()

    @contextlib.contextmanager
    def making(self, name: str, cancellation: Cancellation) -> Iterator[None]:
        """Make a volume that others may want at the same time; they wait, and find it made.

        Raises:
            BootwrightError: the reason of the cancellation.
        """
        with self._lock:
            lock = self._makers.setdefault(name, threading.Lock())
        while not lock.acquire(timeout=0.2):
            cancellation.check()
        try:
            yield
        finally:
            lock.release()
