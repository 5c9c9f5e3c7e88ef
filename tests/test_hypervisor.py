"""The hypervisor against libvirt's own test driver, which keeps domains in memory.

What needs a daemon (restarts, permissions, real guests) is in functional/.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from agent.errors import HypervisorError, InstanceExists, InvalidJob
from agent.hypervisor import Hypervisor
from agent.libvirt_connection import Connection, Libvirt
from tests.waiting import AT_ONCE_S, until

MISSING = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    hypervisor = Hypervisor("test:///default", virt_type="test")
    hypervisor.version()  # the driver forgets its domains with the last connection
    before = domains().keys()
    yield hypervisor
    for domain_uuid in domains().keys() - before:
        hypervisor.destroy(domain_uuid)
        hypervisor.undefine(domain_uuid)
    hypervisor.close()


def domains() -> dict[str, str]:
    """The names of all domains, by uuid, as another connection sees them."""
    connection = libvirt.open("test:///default")
    try:
        return {domain.UUIDString(): domain.name() for domain in connection.listAllDomains()}
    finally:
        connection.close()


def domain_xml(name: str, domain_uuid: str) -> str:
    return (
        f"<domain type='test'><name>{name}</name><uuid>{domain_uuid}</uuid>"
        "<memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>"
    )


@pytest.fixture
def defined(hypervisor: Hypervisor) -> str:
    """The uuid of a domain `web-1`."""
    domain_uuid = str(uuid.uuid4())
    hypervisor.define(domain_xml("web-1", domain_uuid))
    return domain_uuid


def test_version_names_both_programs(hypervisor: Hypervisor) -> None:
    assert hypervisor.version().startswith("libvirt ")
    assert ", TEST " in hypervisor.version()


def test_domain_lives_and_is_forgotten(hypervisor: Hypervisor, defined: str) -> None:
    assert hypervisor.state(defined) == "shut off"
    hypervisor.start(defined)
    assert hypervisor.state(defined) == "running"
    assert domains()[defined] == "web-1"
    hypervisor.destroy(defined)
    assert hypervisor.state(defined) == "shut off"
    hypervisor.undefine(defined)
    assert hypervisor.state(defined) is None


def test_every_step_may_be_repeated(hypervisor: Hypervisor, defined: str) -> None:
    hypervisor.define(domain_xml("web-1", defined))
    for step in (hypervisor.start, hypervisor.destroy, hypervisor.undefine):
        step(defined)
        if step is not hypervisor.undefine:
            step(defined)
    hypervisor.undefine(defined)
    hypervisor.destroy(defined)
    assert hypervisor.state(defined) is None


def test_whether_the_host_starts_a_domain_may_be_said_any_number_of_times(
    hypervisor: Hypervisor, defined: str
) -> None:
    assert not hypervisor.starts_with_host(defined)
    for wanted in (True, True, False, False):
        hypervisor.set_starts_with_host(defined, wanted=wanted)
        assert hypervisor.starts_with_host(defined) is wanted


def test_definition_never_takes_over_a_name(hypervisor: Hypervisor, defined: str) -> None:
    with pytest.raises(InstanceExists, match=defined):
        hypervisor.define(domain_xml("web-1", str(uuid.uuid4())))
    assert [key for key, name in domains().items() if name == "web-1"] == [defined]


def test_definition_never_takes_over_a_uuid(hypervisor: Hypervisor, defined: str) -> None:
    with pytest.raises(InstanceExists, match="web-1"):
        hypervisor.define(domain_xml("web-2", defined))


def test_domain_libvirt_cannot_read_is_the_jobs_fault(hypervisor: Hypervisor) -> None:
    with pytest.raises(InvalidJob, match="os <type> must be specified"):
        hypervisor.define("<domain type='test'><name>x</name></domain>")


def test_start_of_what_is_not_there_says_so_in_libvirts_words(hypervisor: Hypervisor) -> None:
    with pytest.raises(HypervisorError, match=r"starting domain .* at test:///default: Domain not"):
        hypervisor.start(MISSING)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "Emulator '/usr/bin/qemu-system-x86_64' does not support virt type 'kvm'",
            "virt_type = qemu",
        ),
        ("monitor: Could not access KVM kernel module", "virt_type = qemu"),
        ("cannot set up guest memory 'pc.ram': Cannot allocate memory", "flavor.ram"),
        ("Network not found: no network with matching name 'x'", "net-list"),
        ("Requested operation is not valid: network 'x' is not active", "net-start"),
        ("Cannot get interface MTU on 'br9': No such device", "ip link"),
    ],
)
def test_what_libvirt_refuses_has_a_hint_of_what_to_do(said: str, hint: str) -> None:
    def refuse(_: Connection) -> None:
        raise libvirt.libvirtError(said)

    with pytest.raises(HypervisorError) as caught:
        Libvirt("test:///default").call("starting domain x at", refuse, AT_ONCE_S)
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_networks_are_looked_up_by_name(hypervisor: Hypervisor) -> None:
    assert hypervisor.has_active_network("default")
    assert not hypervisor.has_active_network("missing")


def test_what_the_driver_cannot_do_is_an_error(hypervisor: Hypervisor) -> None:
    with pytest.raises(HypervisorError, match="not supported by the connection driver"):
        hypervisor.check()


def test_closed_hypervisor_connects_again(hypervisor: Hypervisor) -> None:
    hypervisor.version()
    hypervisor.close()
    hypervisor.close()
    assert hypervisor.version()


def test_libvirtd_that_is_not_there_is_said_with_uri_and_hint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"qemu:///system?socket={tmp_path}/sock"
    with pytest.raises(HypervisorError) as caught:
        Hypervisor(uri, virt_type="qemu").version()
    assert uri in caught.value.message
    assert "No such file or directory" in caught.value.message
    assert "systemctl status libvirtd" in caught.value.hint
    assert caught.value.retriable
    assert capfd.readouterr().err == ""


def test_daemon_that_accepts_and_never_answers_costs_no_more_than_the_limit(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        hypervisor = Hypervisor(
            f"qemu:///system?socket={tmp_path}/sock", virt_type="qemu", look_limit_s=0.2
        )
        began = time.monotonic()
        with pytest.raises(HypervisorError, match=r"no answer within 0\.2 s"):
            hypervisor.version()
        assert time.monotonic() - began < AT_ONCE_S


def test_what_was_said_to_have_failed_is_not_done_later(tmp_path: Path) -> None:
    # The driver reads its host from a file; from a pipe it waits until somebody writes one.
    pipe = tmp_path / "node.xml"
    os.mkfifo(pipe)
    slow = Hypervisor(f"test://{pipe}", virt_type="test", work_limit_s=0.2)
    domain_uuid = str(uuid.uuid4())
    with pytest.raises(HypervisorError, match="no answer"):
        slow.define(domain_xml("late", domain_uuid))

    pipe.write_text("<node/>")
    until_no_call_is_left()

    assert slow.state(domain_uuid) is None
    slow.close()


def test_step_of_a_call_that_was_given_up_is_not_followed_by_another() -> None:
    answers = threading.Event()
    stepped: list[str] = []
    libvirtd = Libvirt("test:///default")

    def steps(_connection: Connection) -> None:
        answers.wait(20)
        stepped.append("looked")
        libvirtd.require_wanted()
        stepped.append("changed")

    libvirtd.call("connecting to", lambda connection: connection.getType(), 20)
    with pytest.raises(HypervisorError, match="no answer"):
        libvirtd.call("changing", steps, 1)
    answers.set()
    until_no_call_is_left()
    assert stepped == ["looked"]
    libvirtd.call("changing", steps, 20)
    assert stepped == ["looked", "looked", "changed"]
    libvirtd.close()


def until_no_call_is_left() -> None:
    until(lambda: all(thread.name != "libvirt call" for thread in threading.enumerate()))


def test_host_without_threads_to_spare_is_an_error_that_passes(hypervisor: Hypervisor) -> None:
    # More than any address space holds.
    usual = threading.stack_size(1 << 46)
    try:
        for _ in range(20):  # more than there are places for calls
            with pytest.raises(HypervisorError, match="can't start new thread"):
                hypervisor.version()
    finally:
        threading.stack_size(usual)
    assert hypervisor.version()


def test_metadata_is_that_of_the_namespace(hypervisor: Hypervisor) -> None:
    domain_uuid = str(uuid.uuid4())
    mark = "<metadata><x:mark xmlns:x='urn:x'><x:job id='job-1'/></x:mark></metadata>"
    xml = domain_xml("marked", domain_uuid).replace("<memory", f"{mark}<memory")
    hypervisor.define(xml)
    assert "job-1" in (hypervisor.metadata(domain_uuid, "urn:x") or "")
    assert hypervisor.metadata(domain_uuid, "urn:y") is None
    assert hypervisor.metadata(MISSING, "urn:x") is None


def test_many_threads_share_one_hypervisor(hypervisor: Hypervisor) -> None:
    uuids = [str(uuid.uuid4()) for _ in range(30)]

    def live(domain_uuid: str) -> None:
        hypervisor.define(domain_xml(f"thread-{domain_uuid}", domain_uuid))
        hypervisor.start(domain_uuid)

    threads = [threading.Thread(target=live, args=(each,)) for each in uuids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {hypervisor.state(each) for each in uuids} == {"running"}


class Capabilities:
    """Answers as libvirt does, which has one code for two causes."""

    def __init__(self, *, kvm: bool) -> None:
        self._kvm = kvm

    def getDomainCapabilities(self, *wanted: str | None) -> str:  # noqa: N802 - libvirt's
        machine = wanted[2]
        if not self._kvm or machine is not None:
            error = libvirt.libvirtError("the accel 'kvm' is not supported, or the machine")
            error.err = (libvirt.VIR_ERR_INVALID_ARG, 10, "the accel 'kvm'", 2, "", "", "", 0, 0)
            raise error
        return "<domainCapabilities/>"


class Answering(Hypervisor):
    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__("test:///default", virt_type="kvm")
        self._capabilities = capabilities

    def _work(self, _what: str, call: Callable[[Any], Any]) -> Any:
        return call(self._capabilities)


def test_host_without_kvm_is_not_taken_for_one_without_the_machine() -> None:
    assert not Answering(Capabilities(kvm=True)).offers("pc-q35-99.0").machine
    with pytest.raises(libvirt.libvirtError, match="accel"):
        Answering(Capabilities(kvm=False)).offers("q35")
