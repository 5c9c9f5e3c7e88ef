"""The unit as it ships, started by a real systemd.

The only change is a drop-in that names the console script of the environment
under test, and lets the unit's sandbox see that environment.
"""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from agent import privileges
from functional.harness import nspawn
from tests.waiting import until

CHECKOUT: Final = Path(__file__).parent.parent
ENVIRONMENT: Final = Path(sys.prefix)
AGENT: Final = f"{ENVIRONMENT}/bin/bootwright agent --config-file /etc/bootwright/bootwright.conf"

SOCKET: Final = "/run/bootwright/api.sock"
CONFIGURATION: Final = f"""\
[api]
socket = {SOCKET}
[images]
source = directory
directory = /var/lib/bootwright/images
"""
STOPPED: Final = "/var/lib/bootwright/stopped"
# The environment may stand in a home or a temporary directory, both of which
# the unit hides. systemd forgets a unit that was stopped and that nothing else
# names, so how it ended is written down as it ends.
DROP_IN: Final = f"""\
[Service]
ExecStart=
ExecStart={AGENT}
ProtectHome=tmpfs
BindReadOnlyPaths={ENVIRONMENT} {CHECKOUT}
ExecStopPost=/bin/sh -c 'echo ${{SERVICE_RESULT}} ${{EXIT_CODE}} ${{EXIT_STATUS}} >{STOPPED}'
"""
IMAGE_ID: Final = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
VMDK_ID: Final = "4f6a0d3a-2c3c-4f0f-9a3c-1f0b7c1a9b52"
INSTANCES: Final = "/var/lib/bootwright/instances"
LEFTOVER: Final = "c5b1f0de-7a52-4b6e-8b1c-0b8c3a2f9d11"
QEMU_USER: Final = "libvirt-qemu"
WAIT_S: Final = 60.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket; the machine has no other way in."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=WAIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """bootwright.service in a machine."""

    machine: nspawn.Machine

    def systemctl(self, verb: str) -> None:
        self.machine.run(["systemctl", verb, "bootwright.service"])

    def property(self, name: str) -> str:
        argv = ["systemctl", "show", "--value", f"--property={name}", "bootwright.service"]
        return self.machine.run(argv).stdout.strip()

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = UnixConnection(self.machine.path(SOCKET))
        kind = "json" if path == "/v1/jobs" else "octet-stream"
        connection.request(method, path, body, {"Content-Type": f"application/{kind}"})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(content) if is_json else content

    def add(self, image_id: str, disk_format: str, content: bytes) -> None:
        """Put an image into the image source."""
        query = f"id={image_id}&name=tiny&disk_format={disk_format}"
        status, answer = self.request("POST", f"/v1/images?{query}", content)
        assert status == 201, answer

    def fetch(self, image_id: str) -> dict[str, Any]:
        """Have the image in the cache; the report of the job that saw to it."""
        return self.run(f"/v1/images/{image_id}/fetch")

    def run(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do the job that a request stands for; its report."""
        body = None if document is None else json.dumps(document).encode()
        status, job = self.request("POST", path, body)
        assert status == 202, job
        status, job = self.request("GET", f"/v1/jobs/{job['id']}/wait?timeout={WAIT_S:.0f}")
        assert (status, job["status"]) == (200, "DONE"), job.get("error", job)
        return dict(job)

    def base(self, image_id: str) -> Path:
        name = hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
        return self.machine.path(f"{INSTANCES}/_base/{name}")

    def process(self, pid: int) -> Path:
        return self.machine.path(f"/proc/{pid}")

    def main_pid(self) -> int:
        return int(self.property("MainPID"))

    def helper_pid(self) -> int:
        [pid] = (
            (self.process(self.main_pid()) / f"task/{self.main_pid()}/children").read_text().split()
        )
        return int(pid)

    def journal(self) -> str:
        return self.machine.run(["journalctl", "--unit=bootwright", "--no-pager"]).stdout


@pytest.fixture(scope="module")
def machine() -> Iterator[nspawn.Machine]:
    if os.getuid() != 0:
        reason = "needs root, to boot a machine"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with nspawn.booted(visible=[ENVIRONMENT, CHECKOUT]) as running:
        yield running


