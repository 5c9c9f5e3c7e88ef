"""Who holds which power in the agent as it runs, and what it does without."""

import contextlib
import hashlib
import os
import pwd
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from functional.harness.agent import USER, Agent
from functional.harness.libvirtd import PrivateLibvirtd
from tests.waiting import until

QEMU_USER: Final = "libvirt-qemu"
CAP_FOWNER: Final = 1 << 3
SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")
IMAGE_ID: Final = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
WAIT_S: Final = 30.0


@contextlib.contextmanager
def running(
    root: Path, libvirtd: PrivateLibvirtd, *, capabilities: Sequence[str] = ("fowner",)
) -> Iterator[Agent]:
    """An agent with one image, of noise: nothing in this module needs a guest that boots."""
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "images": {"source": "directory", "directory": root / "images"},
    }
    agent = Agent(root, options, capabilities=capabilities)
    try:
        agent.start()
        if not agent.base(IMAGE_ID).exists():
            image = root / "image"
            image.write_bytes(hashlib.shake_256(b"noise").digest(1 << 20))
            agent.json("image", "add", image, "--disk-format", "raw", "--id", IMAGE_ID)
        yield agent
    finally:
        agent.close()


def boot(agent: Agent, name: str) -> Any:
    return agent.boot(
        {
            "instance": {"name": name},
            "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
            "image": {"id": IMAGE_ID},
            "networks": [],
        }
    )


def status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(process: Path) -> set[int]:
    """The masks of all sets that can be used."""
    fields = status(process)
    return {int(fields[name], 16) for name in SETS}


def threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def helper_of(agent: Agent) -> int:
    """Its child that runs nothing of its own; others are programs it starts, and soon gone."""
    command = command_of(agent.pid)
    children = [task / "children" for task in threads(agent.pid)]
    found = {int(pid) for path in children for pid in path.read_text().split()}
    [pid] = [pid for pid in found if command_of(pid) == command]
    return pid


def command_of(pid: int) -> bytes:
    """Its command line, empty if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def until_ended(pid: int) -> None:
    """Return when the process is gone, or waits for nothing but an init that reaps it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        until(lambda: status(Path(f"/proc/{pid}"))["State"].startswith("Z"))


def assert_line(agent: Agent, helper_has: set[int]) -> None:
    uid = str(pwd.getpwnam(USER).pw_uid)
    helper = helper_of(agent)
    assert len(threads(agent.pid)) > 1
    for task in threads(agent.pid):
        assert capabilities(task) == {0}, f"{task}: {status(task)['Name']}"
        assert status(task)["Uid"].split() == [uid] * 4
        assert status(task)["NoNewPrivs"] == "1"
    for task in threads(helper):
        fields = status(task)
        assert {int(fields[name], 16) for name in ("CapPrm", "CapEff")} == helper_has
        assert fields["Uid"].split() == [uid] * 4


@pytest.mark.parametrize(
    "capabilities", [["fowner"], ["fowner", "chown", "dac_override", "sys_admin"]]
)
def test_only_the_helper_holds_a_capability_and_only_one(
    work: Path, libvirtd: PrivateLibvirtd, capabilities: list[str]
) -> None:
    root = work / f"line-{len(capabilities)}"
    with running(root, libvirtd, capabilities=capabilities) as agent:
        assert_line(agent, {CAP_FOWNER})
        # Threads come with work.
        agent.json("image", "fetch", IMAGE_ID)
        agent.json("instance", "list")
        assert_line(agent, {CAP_FOWNER})


def give_to_qemu(base: Path) -> None:
    """Do what libvirt does to the base when a domain that stands on it starts."""
    qemu = pwd.getpwnam(QEMU_USER)
    os.chown(base, qemu.pw_uid, qemu.pw_gid)
    os.utime(base, (1, 1))


def test_a_base_of_another_user_is_touched(work: Path, libvirtd: PrivateLibvirtd) -> None:
    with running(work / "touched", libvirtd) as agent:
        agent.json("image", "fetch", IMAGE_ID)
        base = agent.base(IMAGE_ID)
        give_to_qemu(base)
        began = time.time()

        agent.json("image", "fetch", IMAGE_ID)

        assert base.stat().st_mtime >= began - 1
        assert base.stat().st_uid == pwd.getpwnam(QEMU_USER).pw_uid
        assert "could not be refreshed" not in agent.log


def test_without_the_capability_a_touch_fails_and_a_boot_does_not(
    work: Path, libvirtd: PrivateLibvirtd
) -> None:
    with running(work / "powerless", libvirtd, capabilities=()) as agent:
        assert_line(agent, {0})
        assert "started without CAP_FOWNER" in agent.log
        agent.json("image", "fetch", IMAGE_ID)
        base = agent.base(IMAGE_ID)
        give_to_qemu(base)

        agent.json("image", "fetch", IMAGE_ID)
        result = boot(agent, "web-1")

        assert (result["status"], result["domain"]["state"]) == ("ACTIVE", "running")
        assert base.stat().st_mtime == 1
        warnings = re.findall(f".*WARNING.*last use of base {base.name}.*", agent.log)
        assert len(warnings) == 1, agent.log


def test_root_is_refused(work: Path, libvirtd: PrivateLibvirtd) -> None:
    agent = Agent(work / "as-root", {"libvirt": {"connection_uri": libvirtd.uri}})
    agent.configure({"images": {"source": "directory", "directory": agent.root / "images"}})

    done = agent.run("agent")

    assert (done.returncode, done.stdout) == (1, "")
    assert "must not run as root" in done.stderr
    assert "systemctl start bootwright" in done.stderr
    assert "Traceback" not in done.stderr
    assert not agent.socket.exists()
    assert not (agent.root / "journal.db").exists()


def test_an_agent_without_its_helper_ends(work: Path, libvirtd: PrivateLibvirtd) -> None:
    with running(work / "bereft", libvirtd) as agent:
        pid = agent.pid
        os.kill(helper_of(agent), signal.SIGKILL)

        assert agent.wait_end(WAIT_S) == 1

        assert "helper has ended" in agent.log
        assert not agent.socket.exists()
        assert subprocess.run(["pgrep", "-P", str(pid)], check=False).returncode == 1
        agent.start()
        assert_line(agent, {CAP_FOWNER})
        helper = helper_of(agent)
        assert agent.stop() == 0
        until_ended(helper)
