"""The connection to libvirt: every call has a limit in time, and survives a restart of libvirtd.

Why there is no libvirt event loop: its keepalive is answered by libvirtd's
main thread, so it does not notice a call that is stuck in libvirtd (a driver
waiting five minutes for a storage cluster does that), and it is not in force
while a connection is being opened. A thread for each call bounds both, for
some 50 µs beside the millisecond of the call itself.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import libvirt

from agent.errors import HypervisorError

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# Calls at one time. One that never comes back keeps its place, thread and
# connection until libvirtd answers or dies; the others wait, within their limit.
_CALLS: Final = 16


class Domain(Protocol):
    """The calls in use of `libvirt.virDomain`."""

    def name(self) -> str: ...
    def UUIDString(self) -> str: ...  # noqa: N802
    def isActive(self) -> int: ...  # noqa: N802
    def state(self) -> list[int]: ...
    def create(self) -> int: ...
    def destroy(self) -> int: ...
    def hasManagedSaveImage(self, flags: int) -> int: ...  # noqa: N802
    def managedSaveRemove(self, flags: int) -> int: ...  # noqa: N802
    def XMLDesc(self, flags: int) -> str: ...  # noqa: N802
    def blockInfo(self, path: str) -> list[int]: ...  # noqa: N802
    def blockResize(self, disk: str, size: int, flags: int) -> int: ...  # noqa: N802
    def autostart(self) -> int: ...
    def setAutostart(self, autostart: int) -> int: ...  # noqa: N802
    def undefine(self) -> int: ...
    def undefineFlags(self, flags: int) -> int: ...  # noqa: N802
    def metadata(self, type: int, uri: str) -> str: ...  # noqa: A002


class Secret(Protocol):
    """The calls in use of `libvirt.virSecret`."""

    def setValue(self, value: bytes) -> int: ...  # noqa: N802


class Network(Protocol):
    """The calls in use of `libvirt.virNetwork`."""

    def isActive(self) -> int: ...  # noqa: N802


class Connection(Protocol):
    """The calls in use of `libvirt.virConnect`."""

    def isAlive(self) -> int: ...  # noqa: N802
    def close(self) -> int: ...
    def getType(self) -> str: ...  # noqa: N802
    def getVersion(self) -> int: ...  # noqa: N802
    def getLibVersion(self) -> int: ...  # noqa: N802
    def getDomainCapabilities(  # noqa: N802
        self, emulator: None, arch: None, machine: str | None, virttype: str
    ) -> str: ...
    def lookupByUUIDString(self, uuid: str) -> Domain: ...  # noqa: N802
    def lookupByName(self, name: str) -> Domain: ...  # noqa: N802
    def defineXML(self, xml: str) -> Domain: ...  # noqa: N802
    def secretLookupByUUIDString(self, uuid: str) -> Secret: ...  # noqa: N802
    def secretDefineXML(self, xml: str) -> Secret: ...  # noqa: N802
    def networkLookupByName(self, name: str) -> Network: ...  # noqa: N802


class Libvirt:
    """One libvirtd; may be shared by any number of threads."""

    def __init__(self, uri: str) -> None:
        """Connects at the first call, not here. `uri`: as for `virsh --connect`."""
        self._uri = uri
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._places = threading.Semaphore(_CALLS)
        self._of_thread = threading.local()
        # Without one libvirt writes each error to standard error as well.
        libvirt.registerErrorHandler(_say_nothing, None)

    def close(self) -> None:
        """Give up the connection; the next call opens another."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def call(self, what: str, call: Callable[[Connection], T], limit_s: float) -> T:
        """Make `call` in a thread of its own and wait for it no longer than `limit_s`.

        One of several steps asks `require_wanted` before a step that changes something.

        Raises:
            HypervisorError: libvirt is away, does not answer in time, or refuses.
        """
        if not self._places.acquire(timeout=limit_s):
            raise self._no_answer(what, limit_s)
        outcome: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        given_up = threading.Event()

        def require_wanted() -> None:
            if given_up.is_set():
                raise self._no_answer(what, limit_s)

        def attempt(connection: Connection) -> T:
            # Opening the connection, or the first attempt, may have taken too long.
            require_wanted()
            return call(connection)

        def run() -> None:
            self._of_thread.require_wanted = require_wanted
            try:
                outcome.put(self._twice(attempt))
            except BaseException as e:  # noqa: BLE001 - raised again by who waits
                outcome.put(e)
            finally:
                self._places.release()

        try:
            threading.Thread(target=run, name="libvirt call", daemon=True).start()
        except RuntimeError as e:
            self._places.release()
            raise HypervisorError(
                f"{what} {self._uri}: {e}", "the agent has used up TasksMax of its unit, or memory"
            ) from e
        try:
            result = outcome.get(timeout=limit_s)
        except queue.Empty:
            given_up.set()
            # Whoever asks next shall not queue up behind the call that is stuck.
            with self._lock:
                self._connection = None
            raise self._no_answer(what, limit_s) from None
        match result:
            case libvirt.libvirtError():
                raise self._refused(what, result) from result
            case BaseException():
                raise result
            case _:
                return result

    def require_wanted(self) -> None:
        """Return if somebody still waits for the call that this thread makes.

        A domain must not come up after it was said to fail.

        Raises:
            HypervisorError: nobody does.
        """
        self._of_thread.require_wanted()

    def _twice(self, call: Callable[[Connection], T]) -> T:
        connection = self._connected()
        try:
            return call(connection)
        except libvirt.libvirtError as e:
            if not self._lost(connection, e):
                raise
            LOG.warning("lost the connection to %s, opening another: %s", self._uri, e)
        return call(self._connected())

    def _connected(self) -> Connection:
        with self._lock:
            connection = self._connection
        if connection is not None and _alive(connection):
            return connection
        # Not under the lock: a libvirtd that hangs would hold it for ever. Two
        # threads may open one each; the later one is kept, the other one lives
        # as long as its call.
        opened: Connection = libvirt.open(self._uri)
        with self._lock:
            self._connection = opened
        return opened

    def _lost(self, connection: Connection, error: Exception) -> bool:
        """Whether a call failed because of the connection; then it is forgotten."""
        from_transport = (
            isinstance(error, libvirt.libvirtError)
            and error.get_error_domain() == libvirt.VIR_FROM_RPC
        )
        if not from_transport and _alive(connection):
            return False
        with self._lock:
            if self._connection is connection:
                self._connection = None
        return True

    def _no_answer(self, what: str, limit_s: float) -> HypervisorError:
        return HypervisorError(
            f"{what} {self._uri}: no answer within {limit_s:g} s",
            "libvirtd hangs, or waits for storage: see 'journalctl -u libvirtd'",
        )

    def _refused(self, what: str, error: libvirt.libvirtError) -> HypervisorError:
        said = error.get_error_message() or str(error)
        return HypervisorError(f"{what} {self._uri}: {said}", _hint(error, said))


