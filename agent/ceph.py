"""A Ceph cluster, in the few calls that disks in it need: librados and librbd.

Their Python modules are no packages of PyPI. They are Debian's python3-rados and
python3-rbd, and are loaded from where these lie, nothing else with them.
"""

import configparser
import contextlib
import errno
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol, Self, cast

from agent import sparse
from agent.cancellation import Cancellation
from agent.errors import BackendError, InsufficientFreeSpace

_DEBIAN: Final = "/usr/lib/python3/dist-packages"
_PACKAGES: Final = {"rados": "python3-rados", "rbd": "python3-rbd"}

# Monitors move rarely, and whoever is started meanwhile needs one that is left.
_MONITORS_S: Final = 300.0
# One call for one object; a cluster that is down answers none.
_CALL_LIMIT_S: Final = 60
_STEP: Final = 4 << 20  # one object of an image
_OURS: Final = "bootwright.instance"
"""The key of an image's metadata that says whose it is."""


class Image(Protocol):
    """The calls in use of `rbd.Image`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def size(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def write(self, data: bytes, offset: int) -> int: ...
    def flush(self) -> None: ...
    def metadata_get(self, key: str) -> str: ...
    def metadata_set(self, key: str, value: str) -> None: ...


def available() -> str | None:
    """Return what is missing to speak to Ceph; None if nothing is."""
    for name, package in _PACKAGES.items():
        try:
            _module(name)
        except ImportError:
            return package
    return None


def _module(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name) or importlib.machinery.PathFinder.find_spec(
        name, [_DEBIAN]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no module {name}", name=name)
    module = importlib.util.module_from_spec(spec)
    # Before it runs: rbd imports rados by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Cluster:
    """One cluster as one of its users sees it; threads may share it.

    Every method raises `BackendError` if the cluster is away or refuses.
    """

    def __init__(self, conf: Path | None, user: str, *, connect_timeout_s: float) -> None:
        """Connects at the first call. `conf`: None for Ceph's own places."""
        self._rados = cast("Any", _module("rados"))
        self._rbd = cast("Any", _module("rbd"))
        self._conf = "" if conf is None else os.fspath(conf)
        self.user = user
        self._connect_timeout_s = connect_timeout_s
        self._lock = threading.Lock()
        self._connection: Any = None
        self._monitors: tuple[tuple[str, int], ...] = ()
        self._monitors_at = 0.0

    def _connected(self) -> Any:
        with self._lock:
            if self._connection is None:
                what = f"connecting to Ceph as client.{self.user}"
                with self._translated(what):
                    connection = self._rados.Rados(conffile=self._conf, name=f"client.{self.user}")
                    for option in ("rados_osd_op_timeout", "rados_mon_op_timeout"):
                        # Ceph's own default is to wait for ever.
                        if connection.conf_get(option) in ("0", "0.000000"):
                            connection.conf_set(option, str(_CALL_LIMIT_S))
                    # Without it a wrong key is waited for five minutes, as QEMU does.
                    connection.connect(timeout=self._connect_timeout_s)
                self._connection = connection
            return self._connection

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._rados.OSError as e:
            if isinstance(e, self._rados.NoSpace):
                raise InsufficientFreeSpace(
                    f"{what}: the cluster is full", "free space in it"
                ) from e
            raise BackendError(
                f"{what}: {e}",
                "check images_rbd_ceph_conf and rbd_user in [libvirt], that the keyring can be "
                "read by the agent's user, and 'ceph -s'",
            ) from e
        except self._rbd.OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InsufficientFreeSpace(f"{what}: it is full", "free space in it") from e
            raise BackendError(f"{what}: {e}", "look at the cluster with 'ceph -s'") from e

    @property
    def fsid(self) -> str:
        connection = self._connected()
        with self._translated("asking for the id of the cluster"):
            return str(connection.get_fsid())

    def monitors(self) -> tuple[tuple[str, int], ...]:
        """Return address and port of each monitor, as QEMU wants them (protocol v1)."""
        if time.monotonic() - self._monitors_at < _MONITORS_S and self._monitors:
            return self._monitors
        connection = self._connected()
        what = "asking for the monitors of the cluster"
        with self._translated(what):
            status, answer, error = connection.mon_command(
                json.dumps({"prefix": "mon dump", "format": "json"}), b""
            )
        if status:
            raise BackendError(f"{what}: {error}", f"client.{self.user} needs mon 'profile rbd'")
        found = []
        for monitor in json.loads(answer)["mons"]:
            address, _, port = monitor["public_addr"].partition("/")[0].rpartition(":")
            found.append((address.strip("[]"), int(port)))
        self._monitors, self._monitors_at = tuple(found), time.monotonic()
        return self._monitors

    def key(self) -> bytes:
        """Return the user's key, as its keyring has it.

        Raises:
            BackendError: no keyring of those configured has it, or can be read.
        """
        connection = self._connected()
        section = f"client.{self.user}"
        places = [Path(place.strip()) for place in connection.conf_get("keyring").split(",")]
        for place in places:
            keyring = configparser.ConfigParser(interpolation=None)
            try:
                keyring.read_string(place.read_text())
            except (OSError, configparser.Error):
                continue
            key = keyring.get(section, "key", fallback=None)
            if key:
                return key.strip().encode()
        raise BackendError(
            f"no keyring has the key of {section}: {', '.join(map(str, places))}",
            "the agent's user has to be able to read it",
        )

    @contextlib.contextmanager
    def pool(self, name: str) -> Iterator["Pool"]:
        connection = self._connected()
        with self._translated(f"opening pool {name}"):
            context = connection.open_ioctx(name)
        try:
            yield Pool(name, context, self._rbd, self._translated)
        finally:
            context.close()

    def clone(self, parent: tuple[str, str, str], pool: "Pool", name: str) -> None:
        """Make image `name` of a protected snapshot: pool, image, snapshot."""
        parent_pool, image, snapshot = parent
        connection = self._connected()
        with self._translated(f"cloning {'/'.join(parent)} to {pool.name}/{name}"):
            context = connection.open_ioctx(parent_pool)
            try:
                self._rbd.RBD().clone(context, image, snapshot, pool.context, name)
            finally:
                context.close()

    def snapshot_size(self, parent: tuple[str, str, str]) -> int | None:
        """Return the bytes of a snapshot; None if it is not there or not for us."""
        parent_pool, image, snapshot = parent
        connection = self._connected()
        try:
            context = connection.open_ioctx(parent_pool)
            try:
                with self._rbd.Image(context, image, snapshot=snapshot, read_only=True) as opened:
                    return int(opened.size()) if opened.is_protected_snap(snapshot) else None
            finally:
                context.close()
        except (self._rados.OSError, self._rbd.OSError):
            return None


