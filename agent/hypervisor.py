"""libvirt, in the few calls a boot and a delete need.

Every call has a limit in time, is made again once if the connection turns out
to be dead (libvirtd was restarted), and may be made any number of times: to
destroy what is not running or to start what runs is no error. Builds no XML.

Why there is no libvirt event loop: its keepalive is answered by libvirtd's
main thread, so it does not notice a call that is stuck in libvirtd (a driver
waiting five minutes for a storage cluster does that), and it is not in force
while a connection is being opened. A thread for each call bounds both, for
some 50 µs beside the millisecond of the call itself.
"""

import base64
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar
from uuid import UUID
from xml.etree import ElementTree as ET

import libvirt

from agent.errors import HypervisorError, InstanceExists, InvalidJob

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds. Whatever starts or ends a process, or makes libvirtd ask an emulator
# what it can do (4 s for each, once), gets more than a look-up.
_LOOK_LIMIT_S: Final = 15.0
_WORK_LIMIT_S: Final = 120.0

# Calls at one time. One that never comes back keeps its place, thread and
# connection until libvirtd answers or dies; the others wait, within their limit.
_CALLS: Final = 16

_STATES: Final = {
    libvirt.VIR_DOMAIN_NOSTATE: "no state",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "idle",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "in shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}

_METADATA: Final = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)

_BAD_XML: Final = (
    libvirt.VIR_ERR_XML_ERROR,
    libvirt.VIR_ERR_XML_DETAIL,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA,
)


class Domain(Protocol):
    """The calls in use of `libvirt.virDomain`."""

    def name(self) -> str: ...
    def UUIDString(self) -> str: ...  # noqa: N802
    def isActive(self) -> int: ...  # noqa: N802
    def state(self) -> list[int]: ...
    def create(self) -> int: ...
    def destroy(self) -> int: ...
    def XMLDesc(self, flags: int) -> str: ...  # noqa: N802
    def blockResize(self, disk: str, size: int, flags: int) -> int: ...  # noqa: N802
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
    def listAllDomains(self) -> list[Domain]: ...  # noqa: N802
    def defineXML(self, xml: str) -> Domain: ...  # noqa: N802
    def secretLookupByUUIDString(self, uuid: str) -> Secret: ...  # noqa: N802
    def secretDefineXML(self, xml: str) -> Secret: ...  # noqa: N802
    def networkLookupByName(self, name: str) -> Network: ...  # noqa: N802


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainState:
    uuid: str
    name: str
    state: str
    """libvirt's word: running, paused, shut off, crashed …"""


