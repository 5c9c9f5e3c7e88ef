"""Images of noise, and what happens to their bases."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from functional.harness.agent import Agent
from functional.harness.glance import Glance

MIB: Final = 1 << 20
WEEK_S: Final = 7 * 86400.0
GOES_AT_ONCE: Final = {"remove_unused_original_minimum_age_seconds": 0, "manager_interval": 0}
"""A base nobody needs goes, but only when somebody asks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image of noise, a bare file system to all who ask."""

    id: str
    data: bytes

    def is_at(self, path: Path) -> bool:
        return path.read_bytes() == self.data


Upload = Callable[..., Sample]


@pytest.fixture
def upload(glance: Glance, tmp_path: Path) -> Iterator[Upload]:
    """Return a function that uploads so many MiB of noise, or given bytes."""
    samples = []

    def upload(mib: int = 2, *, data: bytes | None = None) -> Sample:
        path = tmp_path / "noise"
        path.write_bytes(data or os.urandom(mib * MIB))
        sample = Sample(id=glance.upload(path, disk_format="raw"), data=path.read_bytes())
        samples.append(sample)
        return sample

    yield upload
    for sample in samples:
        glance.delete(sample.id)


def job(name: str, sample: Sample, **fields: Any) -> dict[str, Any]:
    return {
        "action": "prepare",
        "instance": {"name": name},
        "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
        "image": {"id": sample.id},
        "networks": [],
        **fields,
    }


def fetch(agent: Agent, *samples: Sample) -> None:
    agent.json("image", "fetch", *(sample.id for sample in samples))


def make_old(agent: Agent, sample: Sample, seconds: float) -> None:
    """Let a base look as if nobody had used it for so long."""
    base = agent.base(sample.id)
    manifest = base.with_name(f"{base.name}.json")
    status = manifest.stat()
    then = time.time() - seconds
    os.utime(base, (then, then))
    # A manifest is never younger than what it describes.
    text = manifest.read_text()
    created = text.partition('"created_at":')[2].partition(",")[0].partition("\n")[0].strip()
    manifest.write_text(text.replace(created, str(then)))
    os.chown(manifest, status.st_uid, status.st_gid)


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MIB + 12345)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def refused(agent: Agent, *arguments: str) -> str:
    """Run a command that has to fail; return why it does."""
    done = agent.run(*arguments)
    assert done.returncode == 1, (done.stdout, done.stderr)
    return done.stderr