class Pool:
    """The images of one pool; used by one thread."""

    def __init__(
        self,
        name: str,
        context: Any,
        rbd: Any,
        translated: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.name = name
        self.context = context
        self._rbd = rbd
        self._translated = translated

    def names(self) -> list[str]:
        with self._translated(f"listing pool {self.name}"):
            return list(self._rbd.RBD().list(self.context))

    @contextlib.contextmanager
    def _opened(self, name: str, what: str) -> Iterator[Image]:
        with self._translated(f"{what} {self.name}/{name}"), self._open(name) as image:
            yield image

    def _open(self, name: str) -> Image:
        return cast("Image", self._rbd.Image(self.context, name))

    def owner(self, name: str) -> str | None:
        """Return which instance an image is of, "" for none of ours; None if it is not there."""
        try:
            with self._opened(name, "looking at") as image:
                try:
                    return image.metadata_get(_OURS)
                except KeyError:
                    return ""
        except BackendError as e:
            if isinstance(e.__cause__, self._rbd.ImageNotFound):
                return None
            raise

    def size(self, name: str) -> int:
        with self._opened(name, "looking at") as image:
            return image.size()

    def create(self, name: str, size: int) -> None:
        with self._translated(f"creating {self.name}/{name}"):
            self._rbd.RBD().create(self.context, name, size, old_format=False)

    def mark(self, name: str, instance_uuid: str) -> None:
        with self._opened(name, "marking") as image:
            image.metadata_set(_OURS, instance_uuid)

    def fill(self, name: str, fd: int, cancellation: Cancellation) -> None:
        """Write all that is no hole of an open file to where it stands in the image, durably.

        Raises:
            BootwrightError: the reason of the cancellation.
        """
        with self._opened(name, "writing to") as image:
            for start, end in sparse.data_extents(fd, 0, os.fstat(fd).st_size):
                begin = start
                while begin < end:
                    cancellation.check()
                    data = os.pread(fd, min(_STEP, end - begin), begin)
                    image.write(data, begin)
                    begin += len(data)
            image.flush()

    def resize(self, name: str, size: int) -> None:
        with self._opened(name, "resizing") as image:
            image.resize(size)

    def rename(self, name: str, to: str) -> None:
        with self._translated(f"renaming {self.name}/{name}"):
            self._rbd.RBD().rename(self.context, name, to)

    def remove(self, name: str) -> bool:
        """Remove an image; False if somebody has it open. One that is not there is no error."""
        try:
            with self._translated(f"removing {self.name}/{name}"):
                self._rbd.RBD().remove(self.context, name)
        except BackendError as e:
            if isinstance(e.__cause__, self._rbd.ImageNotFound):
                return True
            if isinstance(e.__cause__, self._rbd.ImageBusy):
                return False
            raise
        return True
