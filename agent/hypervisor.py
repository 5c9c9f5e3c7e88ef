"""libvirt, in the few calls a boot and a delete need.

Every call has a limit in time, is made again once if the connection turns out
to be dead (libvirtd was restarted), and may be made any number of times: to
destroy what is not running or to start what runs is no error. Builds no XML.
"""

import base64
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID
from xml.etree import ElementTree as ET

import libvirt

from agent.errors import InstanceExists, InvalidJob
from agent.libvirt_connection import Connection, Domain, Libvirt

T = TypeVar("T")

# Seconds. Whatever starts or ends a process, or makes libvirtd ask an emulator
# what it can do (4 s for each, once), gets more than a look-up.
_LOOK_LIMIT_S: Final = 15.0
_WORK_LIMIT_S: Final = 120.0

DEFAULT_NETWORK: Final = "default"
"""The network, where it is active, of guests whose job names none."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class HostOffers:
    machine: bool = True
    """QEMU knows that machine type."""
    uefi: bool
    """There is UEFI firmware for it."""
    secure_boot: bool
    """There is firmware that runs signed code alone."""
    tpm: bool
    """A TPM can be emulated."""


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
        self._libvirt = Libvirt(uri)
        self._virt_type = virt_type
        self._look_limit_s = look_limit_s
        self._work_limit_s = work_limit_s

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

    def offers(self, machine: str) -> HostOffers:
        """What this host has for guests of that machine type, as far as libvirt knows.

        All of it where libvirt cannot say: it has the last word when it starts the domain.
        """

        def ask(connection: Connection) -> str | HostOffers:
            try:
                return connection.getDomainCapabilities(None, None, machine, self._virt_type)
            except libvirt.libvirtError as e:
                if e.get_error_code() == libvirt.VIR_ERR_INVALID_ARG:
                    # It has the same code for a host without KVM: then no machine is possible.
                    connection.getDomainCapabilities(None, None, None, self._virt_type)
                    return HostOffers(machine=False, uefi=False, secure_boot=False, tpm=False)
                if e.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                    return HostOffers(uefi=True, secure_boot=True, tpm=True)
                raise

        xml = self._work(f"asking what there is for machine {machine} at", ask)
        if isinstance(xml, HostOffers):
            return xml
        found = ET.fromstring(xml)  # noqa: S314 - libvirt's own
        firmware = found.iterfind("os/enum[@name='firmware']/value")
        secure = found.iterfind("os/loader/enum[@name='secure']/value")
        tpm = found.iterfind("devices/tpm/enum[@name='backendModel']/value")
        return HostOffers(
            uefi="efi" in {value.text for value in firmware},
            secure_boot="yes" in {value.text for value in secure},
            # libvirt says so if it finds swtpm.
            tpm="emulator" in {value.text for value in tpm},
        )

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

    def disk_size(self, uuid: str, device_name: str) -> int:
        """Return the bytes of a disk as the guest of a running domain sees it."""
        return self._look(
            f"asking for the size of disk {device_name} of domain {uuid} at",
            lambda connection: connection.lookupByUUIDString(uuid).blockInfo(device_name)[0],
        )

    def resize_disk(self, uuid: str, device_name: str, virtual_size: int) -> None:
        """Make a disk of a running domain as large as that many bytes; its guest is told."""

        def work(connection: Connection) -> None:
            domain = self._wanted(connection, uuid)
            domain.blockResize(device_name, virtual_size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

        self._work(f"growing disk {device_name} of domain {uuid} at", work)

    def ensure_secret(self, uuid: str, usage: str, value: bytes, *, replace: bool) -> None:
        """Make sure that there is a secret for Ceph of that uuid, in base64.

        `replace`: whether one that is there gets that value too.
        """
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
            else:
                if not replace:
                    return
            secret.setValue(base64.b64decode(value))

        self._work(f"giving secret {uuid} to", work)

    def start(self, uuid: str) -> None:
        """Return when a defined domain has started; one that runs is left alone."""

        def work(connection: Connection) -> None:
            domain = self._wanted(connection, uuid)
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
                domain = self._wanted(connection, uuid)
                try:
                    domain.destroy()
                except libvirt.libvirtError:
                    # libvirt has no code of its own for "it does not run".
                    if domain.isActive():
                        raise

        self._work(f"destroying domain {uuid} at", work)

    def has_saved_state(self, uuid: str) -> bool:
        """Whether the next start would go on with a guest that was suspended to disk."""
        return bool(
            self._look(
                f"asking for the saved state of domain {uuid} of",
                lambda connection: connection.lookupByUUIDString(uuid).hasManagedSaveImage(0),
            )
        )

    def discard_saved_state(self, uuid: str) -> None:
        """Have the next start be a boot; no saved state is no error."""

        def work(connection: Connection) -> None:
            with _passing_over_missing():
                domain = self._wanted(connection, uuid)
                if domain.hasManagedSaveImage(0):
                    domain.managedSaveRemove(0)

        self._work(f"discarding the saved state of domain {uuid} at", work)

    def undefine(self, uuid: str) -> None:
        """Make libvirt forget a domain, with its managed save, snapshots and checkpoints.

        What its firmware and its TPM have kept goes too, the files of its disks stay. One
        that is not there is no error.
        """

        def work(connection: Connection) -> None:
            with _passing_over_missing():
                _undefine(self._wanted(connection, uuid))

        self._work(f"undefining domain {uuid} at", work)

    def starts_with_host(self, uuid: str) -> bool:
        return bool(
            self._look(
                f"asking whether the host starts domain {uuid} of",
                lambda connection: connection.lookupByUUIDString(uuid).autostart(),
            )
        )

    def set_starts_with_host(self, uuid: str, *, wanted: bool) -> None:
        self._work(
            f"saying whether the host starts domain {uuid} to",
            lambda connection: self._wanted(connection, uuid).setAutostart(wanted),
        )

    def close(self) -> None:
        """Give up the connection; the next call opens another."""
        self._libvirt.close()

    def _wanted(self, connection: Connection, uuid: str) -> Domain:
        """Return a domain that is to be changed, if somebody still waits for that."""
        domain = connection.lookupByUUIDString(uuid)
        self._libvirt.require_wanted()
        return domain

    def _look(self, what: str, call: Callable[[Connection], T]) -> T:
        return self._libvirt.call(what, call, self._look_limit_s)

    def _work(self, what: str, call: Callable[[Connection], T]) -> T:
        return self._libvirt.call(what, call, self._work_limit_s)


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


def _undefine(domain: Domain) -> None:
    try:
        domain.undefineFlags(_METADATA)
    except libvirt.libvirtError as e:
        # Drivers without firmware or checkpoints do not know the
        # flags for them, and have nothing to forget.
        if e.get_error_code() != libvirt.VIR_ERR_INVALID_ARG:
            raise
        domain.undefine()


def _state(domain: Domain) -> str:
    return _STATES.get(domain.state()[0], "no state")


def _dotted(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