@pytest.fixture(scope="module")
def installed(machine: nspawn.Machine) -> Service:
    """What a package would install, and a configuration."""
    for source, target in (
        ("bootwright.service", "/etc/systemd/system/bootwright.service"),
        ("bootwright.sysusers", "/etc/sysusers.d/bootwright.conf"),
        ("bootwright.tmpfiles", "/etc/tmpfiles.d/bootwright.conf"),
    ):
        destination = machine.path(target)
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text((CHECKOUT / "etc" / source).read_text())
    drop_in = machine.path("/etc/systemd/system/bootwright.service.d/environment.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(DROP_IN)
    machine.run(["systemd-sysusers"])
    machine.run(["systemd-tmpfiles", "--create", "/etc/tmpfiles.d/bootwright.conf"])
    machine.path("/etc/bootwright/bootwright.conf").write_text(CONFIGURATION)
    machine.run(["systemctl", "daemon-reload"])
    return Service(machine=machine)


@pytest.fixture
def service(installed: Service) -> Iterator[Service]:
    """The service, started; stopped and forgotten afterwards."""
    try:
        installed.systemctl("start")
    except AssertionError as error:
        raise AssertionError(installed.journal()) from error
    yield installed
    installed.systemctl("stop")
    installed.machine.run(["systemctl", "reset-failed", "bootwright.service"], check=False)


def test_started_service_is_ready_and_answers(service: Service) -> None:
    # For Type=notify "start" returns when READY has come.
    assert service.property("ActiveState") == "active"
    assert service.property("SubState") == "running"
    assert service.property("StatusText")
    assert service.request("GET", "/healthz")[0] == 200


def test_the_doctor_asks_systemd_what_the_unit_allows(service: Service) -> None:
    def unit(configuration: str) -> dict[str, str]:
        service.machine.path("/etc/bootwright/doctor.conf").write_text(configuration)
        done = service.machine.run(
            [
                *(f"{ENVIRONMENT}/bin/bootwright", "doctor", "--format", "json"),
                # There is no D-Bus, by which systemd would tell others than root.
                *("--user", "root"),
                *("--config-file", "/etc/bootwright/doctor.conf"),
            ],
            check=False,
        )
        checks = json.loads(done.stdout)["checks"]
        assert not [check for check in checks if "could not be looked at" in check["message"]]
        # Without a libvirt it is not well; the rest is.
        found = {check["name"]: check["result"] for check in checks}
        assert (done.returncode, found["libvirt"], found["agent"]) == (5, "error", "ok")
        return {check["result"]: check["hint"] for check in checks if check["name"] == "unit"}

    assert unit(CONFIGURATION) == {"ok": ""}
    elsewhere = unit(f"[DEFAULT]\ninstances_path = /srv/vms\n{CONFIGURATION}")
    assert "ReadWritePaths=/srv/vms" in elsewhere["error"]


def test_start_is_not_over_before_leftovers_are_swept(service: Service) -> None:
    service.systemctl("stop")
    leftover = service.machine.path(f"{INSTANCES}/{LEFTOVER}")
    leftover.mkdir()
    # As the agent would have made it.
    instances = leftover.parent.stat()
    os.chown(leftover, instances.st_uid, instances.st_gid)

    service.systemctl("start")

    assert not leftover.exists()


def test_image_of_a_foreign_format_is_converted_in_the_sandbox(
    service: Service, tmp_path: Path
) -> None:
    content = hashlib.sha512(b"disk").digest() * 1024 * 16
    raw, vmdk = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    raw.write_bytes(content)
    options = ["-o", "subformat=streamOptimized"]
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", *options, raw, vmdk], check=True
    )
    service.add(VMDK_ID, "vmdk", vmdk.read_bytes())

    service.fetch(VMDK_ID)

    assert service.base(VMDK_ID).read_bytes() == content
    # A kernel or a filter without Landlock would have been warned of.
    assert "refuses Landlock" not in service.journal()


def test_disks_are_formatted_in_the_sandbox(service: Service) -> None:
    service.add(image_id := str(uuid.uuid4()), "raw", bytes(1 << 20))
    document = {
        "action": "prepare",
        "instance": {"name": "web-1"},
        "flavor": {
            "vcpus": 1,
            "ram": 64,
            "disk": 1,
            "ephemeral": [{"size": 1, "guest_format": "ext4"}],
            "swap": 8,
        },
        "image": {"id": image_id},
        "networks": [],
    }

    job = service.run("/v1/jobs", document)

    paths = {disk["role"]: disk["path"] for disk in job["disks"]}
    found = {
        role: service.machine.run(["blkid", "-p", "-o", "value", "-s", "TYPE", path]).stdout.strip()
        for role, path in paths.items()
        if role in ("ephemeral", "swap")
    }
    assert found == {"ephemeral": "ext4", "swap": "swap"}


