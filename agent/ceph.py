"""A Ceph cluster, in the few calls that disks in it need.

A connection that the cluster has given up (an OSD's blocklist, monitors that moved
while the agent slept) never works again: whoever meets that has it replaced.
"""

import configparser
import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from agent import ceph_bindings
from agent.ceph_bindings import Bindings
from agent.ceph_pool import Pool
from agent.errors import BackendError, InsufficientFreeSpace

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# Monitors move rarely, and whoever is started meanwhile needs one that is left.
_MONITORS_S: Final = 300.0
# One call for one object, which a cluster that is down does not answer; with the second attempt
# a job has lost a minute by then.
_CALL_LIMIT_S: Final = 30
_UNLIMITED: Final = ("0", "0.000000")

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# ESHUTDOWN is what a client on the blocklist gets, which Ceph also calls EBLOCKLISTED. A
# connection whose monitors have moved just gets no answer.
_LOST: Final = (errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT)
_NOT_FOR_US: Final = (errno.ENOENT, errno.EPERM, errno.EACCES)


class Connection:
    """One connection of one user; threads may share it.

    Every method raises `BackendError` if the cluster is away or refuses,
    `InsufficientFreeSpace` if it is full.
    """

    def __init__(
        self,
        bindings: Bindings,
        *,
        conf: str,
        user: str,
        connect_timeout_s: float,
        call_limit_s: int,
        clock: Callable[[], float],
    ) -> None:
        self._rados = bindings.rados
        self._rbd = bindings.rbd
        self._user = user
        self._clock = clock
        self._monitors: tuple[tuple[str, int], ...] = ()
        self._monitors_at = 0.0
        self._lost = False
        try:
            # It shuts down with the last reference to it: other threads may be in a call.
            self._handle = self._rados.Rados(conffile=conf, name=f"client.{user}")
            for option in ("rados_osd_op_timeout", "rados_mon_op_timeout"):
                # Ceph's own default is to wait for ever.
                if self._handle.conf_get(option) in _UNLIMITED:
                    self._handle.conf_set(option, str(call_limit_s))
            # Without it a wrong key is waited for five minutes, as QEMU does.
            self._handle.connect(timeout=connect_timeout_s)
        except self._rados.Error as e:
            raise BackendError(
                f"connecting to Ceph as client.{user}: {e}",
                "check images_rbd_ceph_conf and rbd_user in [libvirt], that the keyring can be "
                "read by the agent's user, and 'ceph -s'",
            ) from e

    @property
    def lost(self) -> bool:
        """Whether a call has found out that it will never work again."""
        return self._lost

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except (self._rados.Error, self._rbd.Error) as e:
            number = getattr(e, "errno", None)
            if number in _LOST:
                self._lost = True
            if number in _FULL:
                raise InsufficientFreeSpace(
                    f"{what}: the cluster, or a quota in it, is full", "free space in it"
                ) from e
            raise BackendError(f"{what}: {e}", "look at the cluster with 'ceph -s'") from e

    @property
    def fsid(self) -> str:
        with self._translated("asking for the id of the cluster"):
            return str(self._handle.get_fsid())

    def monitors(self) -> tuple[tuple[str, int], ...]:
        """Return address and port of each monitor, as QEMU wants them (protocol v1)."""
        if self._monitors and self._clock() - self._monitors_at < _MONITORS_S:
            return self._monitors
        what = "asking for the monitors of the cluster"
        with self._translated(what):
            status, answer, error = self._handle.mon_command(
                json.dumps({"prefix": "mon dump", "format": "json"}), b""
            )
        if status:
            # This call tells by a number what all others raise.
            self._lost = self._lost or abs(status) in _LOST
            raise BackendError(
                f"{what}: {error or os.strerror(abs(status))}",
                f"client.{self._user} needs mon 'profile rbd'; else see 'ceph -s'",
            )
        found = []
        for monitor in json.loads(answer)["mons"]:
            address, _, port = monitor["public_addr"].partition("/")[0].rpartition(":")
            found.append((address.strip("[]"), int(port)))
        self._monitors, self._monitors_at = tuple(found), self._clock()
        return self._monitors

    def key(self) -> bytes:
        """Return the user's key, as its keyring has it.

        Raises:
            BackendError: no keyring of those configured has it, or can be read.
        """
        section = f"client.{self._user}"
        with self._translated("asking for the places of keyrings"):
            configured = self._handle.conf_get("keyring")
        places = [Path(place.strip()) for place in configured.split(",")]
        for place in places:
            keyring = configparser.ConfigParser(interpolation=None)
            try:
                keyring.read_string(place.read_text())
            except (OSError, configparser.Error, UnicodeDecodeError):
                continue
            key = keyring.get(section, "key", fallback=None)
            if key:
                return key.strip().encode()
        raise BackendError(
            f"no keyring has the key of {section}: {', '.join(map(str, places))}",
            "the agent's user has to be able to read it",
        )

    @contextlib.contextmanager
    def pool(self, name: str) -> Iterator[Pool]:
        with self._translated(f"opening pool {name}"):
            context = self._handle.open_ioctx(name)
        try:
            yield Pool(name, context, self._rbd, self._translated)
        finally:
            context.close()

    def clone(self, parent: tuple[str, str, str], pool: Pool, name: str) -> None:
        """Make image `name` of a protected snapshot: pool, image, snapshot."""
        parent_pool, image, snapshot = parent
        with self._translated(f"cloning {'/'.join(parent)} to {pool.name}/{name}"):
            context = self._handle.open_ioctx(parent_pool)
            try:
                self._rbd.RBD().clone(context, image, snapshot, pool.context, name)
            finally:
                context.close()

    def snapshot_size(self, parent: tuple[str, str, str]) -> int | None:
        """Return the bytes of a snapshot; None if it is not there, or not for us."""
        parent_pool, image, snapshot = parent
        try:
            with self._translated(f"looking at {'/'.join(parent)}"):
                context = self._handle.open_ioctx(parent_pool)
                try:
                    return self._size_if_protected(context, image, snapshot)
                finally:
                    context.close()
        except BackendError as e:
            if getattr(e.__cause__, "errno", None) in _NOT_FOR_US:
                return None
            raise

    def _size_if_protected(self, context: Any, image: str, snapshot: str) -> int | None:
        with self._rbd.Image(context, image, snapshot=snapshot, read_only=True) as opened:
            return int(opened.size()) if opened.is_protected_snap(snapshot) else None


