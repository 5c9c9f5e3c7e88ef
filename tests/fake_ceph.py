"""A Ceph cluster in memory, behind as much of Python's librados and librbd as the agent calls.

It passes the contract of backends as a real one does (functional/test_rbd.py), and
can do on demand what a real one does rarely: refuse, hang, take a client for dead.
"""

import errno
import json
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from agent.ceph_bindings import Bindings

FSID = "6c1e0b3e-3f0f-4f57-9d0b-0d6c0f6a7c11"


class RadosError(Exception):
    """`rados.Error`: not a builtin OSError, and not always with a number."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class RbdError(Exception):
    """`rbd.Error`."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class ImageNotFound(RbdError):
    """As in rbd."""


class ImageBusy(RbdError):
    """As in rbd."""


class ImageExists(RbdError):
    """As in rbd."""


class ImageHasSnapshots(RbdError):
    """As in rbd."""


_RBD_ERRORS = {
    errno.ENOENT: ImageNotFound,
    errno.EBUSY: ImageBusy,
    errno.EEXIST: ImageExists,
    errno.ENOTEMPTY: ImageHasSnapshots,
}


def rbd_error(number: int) -> RbdError:
    return _RBD_ERRORS.get(number, RbdError)(errno.errorcode[number], number)


class FakeImage:
    """One image, open or not."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.metadata: dict[str, str] = {}
        self.snapshots: dict[str, bool] = {}
        """Whether each is protected; all of them are of what the image is now."""
        self.open = 0


class FakeCeph:
    """The cluster.

    Attributes:
        pools: their images by name.
        options: what clients find in their configuration.
        failures: numbers of errors that the next calls of that name end with.
        before: what happens when the next call of that name comes, before it does anything.
        clients: all that have ever connected.
    """

    def __init__(self, *, fsid: str = FSID, pools: tuple[str, ...] = ("vms", "images")) -> None:
        self.fsid = fsid
        self.pools: dict[str, dict[str, FakeImage]] = {pool: {} for pool in pools}
        self.options = {
            "rados_osd_op_timeout": "0",
            "rados_mon_op_timeout": "0.000000",
            "keyring": "",
        }
        self.monitors = ["10.0.0.1:6789/0"]
        self.failures: dict[str, list[int]] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.clients: list[_Rados] = []

    def bindings(self) -> Bindings:
        def rados(**arguments: str) -> _Rados:
            return _Rados(self, **arguments)

        return Bindings(
            rados=types.SimpleNamespace(Error=RadosError, Rados=rados),
            rbd=types.SimpleNamespace(
                Error=RbdError,
                ImageNotFound=ImageNotFound,
                ImageBusy=ImageBusy,
                ImageExists=ImageExists,
                ImageHasSnapshots=ImageHasSnapshots,
                RBD=_Rbd,
                Image=_Opened,
            ),
        )

    def keyring(self, path: Path, user: str, key: str) -> None:
        path.write_text(f'[client.{user}]\n\tkey = {key}\n\tcaps mon = "profile rbd"\n')
        self.options["keyring"] = f"{path.with_name('missing')}, {path}"

    def blocklist(self) -> None:
        """Take all clients there are for dead."""
        for client in self.clients:
            client.blocklisted = True

    def may_fail(self, call: str) -> int | None:
        if (happens := self.before.pop(call, None)) is not None:
            happens()
        numbers = self.failures.get(call)
        return numbers.pop(0) if numbers else None


class _Rados:
    def __init__(self, ceph: FakeCeph, *, conffile: str, name: str) -> None:
        self.ceph = ceph
        self.conffile = conffile
        self.name = name
        self.options = dict(ceph.options)
        self.blocklisted = False

    def conf_get(self, option: str) -> str:
        return self.options[option]

    def conf_set(self, option: str, value: str) -> None:
        self.options[option] = value

    def connect(self, timeout: float) -> None:
        if (number := self.ceph.may_fail("connect")) is not None:
            raise RadosError(f"error connecting to the cluster within {timeout} s", number)
        self.ceph.clients.append(self)

    def get_fsid(self) -> str:
        return self.ceph.fsid

    def mon_command(self, command: str, _data: bytes) -> tuple[int, bytes, str]:
        # A client on the OSDs' blocklist may still ask the monitors.
        if (number := self.ceph.may_fail("mon_command")) is not None:
            return -number, b"", ""
        assert json.loads(command) == {"prefix": "mon dump", "format": "json"}
        dump = {"mons": [{"public_addr": address} for address in self.ceph.monitors]}
        return 0, json.dumps(dump).encode(), ""

    def open_ioctx(self, pool: str) -> "_Context":
        if pool not in self.ceph.pools:
            raise RadosError(f"pool {pool} does not exist", errno.ENOENT)
        return _Context(self, pool)


class _Context:
    def __init__(self, client: _Rados, pool: str) -> None:
        self.client = client
        self.images = client.ceph.pools[pool]

    def close(self) -> None:
        pass

    def call(self, name: str) -> None:
        if self.client.blocklisted:
            raise rbd_error(errno.ESHUTDOWN)
        if (number := self.client.ceph.may_fail(name)) is not None:
            raise rbd_error(number)

    def get(self, name: str) -> FakeImage:
        if name not in self.images:
            raise rbd_error(errno.ENOENT)
        return self.images[name]


class _Rbd:
    """`rbd.RBD`."""

    def list(self, context: _Context) -> list[str]:
        context.call("list")
        return list(context.images)

    def create(self, context: _Context, name: str, size: int, *, old_format: bool) -> None:
        assert not old_format
        context.call("create")
        if name in context.images:
            raise rbd_error(errno.EEXIST)
        context.images[name] = FakeImage(size)

    def clone(
        self, parents: _Context, parent: str, snapshot: str, context: _Context, name: str
    ) -> None:
        context.call("clone")
        image = parents.get(parent)
        if snapshot not in image.snapshots:
            raise rbd_error(errno.ENOENT)
        if name in context.images:
            raise rbd_error(errno.EEXIST)
        context.images[name] = FakeImage(0)
        context.images[name].data = bytearray(image.data)

    def rename(self, context: _Context, name: str, to: str) -> None:
        image = context.get(name)
        context.call("rename")
        if to in context.images:
            raise rbd_error(errno.EEXIST)
        context.images[to] = image
        del context.images[name]

    def remove(self, context: _Context, name: str) -> None:
        image = context.get(name)
        context.call("remove")
        if image.snapshots:
            raise rbd_error(errno.ENOTEMPTY)
        if image.open:
            raise rbd_error(errno.EBUSY)
        del context.images[name]


class _Opened:
    """`rbd.Image`."""

    def __init__(
        self, context: _Context, name: str, snapshot: str | None = None, read_only: bool = False
    ) -> None:
        context.call("open")
        self._context = context
        self._image = context.get(name)
        if snapshot is not None and (snapshot not in self._image.snapshots or not read_only):
            raise rbd_error(errno.ENOENT)
        self._image.open += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._image.open -= 1
        self._context.call("close")

    def size(self) -> int:
        self._context.call("size")
        return len(self._image.data)

    def resize(self, size: int) -> None:
        self._context.call("resize")
        self._image.data[size:] = bytes(max(0, size - len(self._image.data)))

    def is_protected_snap(self, snapshot: str) -> bool:
        return self._image.snapshots[snapshot]

    def write(self, data: bytes, offset: int) -> int:
        self._context.call("write")
        if offset + len(data) > len(self._image.data):
            raise rbd_error(errno.EINVAL)
        self._image.data[offset : offset + len(data)] = data
        return len(data)

    def flush(self) -> None:
        self._context.call("flush")

    def metadata_get(self, key: str) -> str:
        self._context.call("metadata_get")
        return self._image.metadata[key]

    def metadata_set(self, key: str, value: str) -> None:
        self._context.call("metadata_set")
        self._image.metadata[key] = value


@contextmanager
def held_open(image: FakeImage) -> Iterator[None]:
    """Have somebody else use an image."""
    image.open += 1
    try:
        yield
    finally:
        image.open -= 1