def test_only_the_helper_holds_a_capability(service: Service) -> None:
    agent, helper = service.process(service.main_pid()), service.process(service.helper_pid())
    threads = [(task / "status").read_text() for task in (agent / "task").iterdir()]
    assert len(threads) > 1
    assert [privileges.held_capabilities(status) for status in threads] == [[]] * len(threads)
    assert all("\nNoNewPrivs:\t1\n" in status for status in threads)
    assert privileges.held_capabilities((helper / "status").read_text()) == ["CAP_FOWNER"]
    user = int(service.machine.run(["id", "--user", "bootwright"]).stdout)
    assert agent.stat().st_uid == user
    assert user != 0


def test_helper_refreshes_a_base_that_belongs_to_qemu(service: Service) -> None:
    content = hashlib.sha512(b"base").digest() * 1024
    service.add(IMAGE_ID, "raw", content)
    service.fetch(IMAGE_ID)
    base = service.base(IMAGE_ID)
    assert base.read_bytes() == content
    # What libvirt does when a domain that stands on the base starts.
    user, group = (
        int(service.machine.run(["id", option, QEMU_USER]).stdout)
        for option in ("--user", "--group")
    )
    os.chown(base, user, group)
    os.utime(base, (1, 1))

    service.fetch(IMAGE_ID)

    assert base.stat().st_mtime > 1
    assert (base.stat().st_uid, base.stat().st_gid) == (user, group)


def test_volumes_have_a_helper_of_their_own(service: Service) -> None:
    """With the drop-in; what it does with a volume is seen where there is device-mapper."""
    drop_in = service.machine.path("/etc/systemd/system/bootwright.service.d/lvm.conf")
    configuration = service.machine.path("/etc/bootwright/bootwright.conf")
    service.systemctl("stop")
    configuration.write_text(f"{CONFIGURATION}\n[libvirt]\nimages_volume_group = vg\n")
    try:
        with pytest.raises(AssertionError):
            service.systemctl("start")
        assert "started without CAP_DAC_OVERRIDE, CAP_SYS_ADMIN" in service.journal()
        drop_in.write_text((CHECKOUT / "etc/bootwright-lvm.conf").read_text())
        service.machine.run(["systemctl", "daemon-reload"])
        service.systemctl("start")
        agent = service.process(service.main_pid())
        pids = [
            pid for path in (agent / "task").glob("*/children") for pid in path.read_text().split()
        ]
        held = [
            privileges.held_capabilities((service.process(int(pid)) / "status").read_text())
            for pid in pids
        ]
        assert sorted(held) == [
            ["CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SYS_ADMIN"],
            ["CAP_FOWNER"],
        ]
        assert privileges.held_capabilities((agent / "status").read_text()) == []
    finally:
        drop_in.unlink(missing_ok=True)
        configuration.write_text(CONFIGURATION)
        service.machine.run(["systemctl", "daemon-reload"])


def test_dead_helper_brings_a_new_agent(service: Service) -> None:
    before = service.main_pid()
    service.machine.run(["kill", f"-{signal.SIGKILL}", str(service.helper_pid())])
    until(lambda: service.property("SubState") == "running" and service.main_pid() != before)
    assert service.property("NRestarts") == "1"
    helper = service.process(service.helper_pid())
    assert privileges.held_capabilities((helper / "status").read_text()) == ["CAP_FOWNER"]


def test_stop_is_clean(service: Service) -> None:
    helper = service.process(service.helper_pid())
    service.systemctl("stop")
    assert service.property("ActiveState") == "inactive"
    assert service.machine.path(STOPPED).read_text() == "success exited 0\n"
    assert not helper.exists()
    assert not service.machine.path(SOCKET).exists()
    journal = service.journal()
    assert "ready, serving on" in journal
    assert "Logging error" not in journal
    assert "Traceback" not in journal


def test_unit_is_well_formed_and_hardened(installed: Service) -> None:
    unit = "bootwright.service"
    verdict = installed.machine.run(["systemd-analyze", "verify", "--man=no", unit])
    assert "bootwright" not in verdict.stderr
    report = installed.machine.run(["systemd-analyze", "security", "--no-pager", unit]).stdout
    summary = report.splitlines()[-1]
    print(summary)  # noqa: T201 - a figure for the reader of the test's report
    assert float(summary.split(":")[1].split()[0]) < 2.5
