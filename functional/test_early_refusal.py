"""What does not fit is refused from its header, with the installed agent on a small file system."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from functional.harness.agent import Agent, Options
from tests.corpus import qcow2_images
from tests.corpus.case import CONTENT, GIB, MIB

_ROOM: Final = 256 * MIB
_IMAGE: Final = 130 * MIB


@pytest.fixture(scope="module")
def agent(work: Path) -> Iterator[Agent]:
    """An agent without Glance and libvirt, whose instances are on a file system of their own."""
    root = work / "small"
    instances = root / "instances"
    instances.mkdir(parents=True)
    disk = work / "small.ext4"
    with disk.open("wb") as file:
        file.truncate(_ROOM)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, instances], check=True)
    try:
        options: Options = {
            "DEFAULT": {"max_concurrent_builds": 4},
            "images": {"source": "directory", "directory": root / "images"},
            "libvirt": {"connection_uri": "test:///default"},
            "image_cache": {"max_size": 1},
        }
        with Agent(root, options) as agent:
            yield agent
    finally:
        subprocess.run(["umount", instances], check=True)


def added(agent: Agent, file: Path, disk_format: str) -> str:
    entry = agent.json("image", "add", file, "--disk-format", disk_format, "--name", "x")
    return str(entry["id"])


def written(agent: Agent) -> int:
    """Bytes the agent has given to write(2) and its like, wherever to."""
    fields = dict(
        line.split(": ") for line in Path(f"/proc/{agent.pid}/io").read_text().splitlines()
    )
    return int(fields["wchar"])


def kept(agent: Agent) -> int:
    return sum(path.lstat().st_blocks * 512 for path in agent.bases.rglob("*") if path.is_file())


def prepare(agent: Agent, image_id: str) -> Any:
    document = {
        "action": "prepare",
        "instance": {"name": "bomb"},
        "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
        "image": {"id": image_id},
    }
    return agent.boot(document, status=1)


def test_image_that_would_expand_beyond_the_flavor_is_refused_from_its_header(
    agent: Agent, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(qcow2_images.expanding())
    assert bomb.stat().st_size < 9 * MIB // 10
    image_id = added(agent, bomb, "qcow2")
    before = written(agent), kept(agent)

    error = prepare(agent, image_id)["error"]

    assert error["code"] == "FlavorDiskSmallerThanImage"
    assert str(4 * GIB) in error["message"]
    assert written(agent) - before[0] < 2 * MIB
    assert kept(agent) - before[1] < MIB
    assert not agent.base(image_id).exists()
    assert not list((agent.bases / ".partial").iterdir())


def test_image_that_would_expand_beyond_the_cache_is_refused_from_its_header(
    agent: Agent, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(qcow2_images.expanding())
    image_id = added(agent, bomb, "qcow2")
    before = written(agent)

    done = agent.json("image", "fetch", image_id, status=1)

    error = done["jobs"][0]["error"]
    assert error["code"] == "InsufficientFreeSpace"
    assert f"max_size {GIB}" in error["message"]
    assert written(agent) - before < 2 * MIB
    assert not agent.base(image_id).exists()


def test_two_images_that_fit_only_one_by_one_are_not_begun_together(
    agent: Agent, tmp_path: Path
) -> None:
    ids = []
    for number in range(2):
        raw, image = tmp_path / f"raw{number}", tmp_path / f"image{number}"
        raw.write_bytes((os.urandom(64) + CONTENT)[:MIB] * (_IMAGE // MIB))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
        ids.append(added(agent, image, "qcow2"))

    done = agent.run("--format", "json", "image", "fetch", *ids)

    jobs = json.loads(done.stdout)["jobs"]
    refused = [job["error"] for job in jobs if job["status"] != "DONE"]
    # Who comes when the other is done takes its place: nobody needs that one any more.
    assert len(refused) <= 1
    for error in refused:
        assert error["code"] == "InsufficientFreeSpace"
        assert "promised to other fetches" in error["message"]
    assert "No space left" not in agent.log
    assert sum(agent.base(image_id).exists() for image_id in ids) == 1
    assert kept(agent) < _IMAGE + 2 * MIB
