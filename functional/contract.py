"""An agent for the contract of the command line and the API, and its one guest."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from functional.conftest import Images
from functional.harness.agent import Agent
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.libvirtd import PrivateLibvirtd

MIB: Final = 1 << 20
GIB: Final = 1 << 30
SLOW: Final = Fault(rate=1.0 * MIB)


@pytest.fixture(scope="module")
def agent(work: Path, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[Agent]:
    """One for the whole module."""
    options = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none"},
    }
    agent = Agent(work / f"contract-{os.urandom(4).hex()}", options)
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
