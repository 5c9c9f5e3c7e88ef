"""The contract of the command line and the API, each command through the real agent."""

import contextlib
import json
import os
import pty
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest
import yaml

from functional.conftest import Images
from functional.harness.agent import Agent
from functional.harness.console import wait_ready
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd

MIB: Final = 1 << 20
GIB: Final = 1 << 30
NOBODY: Final = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
SLOW: Final = Fault(rate=1.0 * MIB)
WAIT_S: Final = 30.0


@pytest.fixture(scope="module")
def proxy(glance: Glance) -> Iterator[FaultProxy]:
    with FaultProxy(glance.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def agent(work: Path, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[Agent]:
    """One for the whole module."""
    options = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none"},
    }
    agent = Agent(work / "contract", options)
    try:
        agent.start()
        yield agent
    finally:
        agent.close()


@pytest.fixture
def throttled(proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Glance, slow enough to be watched."""
    proxy.afterwards = SLOW
    yield proxy
    proxy.hurry()


def job(name: str, image_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "instance": {"name": name},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 1},
        "image": {"id": image_id},
        "networks": [],
        **fields,
    }


@pytest.fixture(scope="module")
def booted(agent: Agent, images: Images) -> dict[str, Any]:
    """The result of a job with all there is in one: the only guest of this module."""
    document = job("all-1", images.root, request_id="req-all-1")
    document["instance"] |= {"config_drive": True, "metadata": {"team": "blue"}}
    document["flavor"] |= {"ephemeral": [{"size": 1, "guest_format": "vfat"}], "swap": 64}
    return dict(agent.boot(document))


def curl(agent: Agent, path: str, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [
            *("curl", "-sS", "--unix-socket", agent.socket, "-w", "\n%{http_code}"),
            *(*arguments, f"http://agent{path}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


# The result of a job


def test_the_result_is_as_promised(
    agent: Agent, booted: dict[str, Any], images: Images, guest: Guest
) -> None:
    promised = "id action status task_state request_id instance image disks domain timeline error"
    assert set(promised.split()) <= set(booted)
    assert (booted["action"], booted["status"]) == ("boot", "ACTIVE")
    assert (booted["task_state"], booted["error"]) == (None, None)
    assert booted["request_id"] == "req-all-1"
    uuid = booted["instance"]["uuid"]
    assert booted["instance"] == {"uuid": uuid, "name": "all-1"}
    assert booted["image"]["id"] == images.root
    assert booted["image"]["digest"].startswith("sha512:")
    assert booted["image"]["source"] == "glance"
    assert booted["domain"] == {"uuid": uuid, "state": "running"}
    assert [phase["phase"] for phase in booted["timeline"]] == [
        "image_resolving",
        "image_downloading",
        "image_verifying",
        "block_device_mapping",
        "spawning",
    ]
    assert sum(phase["bytes"] for phase in booted["timeline"]) == sum(
        path.stat().st_size for path in (guest.kernel, guest.ramdisk, guest.root)
    )
    assert all(phase["seconds"] >= 0 for phase in booted["timeline"])
    instance_dir = agent.instances / uuid
    described = {
        disk["role"]: (Path(disk["path"]), disk["format"], disk["virtual_size"])
        for disk in booted["disks"]
    }
    assert described == {
        "kernel": (instance_dir / "kernel", "raw", guest.kernel.stat().st_size),
        "ramdisk": (instance_dir / "ramdisk", "raw", guest.ramdisk.stat().st_size),
        "root": (instance_dir / "disk", "qcow2", GIB),
        "ephemeral": (instance_dir / "disk.eph0", "raw", GIB),
        "swap": (instance_dir / "disk.swap", "raw", 64 * MIB),
        "config_drive": (
            instance_dir / "disk.config",
            "raw",
            (instance_dir / "disk.config").stat().st_size,
        ),
    }
    assert agent.json("job", "show", booted["id"]) == booted
    assert agent.json("job", "wait", booted["id"]) == booted


# What is printed


DOCUMENTS: Final = {
    ("job", "list"): {"jobs"},
    ("job", "events"): {"events"},
    ("instance", "list"): {"instances"},
    ("instance", "show", "all-1"): {"uuid", "name", "state", "disks", "job_id", "image_id"},
    ("instance", "console", "all-1"): {"console"},
    ("image", "list"): {"images"},
    ("cache", "status"): {"directory", "entries", "disk_usage", "free_space", "fetching"},
    ("status",): {"version", "pid", "started_at", "jobs", "instances", "cache", "checks"},
    ("status", "--long"): {"version", "pid", "started_at", "jobs", "instances", "cache", "checks"},
    ("config", "show"): {"options"},
    ("config", "check"): {"warnings", "problems"},
    ("config", "sample"): {"sample"},
}


@pytest.mark.parametrize("arguments", DOCUMENTS, ids=" ".join)
def test_json_is_one_document_with_the_promised_fields(
    agent: Agent, booted: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    done = agent.run(*arguments, "--format", "json")

    assert done.returncode == 0, done.stderr
    assert DOCUMENTS[arguments] <= set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "arguments", [("job", "list"), ("instance", "show", "all-1"), ("config", "show")], ids=" ".join
)
def test_yaml_says_the_same_as_json_and_a_table_is_for_people(
    agent: Agent, booted: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    as_yaml = agent.run("--format", "yaml", *arguments)
    as_table = agent.run(*arguments)

    assert yaml.safe_load(as_yaml.stdout) == agent.json(*arguments)
    assert (as_yaml.returncode, as_table.returncode) == (0, 0)
    assert len(as_table.stdout.splitlines()) > 1
    assert not as_table.stdout.startswith(("{", "["))
    assert "\x1b" not in as_table.stdout


def test_an_image_of_the_cache_names_who_stands_on_it(
    agent: Agent, booted: dict[str, Any], images: Images
) -> None:
    shown = agent.json("image", "show", images.root)

    assert (shown["state"], shown["format"]) == ("cached", "raw")
    assert shown["path"] == str(agent.base(images.root))
    assert shown["instances"] == [booted["instance"]["uuid"]]
    done = agent.run("image", "remove", images.root)
    assert done.returncode == 1
    assert "all-1" in done.stderr
    assert agent.base(images.root).exists()
    assert agent.json("image", "show", images.disk_qcow2)["state"] == "available"


def test_images_are_added_only_where_they_come_from_a_directory(agent: Agent, guest: Guest) -> None:
    done = agent.run("image", "add", guest.disk, "--disk-format", "raw")

    assert (done.returncode, done.stdout) == (2, "")
    assert "Hint: upload the image there" in done.stderr


# Exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ("job", "show", NOBODY),
        ("job", "wait", NOBODY),
        ("job", "cancel", NOBODY),
        ("job", "events", NOBODY),
        ("instance", "show", "nobody"),
        ("instance", "console", "nobody"),
        ("instance", "delete", "nobody"),
        ("image", "show", NOBODY),
        ("image", "remove", NOBODY),
        ("image", "show", "../../etc/passwd"),
    ],
    ids=" ".join,
)
def test_what_does_not_exist_is_exit_4(agent: Agent, arguments: tuple[str, ...]) -> None:
    done = agent.run(*arguments)

    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bot",), "'boot'"),
        (("job", "cancle", "x"), "'cancel'"),
        (("image", "fetsh", "x"), "'fetch'"),
        (("boot", "--flavour", "1x1x1"), "--flavor"),
        (("--formt", "json", "status"), "--format"),
        (("status", "--format", "xml"), "json"),
        (("boot", "--image", "i"), "--flavor"),
        (("boot", "--image", "i", "--name", "n", "--flavor", "big"), "2x2048x20"),
        (("job", "show"), "ID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_exit_2_and_names_what_was_meant(
    agent: Agent, arguments: tuple[str, ...], words: str
) -> None:
    done = agent.run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.partition("Error: ")[2]


def test_without_an_agent_a_command_says_how_to_start_one(agent: Agent, tmp_path: Path) -> None:
    done = agent.run("--socket", tmp_path / "none", "status")

    assert (done.returncode, done.stdout) == (1, "")
    assert "systemctl start bootwright" in done.stderr


def test_an_absurd_configuration_is_exit_2(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "bootwright.conf"
    path.write_text("[DEFAULT]\nmax_concurrent_builds = 0\ninstance_path = /x\n")

    for command in (("config", "check"), ("agent",)):
        done = subprocess.run(
            [*agent.command()[:1], "--config-file", path, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert f"{path}: [DEFAULT] max_concurrent_builds = 0: must be" in done.stderr
    assert agent.run("config", "check").returncode == 0


def test_a_degraded_agent_is_exit_5(
    agent: Agent, booted: dict[str, Any], libvirtd: PrivateLibvirtd
) -> None:
    libvirtd.stop()
    try:
        done = agent.run("--format", "json", "status")
        ready, checks = curl(agent, "/readyz")
        alive, _ = curl(agent, "/healthz")
        shown = agent.json("instance", "show", "all-1")
    finally:
        libvirtd.start()

    assert done.returncode == 5
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["libvirt"]
    assert "is libvirtd running?" in done.stderr
    assert (ready, alive) == (503, 200)
    assert json.loads(checks)["checks"] == json.loads(done.stdout)["checks"]
    assert shown["state"] == "unknown"
    assert agent.run("status").returncode == 0
    assert curl(agent, "/readyz")[0] == 200
    assert agent.json("instance", "show", "all-1")["state"] == "running"


def test_one_key_is_one_job(agent: Agent, booted: dict[str, Any], images: Images) -> None:
    document = job("keyed", images.root, action="prepare", idempotency_key="order-1")
    first = agent.boot(document)

    assert agent.boot(document)["id"] == first["id"]
    document["flavor"]["vcpus"] = 2
    done = agent.run("boot", "-f", "-", stdin=json.dumps(document))
    assert done.returncode == 1
    assert "IdempotencyConflict" in done.stderr
    status, _ = curl(agent, "/v1/jobs", "--json", json.dumps(document))
    assert status == 409
    agent.json("instance", "delete", "keyed")


# Waiting


def test_a_cancelled_job_leaves_nothing_and_the_other_waiter_gets_its_image(
    agent: Agent, libvirtd: PrivateLibvirtd, images: Images, glance: Glance, throttled: FaultProxy
) -> None:
    leftovers = Leftovers(agent, libvirtd)
    downloads = glance.downloads(images.disk_raw)
    document = job("impatient", images.disk_raw)

    done = agent.run("boot", "-f", "-", "--timeout", "1", stdin=json.dumps(document))
    assert (done.returncode, done.stdout) == (3, "")
    assert "image_downloading" in done.stderr
    [waiting] = agent.json("job", "list", "--status", "BUILD")["jobs"]
    assert waiting["instance"]["name"] == "impatient"
    other = agent.json("image", "fetch", "--no-wait", images.disk_raw)["jobs"][0]["id"]
    assert agent.run("job", "wait", other, "--timeout", "0.2").returncode == 3
    [fetching] = agent.json("cache", "status")["fetching"]
    assert (fetching["image_id"], fetching["waiters"]) == (images.disk_raw, 2)

    agent.json("job", "cancel", waiting["id"])
    ended = agent.json("job", "wait", waiting["id"], status=1)
    throttled.hurry()

    assert (ended["status"], ended["error"]["code"]) == ("CANCELLED", "Cancelled")
    assert agent.json("job", "cancel", waiting["id"])["status"] == "CANCELLED"
    assert agent.wait(other)["status"] == "DONE"
    assert glance.downloads(images.disk_raw) == downloads + 1
    agent.json("image", "remove", images.disk_raw)
    leftovers.assert_none()


def test_the_last_waiter_that_is_cancelled_ends_the_fetch(
    agent: Agent, libvirtd: PrivateLibvirtd, images: Images, throttled: FaultProxy
) -> None:
    leftovers = Leftovers(agent, libvirtd)
    job_id = agent.submit(job("alone", images.disk_raw))
    _until(lambda: agent.json("job", "show", job_id)["progress"] is not None)

    agent.json("job", "cancel", job_id)

    assert agent.wait(job_id, status=1)["status"] == "CANCELLED"
    _until(lambda: agent.json("cache", "status")["fetching"] == [])
    sent = throttled.matching[-1].sent
    throttled.hurry()
    time.sleep(0.2)
    assert throttled.matching[-1].sent <= sent + MIB
    if agent.partial(images.disk_raw).exists():
        # What has come is kept for whoever asks next.
        assert agent.json("image", "fetch", images.disk_raw)["jobs"][0]["status"] == "DONE"
        agent.json("image", "remove", images.disk_raw)
    leftovers.assert_none()


def _until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_live_line_on_a_terminal_and_only_the_result_on_a_pipe(
    agent: Agent, images: Images, throttled: FaultProxy
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        agent.command("--format", "json", "image", "fetch", images.disk_qcow2),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    screen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                screen.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    _until(lambda: b"MiB/s" in screen or process.poll() is not None)
    throttled.hurry()
    output, _ = process.communicate(timeout=WAIT_S)
    reader.join()
    os.close(ours)

    assert process.returncode == 0
    [report] = json.loads(output)["jobs"]
    assert report["status"] == "DONE"
    text = screen.decode()
    assert "image_downloading" in text
    assert " of " in text
    assert "MiB/s" in text
    assert "\n" not in text.replace("\r\n", "\n").rstrip("\n").split("image_downloading")[0]
    # The same on a pipe, from the cache.
    done = agent.run("--format", "json", "image", "fetch", images.disk_qcow2)
    assert done.stderr == ""
    assert json.loads(done.stdout)["jobs"][0]["image"]["source"] == "cache"


# The API


def test_the_api_answers_curl(agent: Agent, booted: dict[str, Any], images: Images) -> None:
    status, body = curl(agent, "/v1/jobs", "--json", json.dumps({"action": "fetch"}))
    assert (status, json.loads(body)["error"]["code"]) == (400, "InvalidJob")
    document = {"action": "fetch", "image": {"id": images.root}}
    header = "X-Openstack-Request-Id: req-from-curl"
    status, body = curl(agent, "/v1/jobs", "-i", "-H", header, "--json", json.dumps(document))
    assert status == 202
    head, _, text = body.replace("\r\n", "\n").partition("\n\n")
    assert "x-openstack-request-id: req-from-curl" in head.lower()
    accepted = json.loads(text)
    assert accepted["request_id"] == "req-from-curl"
    status, body = curl(agent, f"/v1/jobs/{accepted['id']}/wait?timeout=20")
    assert (status, json.loads(body)["status"]) == (200, "DONE")
    for path, key in (
        ("/v1/jobs", "jobs"),
        ("/v1/images", "images"),
        ("/v1/instances", "instances"),
        ("/v1/cache", "entries"),
        ("/v1/status", "checks"),
        ("/healthz", "live"),
        ("/readyz", "checks"),
        ("/v1/openapi.json", "paths"),
    ):
        status, body = curl(agent, path)
        assert (status, key in json.loads(body)) == (200, True), path
    status, body = curl(agent, "/metrics")
    assert status == 200
    assert "# TYPE " in body
    status, body = curl(agent, "/v2/jobs")
    assert (status, json.loads(body)["error"]["code"]) == (404, "NotFound")
    status, body = curl(agent, f"/v1/images/{images.root}", "-X", "DELETE")
    assert (status, json.loads(body)["error"]["code"]) == (409, "BackendError")


def test_events_are_numbered_and_resumable(agent: Agent, booted: dict[str, Any]) -> None:
    path = f"/v1/events?job={booted['id']}&follow=false"
    status, body = curl(agent, path)
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in _split(body)]
    numbers = [int(event["id"]) for event in events]
    data = [json.loads(event["data"]) for event in events]

    assert status == 200
    assert numbers == sorted(set(numbers))
    assert {event["event"] for event in events} == {"job"}
    assert [item["seq"] for item in data] == numbers
    assert data[0]["status"] == "QUEUED"
    assert data[-1]["status"] == "ACTIVE"
    _, rest = curl(agent, path, "-H", f"Last-Event-ID: {numbers[1]}")
    assert _split(rest) == _split(body)[2:]
    assert (
        agent.json("job", "events", booted["id"], "--since", str(numbers[1]))["events"] == data[2:]
    )


def _split(body: str) -> list[str]:
    return [event for event in body.split("\n\n") if event.strip()]


# Other kinds of jobs


def test_raw_disks_are_full_copies(agent: Agent, images: Images, guest: Guest) -> None:
    result = agent.boot(
        job("flat", images.root, images_type="raw", libvirt={"define": True, "start": False})
    )

    assert (result["status"], result["domain"]["state"]) == ("DONE", "shut off")
    [root] = [disk for disk in result["disks"] if disk["role"] == "root"]
    assert (root["format"], root["backing_chain"]) == ("raw", [])
    path = Path(root["path"])
    assert path.stat().st_size == root["virtual_size"] == GIB
    content = guest.root.read_bytes()
    with path.open("rb") as file:
        assert file.read(len(content)) == content
    agent.json("instance", "delete", "flat")
    assert agent.run("instance", "delete", "flat").returncode == 4


@pytest.mark.parametrize(
    "fields", [{"action": "prepare"}, {"libvirt": {"define": False, "start": False}}]
)
def test_disks_without_a_domain(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd, fields: dict[str, Any]
) -> None:
    leftovers = Leftovers(agent, libvirtd)
    result = agent.boot(job("disks-only", images.root, **fields))

    uuid = result["instance"]["uuid"]
    assert (result["status"], result["domain"]) == ("DONE", None)
    assert uuid not in libvirtd.domains()
    domain = ET.fromstring(result["domain_xml"])
    sources = [source.get("file") for source in domain.iterfind("devices/disk/source")]
    assert str(agent.instances / uuid / "disk") in sources
    assert domain.findtext("os/kernel") == str(agent.instances / uuid / "kernel")
    assert agent.json("instance", "show", uuid)["state"] is None
    agent.json("instance", "delete", uuid)
    leftovers.assert_none()


def test_a_template_keeps_what_it_says(
    agent: Agent, images: Images, libvirtd: PrivateLibvirtd
) -> None:
    template = """
        <domain type='qemu'>
          <title>made by hand</title>
          <memory unit='MiB'>128</memory>
          <vcpu>1</vcpu>
          <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
          <devices>
            <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
          </devices>
        </domain>"""
    result = agent.boot(
        job("by-hand", images.root, libvirt={"start": False, "domain_xml": template})
    )

    xml = subprocess.run(
        ["virsh", "--connect", libvirtd.uri, "dumpxml", result["domain"]["uuid"]],
        capture_output=True,
        check=True,
    ).stdout
    domain = ET.fromstring(xml)
    assert domain.findtext("title") == "made by hand"
    assert domain.findtext("name") == "by-hand"
    assert domain.findtext("memory") == str(128 * 1024)
    assert domain.findtext("devices/rng/backend") == "/dev/urandom"
    sources = [source.get("file") for source in domain.iterfind("devices/disk/source")]
    assert [disk["path"] for disk in result["disks"] if disk["role"] == "root"] == sources
    agent.json("instance", "delete", "by-hand")


# The guest has had all these tests to boot


def test_the_guest_sees_every_disk_and_its_name(agent: Agent, booted: dict[str, Any]) -> None:
    seen = wait_ready(lambda: agent.run("instance", "console", "all-1").stdout)

    by_role = {disk["role"]: disk for disk in booted["disks"]}
    expected = {
        by_role[role]["device_name"]: by_role[role]["virtual_size"]
        for role in ("root", "ephemeral", "swap")
    }
    assert expected.items() <= seen.disks.items()
    assert seen.config_drive == {"hostname": "all-1", "uuid": booted["instance"]["uuid"]}


def test_an_instance_that_is_deleted_is_gone(
    agent: Agent, booted: dict[str, Any], libvirtd: PrivateLibvirtd
) -> None:
    uuid = booted["instance"]["uuid"]

    result = agent.json("instance", "delete", uuid)

    assert (result["action"], result["status"]) == ("delete", "DONE")
    assert uuid not in libvirtd.domains()
    assert not (agent.instances / uuid).exists()
    assert "Traceback" not in agent.log
