"""`bootwright doctor` on a host that is well, and with one thing wrong at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from functional.conftest import MakeAgent
from functional.harness.agent import Agent, make_user
from functional.harness.libvirtd import PrivateLibvirtd


def examined(agent: Agent, status: int) -> dict[str, dict[str, Any]]:
    """What the doctor says, by the name of the check; the worst counts where there are several."""
    document = agent.json("doctor", status=status)
    assert document["degraded"] is (status == 5)
    worst = ["ok", "warning", "error"]
    checks = sorted(document["checks"], key=lambda check: worst.index(check["result"]))
    assert not [check for check in checks if "could not be looked at" in check["message"]]
    assert all(bool(check["hint"]) is (check["result"] != "ok") for check in checks)
    return {check["name"]: check for check in checks}


def of(checks: dict[str, dict[str, Any]], result: str) -> set[str]:
    return {name for name, check in checks.items() if check["result"] == result}


WELL = {
    "user", "configuration", "groups", "capabilities", "instances_path", "image cache",
    "state_path", "socket", "cache space", "state space", "file system", "instances", "hosts",
    "libvirt", "virt_type", "qemu-img", "glance",
}  # fmt: skip
"""What is so on every host the tests run on."""


def test_a_host_that_is_well_is_exit_0_with_the_agent_or_without(agent: Agent) -> None:
    running = examined(agent, 0)
    assert of(running, "ok") >= WELL | {"agent"}
    assert "QEMU" in running["libvirt"]["message"]
    before = sorted(agent.instances.rglob("*"))

    agent.stop()
    stopped = examined(agent, 0)

    assert of(stopped, "ok") >= WELL
    assert stopped["agent"]["result"] == "warning"
    assert sorted(agent.instances.rglob("*")) == before
    table = agent.run("doctor")
    assert table.returncode == 0
    assert "all below is what bootwright sees" in table.stdout


@contextmanager
def closed_directory(agent: Agent) -> Iterator[str]:
    os.chown(agent.instances, 0, 0)
    yield "instances_path"
    os.chown(agent.instances, make_user().pw_uid, make_user().pw_gid)


@contextmanager
def unreadable_record(agent: Agent) -> Iterator[str]:
    directory = agent.instances / "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
    directory.mkdir()
    (directory / "instance.json").write_text("{")
    yield "instances"
    (directory / "instance.json").unlink()
    directory.rmdir()


def test_what_is_wrong_is_named_and_is_exit_5(
    make_agent: MakeAgent, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    agent.stop()
    for wrong in (closed_directory, unreadable_record):
        with wrong(agent) as name:
            assert of(examined(agent, 5), "error") == {name}
    libvirtd.stop()
    try:
        assert of(examined(agent, 5), "error") == {"libvirt"}
    finally:
        libvirtd.start()
    agent.configure(
        {
            "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
            "glance": {"endpoint_override": "http://127.0.0.1:1", "auth_type": "none"},
        }
    )
    found = examined(agent, 5)
    assert of(found, "error") == {"glance"}
    assert "Connection refused" in found["glance"]["message"]
    # What the agent would not start with is all there is to say.
    agent.configure({"image_cache": {"max_size": "much"}})
    assert set(examined(agent, 5)) == {"user", "configuration"}


def test_who_looks_at_it_counts_and_not_that_root_asks(agent: Agent) -> None:
    document = json.loads(agent.run("doctor", "--user", "nobody", "--format", "json").stdout)

    found = {check["name"] for check in document["checks"] if check["result"] == "error"}
    assert {"groups", "instances_path", "libvirt"} <= found
