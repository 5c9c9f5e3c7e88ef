"""A job that has to fail: with one error code, what to do, and no trace."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from functional.harness.agent import Agent
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd

MIB: Final = 1 << 20
NO_IMAGE: Final = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


@pytest.fixture(scope="module")
def agent(work: Path, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[Agent]:
    """One for the whole module: bad input leaves an agent as it was."""
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none", "num_retries": 1},
    }
    with Agent(work / f"bad-input-{os.urandom(4).hex()}", options) as agent:
        yield agent


@pytest.fixture(scope="module")
def local(work: Path, libvirtd: PrivateLibvirtd) -> Iterator[Agent]:
    """An agent with images of its own directory, which takes any bytes under any name."""
    root = work / f"bad-images-{os.urandom(4).hex()}"
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "images": {"source": "directory", "directory": root / "images"},
    }
    with Agent(root, options) as agent:
        yield agent


@pytest.fixture(autouse=True)
def _nothing_left(agent: Agent, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[None]:
    leftovers = Leftovers(agent, libvirtd)
    yield
    proxy.faults, proxy.afterwards = [], Fault()
    leftovers.assert_none()


def job(image_id: str, *, disk: int = 1, ram: int = 192, **fields: object) -> dict[str, Any]:
    return {
        "instance": {"name": "web-1"},
        "flavor": {"vcpus": 1, "ram": ram, "disk": disk},
        "image": {"id": image_id},
        **fields,
    }


def refused(agent: Agent, document: dict[str, Any], code: str, *, status: int = 1) -> str:
    """Boot what must fail with `code`; return message and hint."""
    done = agent.run("--format", "json", "boot", "-f", "-", stdin=json.dumps(document))
    assert done.returncode == status, done.stdout + done.stderr
    report = json.loads(done.stdout)
    error = report["error"]
    assert (report["status"], error["code"]) == ("ERROR", code), error
    assert error["message"]
    assert error["hint"]
    assert code in done.stderr
    assert error["message"] in done.stderr
    assert error["hint"] in done.stderr
    assert "Traceback" not in done.stderr
    return f"{error['message']}\n{error['hint']}"


def add(agent: Agent, path: Path, disk_format: str) -> str:
    added = agent.json("image", "add", path, "--disk-format", disk_format)
    return str(added["id"])
