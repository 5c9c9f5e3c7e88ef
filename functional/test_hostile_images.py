"""Hostile and odd images through the installed agent, with the kernel telling what is started."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from functional.harness.agent import Agent, Options
from tests.corpus import CASES, Case, vmdk_images
from tests.waiting import until

# One of each kind; the whole corpus goes through the cache in tests/test_corpus.py.
NAMES: Final = (
    "qcow2 as raw",
    "quorum data file",
    "parent locator",
    "qcow2 of which half were uploaded",
    "vmdk subformat=streamOptimized of which half were uploaded",
    "vhdx block_size=1M of which 90 % were uploaded",
    "qcow2 with extended L2",
    "vhd",
)


# One more than by default.
ALLOWED: Final = "monolithicSparse,streamOptimized,twoGbMaxExtentSparse"


def case(name: str) -> Case:
    [found] = (case for case in CASES if case.name == name)
    return found


class Executions:
    """strace on a running agent, its threads and all that they start; writes down each execve."""

    def __init__(self, pid: int, log: Path) -> None:
        self._log = log
        self._strace = subprocess.Popen(
            ["strace", "-f", "-qq", "-e", "trace=execve", "-o", log, "-p", str(pid)],
            stdin=subprocess.DEVNULL,
        )
        until(lambda: self._strace.poll() is not None or _traced(pid))
        assert self._strace.poll() is None

    def of_qemu(self) -> list[str]:
        """The commands with a word of QEMU's in them, up to now."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [line for line in lines if "execve(" in line and "qemu" in line]

    def close(self) -> None:
        self._strace.send_signal(signal.SIGINT)
        self._strace.wait()


def _traced(pid: int) -> bool:
    """Whether every thread has a tracer."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        tracer = re.search(r"^TracerPid:\t(\d+)$", (task / "status").read_text(), re.MULTILINE)
        if tracer is None or tracer[1] == "0":
            return False
    return True


@pytest.fixture(scope="module")
def agent(work: Path) -> Iterator[Agent]:
    """An agent without Glance and libvirt; it only fetches."""
    root = work / "hostile"
    options: Options = {
        "images": {
            "source": "directory",
            "directory": root / "images",
            "vmdk_allowed_types": ALLOWED,
        },
        "libvirt": {"connection_uri": "test:///default"},
    }
    agent = Agent(root, options)
    with agent:
        yield agent


@pytest.fixture(scope="module")
def executions(agent: Agent, work: Path) -> Iterator[Executions]:
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("needs strace")
        pytest.skip("needs strace")
    executions = Executions(agent.pid, work / "execve.log")
    yield executions
    executions.close()


@pytest.mark.parametrize("name", NAMES)
def test_fetch(name: str, agent: Agent, executions: Executions, tmp_path: Path) -> None:
    chosen = case(name)
    (tmp_path / "work").mkdir()
    sample = chosen.make(tmp_path / "work")
    file = tmp_path / "image"
    file.write_bytes(sample.data)
    entry = agent.json("image", "add", file, "--disk-format", chosen.disk_format, "--name", "x")
    before = executions.of_qemu()

    done = agent.run("--format", "json", "image", "fetch", entry["id"])

    started = executions.of_qemu()[len(before) :]
    base = agent.base(entry["id"])
    if chosen.refused is None:
        assert done.returncode == 0, done.stderr
        truth = sample.data if sample.truth is None else sample.truth
        assert base.read_bytes()[: len(truth)] == truth
        # qcow2 is decoded in the agent itself; of the others one shows that the watch sees.
        assert bool(started) == (chosen.disk_format == "vhd")
        return
    assert done.returncode != 0
    error = json.loads(done.stdout)["jobs"][0]["error"]
    assert error["code"] == "ImageUnacceptable"
    assert re.search(chosen.refused, error["message"])
    assert started == []
    assert not base.exists()


def test_a_subformat_that_the_operator_allows(agent: Agent, tmp_path: Path) -> None:
    file = tmp_path / "image"
    for kind, allowed in (("twoGbMaxExtentSparse", True), ("custom", False)):
        new = f'createType="{kind}"'.encode()
        file.write_bytes(vmdk_images.edited(tmp_path, old=vmdk_images.TYPE, new=new))
        entry = agent.json("image", "add", file, "--disk-format", "vmdk", "--name", "x")
        done = agent.run("--format", "json", "image", "fetch", entry["id"])
        assert (done.returncode == 0) == allowed
        if not allowed:
            message = json.loads(done.stdout)["jobs"][0]["error"]["message"]
            assert "createType is custom, which is not in vmdk_allowed_types (mono" in message


def test_qemu_img_was_confined(agent: Agent) -> None:
    """The fetches above have gone well; without Landlock they would have, with a warning."""
    assert "Landlock" not in agent.log
