"""Where the bytes of an image go once they were inspected: hashed and written, once.

Two ways: `plain` keeps them as they are, `decoded` makes the raw disk of them
on the way. Either can go on where an earlier run was interrupted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from agent.inspection import Verdict


class Intake(Protocol):
    """One image's; a context manager that closes its files; for one thread."""

    @property
    def kept(self) -> int:
        """Bytes of the image that an earlier run had left and that count."""

    @property
    def offset(self) -> int:
        """Bytes of the image that have been taken, those kept included."""

    def take(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            Undecodable: they contradict what came before.
            OSError, InsufficientFreeSpace: they, or some before them, cannot be written.
        """

    def digests(self) -> Mapping[str, str]:
        """Return the hex digests, by algorithm, of all that was taken.

        It is on stable storage now. Raises as `take`.
        """

    def disk(self, verdict: Verdict) -> Path:
        """Return the raw disk that came of it, on stable storage.

        Raises:
            ImageUnacceptable: no disk can be made of it.
            InsufficientFreeSpace, BackendError
        """

    def close(self) -> None:
        """Close the files; what is in them stays, a reboot of the host included.

        May be called again.
        """


class Undecodable(Exception):
    """The bytes break a rule of their format: damaged on the way, or made so. Says which."""