_WITHOUT_KVM: Final = "see virt-host-validate; without KVM set virt_type = qemu in [libvirt]"

_HINTS: Final = {
    "'kvm'": _WITHOUT_KVM,  # of libvirt, in whichever language
    "KVM": _WITHOUT_KVM,  # of QEMU
    "cannot set up guest memory": "the host has not so much memory left: use less in flavor.ram",
    "no network with matching name": "'virsh net-list --all' shows the networks there are",
    "is not valid: network '": "'virsh net-start NAME', and 'virsh net-autostart NAME' for good",
    "Cannot get interface": "networks.bridge names a bridge of the host: 'ip link' shows them",
    "Unable to find any firmware": (
        "no file of /usr/share/qemu/firmware describes such a one for this type of machine"
    ),
}
"""What to do, by the words that tell what is wrong."""


def _hint(error: libvirt.libvirtError, said: str) -> str:
    if error.get_error_code() in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_UNAVAILABLE):
        return "the agent's user must be in group libvirt"
    if error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE):
        # The system's own words, in the one language that has no catalogue.
        if "Permission denied" in said:
            return "the agent's user must be in group libvirt"
        return "is libvirtd running? see 'systemctl status libvirtd'"
    for words, hint in _HINTS.items():
        if words in said:
            return hint
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return "somebody undefined it; see 'virsh list --all'"
    return "libvirt's own reasons are in 'journalctl -u libvirtd' and /var/log/libvirt/qemu"


def _alive(connection: Connection) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _say_nothing(context: object, error: object) -> None:
    """Every error reaches us as an exception too."""
