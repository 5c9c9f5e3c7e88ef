"""The console of a guest that says more than virtlogd keeps in one file."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.conftest import CACHE
from functional.harness import talker
from functional.harness.agent import Agent
from functional.harness.libvirtd import PrivateLibvirtd

LOG_SIZE = 64 << 10
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def libvirtd(work: Path) -> Iterator[PrivateLibvirtd]:
    """One whose virtlogd begins a file every 64 KiB: an emulated serial port takes its time."""
    with PrivateLibvirtd(work / "v", cache=CACHE / "libvirt", log_size=LOG_SIZE) as libvirtd:
        yield libvirtd


@pytest.fixture
def agent(work: Path, libvirtd: PrivateLibvirtd) -> Iterator[Agent]:
    root = work / "talking"
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "images": {"source": "directory", "directory": root / "images"},
    }
    agent = Agent(root, options)
    try:
        agent.start()
        yield agent
    finally:
        agent.close()


def console_after(agent: Agent, lines: int) -> Any:
    """Return the console of a guest that has said so many lines."""
    disk = agent.root / "disk"
    disk.write_bytes(talker.disk(lines))
    image = agent.json("image", "add", disk, "--disk-format", "raw")
    agent.boot(
        {
            "instance": {"name": "talker"},
            "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
            "image": {"id": image["id"]},
            "networks": [],
        }
    )
    deadline = time.monotonic() + LIMIT_S
    while True:
        shown = agent.json("instance", "console", "talker")
        if shown["console"].endswith(talker.line(lines - 1)):
            return shown
        assert time.monotonic() < deadline, shown["console"][-200:]


def test_what_virtlogd_has_rotated_is_shown_in_its_place(agent: Agent) -> None:
    lines = 3 * LOG_SIZE // talker.LINE_LENGTH

    shown = console_after(agent, lines)

    [directory] = [path for path in agent.instances.iterdir() if (path / "console.log").exists()]
    newest = directory / "console.log"
    assert newest.stat().st_uid == 0
    assert newest.stat().st_mode & 0o007 == 0
    assert (directory / "console.log.1").exists()
    assert shown["complete"]
    text = shown["console"]
    assert text[text.index(talker.line(0)) :] == "".join(map(talker.line, range(lines)))


def test_what_virtlogd_has_thrown_away_is_said_to_be_missing(agent: Agent) -> None:
    lines = 6 * LOG_SIZE // talker.LINE_LENGTH

    shown = console_after(agent, lines)

    assert not shown["complete"]
    kept = len(shown["console"]) // talker.LINE_LENGTH
    assert kept > 3 * LOG_SIZE // talker.LINE_LENGTH
    assert shown["console"] == "".join(map(talker.line, range(lines - kept, lines)))
    assert "the beginning is gone" in agent.run("instance", "console", "talker").stderr