class Cluster:
    """One cluster as one of its users sees it; threads may share it."""

    def __init__(
        self,
        conf: Path | None,
        user: str,
        *,
        connect_timeout_s: float,
        call_limit_s: int = _CALL_LIMIT_S,
        bindings: Bindings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects at the first call.

        Args:
            conf: None for Ceph's own places.
            call_limit_s: for one call of librados, where Ceph's configuration has no limit.
            bindings: None for those of this host.
        """
        self._bindings = bindings or ceph_bindings.load()
        self._conf = "" if conf is None else os.fspath(conf)
        self.user = user
        self._connect_timeout_s = connect_timeout_s
        self._call_limit_s = call_limit_s
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def connection(self) -> Connection:
        """Return the connection in use, or another if that is lost.

        Raises:
            BackendError: the cluster is away or refuses.
        """
        with self._lock:
            if self._connection is None or self._connection.lost:
                self._connection = Connection(
                    self._bindings,
                    conf=self._conf,
                    user=self.user,
                    connect_timeout_s=self._connect_timeout_s,
                    call_limit_s=self._call_limit_s,
                    clock=self._clock,
                )
            return self._connection

    def call(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns; have it done again, once, if its connection is lost.

        So `work` has to come to the same when it was done before, in part or as a whole.

        Raises:
            BackendError: the cluster is away or refuses.
            And whatever else `work` raises.
        """
        connection = self.connection()
        try:
            return work(connection)
        except BackendError as e:
            if not connection.lost:
                raise
            LOG.warning("lost the connection to Ceph, opening another: %s", e.message)
        return work(self.connection())
