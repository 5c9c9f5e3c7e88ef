"""Claims: which bases the instances of each host may stand on, for hosts that share a cache.

    .hosts/<host id>.json       written by that host only, read by all

A claim is made, durably, before a host looks whether it has the base, and
taken back long after the last instance has gone. A host that is down for a
week still has its claims, so nobody removes a base from under its guests. A
host that never comes back keeps them until somebody removes its file.

One lock over all of them orders claim and removal: whoever removes holds it
from his look at the claims to the end of the removal.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.cancellation import Cancellation
from agent.errors import BackendError, DeadlineExceeded
from agent.files import write_durably
from agent.locks import held

# It is held for a few milliseconds; longer means that its host has hung.
_LOCK_LIMIT_S = 30.0


class HostClaims(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    host_id: str
    hostname: str
    written_at: float
    bases: frozenset[str]


class Claims:
    """May be shared by any number of threads."""

    def __init__(self, directory: Path, *, lock: Path, host_id: str) -> None:
        """`directory` is `_base/.hosts`; it is made if need be. `lock` is shared with it."""
        self._directory = directory
        self._lock = lock
        self._mutex = threading.Lock()
        self._path = directory / f"{host_id}.json"
        self._host_id = host_id
        directory.mkdir(mode=0o700, exist_ok=True)
        mine = _read(self._path)
        # Of the last run; None is like no claim, and has to be written anew.
        self._bases = None if mine is None else mine.bases

    def add(self, base_name: str) -> None:
        """Claim a base; returns when the claim is durable and no removal is under way.

        Raises:
            BackendError, InsufficientFreeSpace: it cannot be written.
        """
        with self._mutex:
            bases = self._bases or frozenset()
            if base_name in bases:
                return
            with self._locked():
                self._write(bases | {base_name})

    def shrink(self, needed: Callable[[], frozenset[str]]) -> None:
        """Take back the claims on all but what `needed` returns, and make those.

        It is called when nobody can claim, so what it says stays true until
        the claims are written.

        Raises:
            BackendError, InsufficientFreeSpace: they cannot be written.
        """
        with self._mutex:
            bases = needed()
            if bases != self._bases:
                with self._locked():
                    self._write(bases)

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Let no host make a claim during the block.

        Raises:
            BackendError: another host does not let go of the lock.
        """
        with self._mutex, self._locked():
            yield

    def of_others(self) -> Mapping[str, tuple[str, ...]]:
        """Return, for each base that other hosts claim, their names.

        Raises:
            BackendError: a host's file cannot be read, so nobody knows.
        """
        found: dict[str, tuple[str, ...]] = {}
        for path, claims in all_of(self._directory):
            if path == self._path:
                continue
            if claims is None:
                raise BackendError(
                    f"{path} cannot be read, so which bases host {path.stem} needs is unknown",
                    "start the agent of that host, which writes it anew; if the host is gone "
                    "for ever, remove the file",
                )
            for name in claims.bases:
                found[name] = (*found.get(name, ()), claims.hostname)
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(self._lock, Cancellation(_LOCK_LIMIT_S)))
            except DeadlineExceeded as e:
                raise BackendError(
                    f"another host holds the lock {self._lock} for more than {_LOCK_LIMIT_S:g} s",
                    "find out with lslocks who holds it, and why it hangs",
                ) from e
            yield

    def _write(self, bases: frozenset[str]) -> None:
        claims = HostClaims(
            host_id=self._host_id,
            hostname=socket.gethostname(),
            written_at=time.time(),
            bases=bases,
        )
        try:
            write_durably(self._path, claims.model_dump_json(indent=2).encode())
        except OSError as e:
            raise BackendError(
                f"{self._path} cannot be written: {e}", "check the file system"
            ) from e
        self._bases = bases


def all_of(directory: Path) -> Iterator[tuple[Path, HostClaims | None]]:
    """Yield the file of each host, and what it claims; None if that cannot be read."""
    for path in sorted(directory.glob("[!.]*.json")):
        yield path, _read(path)


def _read(path: Path) -> HostClaims | None:
    try:
        return HostClaims.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