class Hypervisor:
    """One libvirt; may be shared by any number of threads.

    Every method raises `HypervisorError` if libvirt is away, does not answer in
    time, or refuses; what it says beyond that stands at the method.
    """

    def __init__(
        self,
        uri: str,
        *,
        virt_type: str,
        look_limit_s: float = _LOOK_LIMIT_S,
        work_limit_s: float = _WORK_LIMIT_S,
    ) -> None:
        """Connects at the first call, not here.

        Args:
            uri: as for `virsh --connect`.
            virt_type: kvm or qemu; what `check` asks for.
            look_limit_s: seconds for a call that only looks.
            work_limit_s: seconds for one that defines, starts or ends a domain.
        """
        self._uri = uri
        self._virt_type = virt_type
        self._look_limit_s = look_limit_s
        self._work_limit_s = work_limit_s
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._places = threading.Semaphore(_CALLS)
        # Without one libvirt writes each error to standard error as well.
        libvirt.registerErrorHandler(_say_nothing, None)

    def version(self) -> str:
        """Such as `libvirt 9.0.0, QEMU 7.2.22`."""

        def look(connection: Connection) -> str:
            return (
                f"libvirt {_dotted(connection.getLibVersion())}, "
                f"{connection.getType()} {_dotted(connection.getVersion())}"
            )

        return self._look("asking for the version of", look)

    def check(self) -> None:
        """Return if libvirt can run guests of our `virt_type`."""
        self._work(
            f"asking for virt_type {self._virt_type} of",
            lambda connection: connection.getDomainCapabilities(None, None, None, self._virt_type),
        )

    def offers_secure_boot(self, machine: str) -> bool:
        """Whether there is a firmware for it, as far as libvirt knows."""
        xml = self._work(
            f"asking for the firmware of machine {machine} at",
            lambda connection: connection.getDomainCapabilities(
                None, None, machine, self._virt_type
            ),
        )
        values = ET.fromstring(xml).iterfind("os/loader/enum[@name='secure']/value")  # noqa: S314
        return any(value.text == "yes" for value in values)

    def domains(self) -> list[DomainState]:
        """Every domain, of whomever, defined or running."""

        def look(connection: Connection) -> list[DomainState]:
            found = []
            for domain in connection.listAllDomains():
                with _passing_over_missing():
                    found.append(
                        DomainState(
                            uuid=domain.UUIDString(), name=domain.name(), state=_state(domain)
                        )
                    )
            return found

        return self._look("listing the domains of", look)

    def state(self, uuid: str) -> str | None:
        """libvirt's word for the state of a domain; None if there is no such domain."""

        def look(connection: Connection) -> str | None:
            try:
                return _state(connection.lookupByUUIDString(uuid))
            except libvirt.libvirtError as e:
                if e.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

        return self._look(f"asking for the state of domain {uuid} of", look)

    def metadata(self, uuid: str, namespace: str) -> str | None:
        """The XML of the element of that namespace in a domain's `<metadata>`.

        libvirt leaves the namespace out of it. None if there is no such element,
        or no such domain.
        """

        def look(connection: Connection) -> str | None:
            try:
                domain = connection.lookupByUUIDString(uuid)
                return domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, namespace)
            except libvirt.libvirtError as e:
                if e.get_error_code() in (
                    libvirt.VIR_ERR_NO_DOMAIN,
                    libvirt.VIR_ERR_NO_DOMAIN_METADATA,
                ):
                    return None
                raise

        return self._look(f"asking for the metadata of domain {uuid} of", look)

    def has_active_network(self, name: str) -> bool:
        def look(connection: Connection) -> bool:
            try:
                return bool(connection.networkLookupByName(name).isActive())
            except libvirt.libvirtError as e:
                if e.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                    return False
                raise

        return self._look(f"asking for network {name} of", look)

    def require_free(self, *, uuid: str, name: str) -> None:
        """Return if no domain has that uuid or name.

        Raises:
            InstanceExists: one has.
        """

        def look(connection: Connection) -> None:
            for look_up, key in (
                (connection.lookupByName, name),
                (connection.lookupByUUIDString, uuid),
            ):
                with _passing_over_missing():
                    other = look_up(key)
                    raise InstanceExists(
                        f"libvirt has a domain {other.name()} ({other.UUIDString()}) that is not "
                        "an instance of this agent",
                        "choose another name, or undefine that domain if nobody needs it",
                    )

        self._look(f"looking for domain {name} at", look)

    def define(self, xml: str) -> None:
        """Define a domain, or define it anew if it is there with the same uuid and name.

        Raises:
            InstanceExists: its name belongs to a domain with another uuid, or
                its uuid to one with another name.
            InvalidJob: libvirt does not understand the XML.
        """

        def work(connection: Connection) -> None:
            try:
                connection.defineXML(xml)
            except libvirt.libvirtError as e:
                if e.get_error_code() in _BAD_XML:
                    raise InvalidJob(
                        f"libvirt does not accept the domain: {e.get_error_message()}",
                        "correct libvirt.domain_xml of the job, or hw_* properties of the image",
                    ) from e
                # libvirt itself never lets one domain take the place of
                # another; its error code says no more than "failed".
                _check_free(connection, xml, e)
                raise

        self._work("defining the domain at", work)

    def xml(self, uuid: str, *, live: bool = False) -> str:
        """Return a domain's XML: what is defined, or with `live` what runs.

        Raises:
            HypervisorError: there is no such domain.
        """
        flags = libvirt.VIR_DOMAIN_XML_SECURE
        if not live:
            flags |= libvirt.VIR_DOMAIN_XML_INACTIVE
        return self._look(
            f"asking for the XML of domain {uuid} of",
            lambda connection: connection.lookupByUUIDString(uuid).XMLDesc(flags),
        )

    def resize_disk(self, uuid: str, device_name: str, virtual_size: int) -> None:
        """Make a disk of a running domain as large as that many bytes; its guest is told."""

        def work(connection: Connection) -> None:
            domain = connection.lookupByUUIDString(uuid)
            domain.blockResize(device_name, virtual_size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

        self._work(f"growing disk {device_name} of domain {uuid} at", work)

    def ensure_secret(self, uuid: str, usage: str, value: bytes) -> None:
        """Make sure that there is a secret for Ceph of that uuid, with that value."""
        xml = (
            f"<secret ephemeral='no' private='yes'><uuid>{uuid}</uuid>"
            f"<usage type='ceph'><name>{usage}</name></usage></secret>"
        )

        def work(connection: Connection) -> None:
            try:
                secret = connection.secretLookupByUUIDString(uuid)
            except libvirt.libvirtError as e:
                if e.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
                    raise
                secret = connection.secretDefineXML(xml)
            secret.setValue(base64.b64decode(value))

        self._work(f"giving secret {uuid} to", work)

    def start(self, uuid: str) -> None:
        """Return when a defined domain has started; one that runs is left alone."""

        def work(connection: Connection) -> None:
            domain = connection.lookupByUUIDString(uuid)
            try:
                # Without a look before: a domain that somebody else, such as
                # an agent that is dead by now, is starting is active already.
                # This call waits for the end of that start.
                domain.create()
            except libvirt.libvirtError as e:
                # libvirt has no code of its own for "it runs already", but has
                # one for a start by somebody else that does not come to its end.
                stuck = e.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
                if stuck or not domain.isActive():
                    raise

        self._work(f"starting domain {uuid} at", work)

    def destroy(self, uuid: str) -> None:
        """End a domain at once, as by pulling its plug; one that does not run is left alone."""

        def work(connection: Connection) -> None:
            with _passing_over_missing():
                domain = connection.lookupByUUIDString(uuid)
                try:
                    domain.destroy()
                except libvirt.libvirtError:
                    # libvirt has no code of its own for "it does not run".
                    if domain.isActive():
                        raise

        self._work(f"destroying domain {uuid} at", work)

    def undefine(self, uuid: str) -> None:
        """Make libvirt forget a domain, with its NVRAM, managed save, snapshots and checkpoints.

        The files of its disks stay. One that is not there is no error.
        """

        def work(connection: Connection) -> None:
            with _passing_over_missing():
                domain = connection.lookupByUUIDString(uuid)
                try:
                    domain.undefineFlags(_METADATA)
                except libvirt.libvirtError as e:
                    # Drivers without firmware or checkpoints do not know the
                    # flags for them, and have nothing to forget.
                    if e.get_error_code() != libvirt.VIR_ERR_INVALID_ARG:
                        raise
                    domain.undefine()

        self._work(f"undefining domain {uuid} at", work)

    def close(self) -> None:
        """Give up the connection; the next call opens another."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def _look(self, what: str, call: Callable[[Connection], T]) -> T:
        return self._bounded(what, call, self._look_limit_s)

    def _work(self, what: str, call: Callable[[Connection], T]) -> T:
        return self._bounded(what, call, self._work_limit_s)

    def _bounded(self, what: str, call: Callable[[Connection], T], limit_s: float) -> T:
        """Make `call` in a thread of its own and wait for it no longer than `limit_s`."""
        if not self._places.acquire(timeout=limit_s):
            raise self._no_answer(what, limit_s)
        outcome: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        given_up = threading.Event()

        def attempt(connection: Connection) -> T:
            # Opening the connection, or the first attempt, took until nobody
            # waits any more: a domain must not come up after it was said to fail.
            if given_up.is_set():
                raise self._no_answer(what, limit_s)
            return call(connection)

        def run() -> None:
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


def _hint(error: libvirt.libvirtError, said: str) -> str:
    if error.get_error_code() in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_UNAVAILABLE):
        return "the agent's user must be in group libvirt"
    if error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE):
        # The system's own words, in the one language that has no catalogue.
        if "Permission denied" in said:
            return "the agent's user must be in group libvirt"
        return "is libvirtd running? see 'systemctl status libvirtd'"
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return "somebody undefined it; see 'virsh list --all'"
    return "libvirt's own reasons are in 'journalctl -u libvirtd' and /var/log/libvirt/qemu"


def _check_free(connection: Connection, xml: str, error: Exception) -> None:
    """Raises: InstanceExists, if a domain other than that of `xml` has its name or uuid."""
    root = ET.fromstring(xml)  # noqa: S314 - written or checked by domain_xml
    name, uuid = root.findtext("name", ""), str(UUID(root.findtext("uuid", "")))
    for look_up, key in ((connection.lookupByName, name), (connection.lookupByUUIDString, uuid)):
        with _passing_over_missing():
            other = look_up(key)
            if (other.name(), other.UUIDString()) != (name, uuid):
                raise InstanceExists(
                    f"domain {name} ({uuid}) cannot be defined: libvirt has a domain "
                    f"{other.name()} ({other.UUIDString()})",
                    "choose another name, or undefine that domain if nobody needs it",
                ) from error


@contextlib.contextmanager
def _passing_over_missing() -> Iterator[None]:
    """Let a domain that is not there, or no longer, be no error in the block."""
    try:
        yield
    except libvirt.libvirtError as e:
        if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise


def _alive(connection: Connection) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _state(domain: Domain) -> str:
    return _STATES.get(domain.state()[0], "no state")


def _dotted(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


def _say_nothing(context: object, error: object) -> None:
    """Every error reaches us as an exception too."""
