"""Boots, fetches, cancels, deletes, removals, passes of gc and verifications, all at once.

BOOTWRIGHT_STRESS_S makes it last longer than the few seconds of an ordinary run; what came of it
is logged (--log-cli-level=INFO).
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from agent.client import Client, Refused
from agent.report import DiskReport, JobReport, Role, Status
from agent.views import Soundness
from functional.conftest import MakeAgent
from functional.harness.agent import Agent
from functional.harness.glance import Glance

LOG = logging.getLogger(__name__)

SECONDS: Final = float(os.environ.get("BOOTWRIGHT_STRESS_S", "5"))
WORKERS: Final = 16
IMAGES: Final = 5
MIB: Final = 1 << 20
LIMIT_S: Final = 60.0
CODES_OF_NO_BASE: Final = {"BackendError", "NotFound"}
"""What a removal or a verification may say: somebody needs it, or it is not there."""


class Worker(threading.Thread):
    def __init__(self, number: int, agent: Agent, images: Mapping[str, bytes], end: float) -> None:
        super().__init__(name=f"stress-{number}")
        self.done: Counter[str] = Counter()
        self.longest = 0.0
        self.error: BaseException | None = None
        self._number = number
        self._agent = agent
        self._images = images
        self._end = end
        self._random = random.Random(number)
        self._client = Client(agent.socket)

    def run(self) -> None:
        steps = [self.boot] * 4 + [self.cancel] * 2
        steps += [self.fetch, self.remove, self.gc, self.verify]
        try:
            with self._client:
                while (began := time.monotonic()) < self._end:
                    step = self._random.choice(steps)
                    step(self._random.choice(list(self._images)))
                    self.done[step.__name__] += 1
                    self.longest = max(self.longest, time.monotonic() - began)
        except BaseException as e:  # noqa: BLE001 - seen by the test
            self.error = e

    def _prepare(self, image_id: str) -> JobReport:
        return self._client.submit(
            {
                "action": "prepare",
                "instance": {"name": f"stress-{self._number}"},
                "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
                "image": {"id": image_id},
                "images_type": self._random.choice(["qcow2", "qcow2", "raw"]),
                "networks": [],
            }
        )

    def _finished(self, job: JobReport, *good: Status) -> JobReport:
        report = self._client.wait(job.id, LIMIT_S)
        assert report.status in good, report
        return report

    def _undo(self) -> None:
        job = self._client.delete_instance(f"stress-{self._number}")
        self._finished(job, Status.DONE)

    def boot(self, image_id: str) -> None:
        report = self._finished(self._prepare(image_id), Status.DONE)
        [root] = [disk for disk in report.disks if disk.role is Role.ROOT]
        # From here on only the instance keeps its base.
        time.sleep(self._random.random() * 0.05)
        assert bytes_of(root, len(self._images[image_id])) == self._images[image_id], report
        self._undo()

    def cancel(self, image_id: str) -> None:
        """A boot that is cancelled somewhere on its way, or too late."""
        job = self._prepare(image_id)
        time.sleep(self._random.random() * 0.1)
        self._client.cancel(job.id)
        report = self._finished(job, Status.CANCELLED, Status.DONE)
        if report.status is Status.DONE:
            self._undo()

    def fetch(self, image_id: str) -> None:
        self._finished(self._client.fetch_image(image_id), Status.DONE)

    def remove(self, image_id: str) -> None:
        with no_base():
            self._client.remove_image(image_id)

    def gc(self, image_id: str) -> None:  # noqa: ARG002 - all steps have it
        self._client.gc(dry_run=self._random.random() < 0.3)

    def verify(self, image_id: str) -> None:
        with no_base():
            found = self._client.verify_image(image_id)
            assert found.soundness is Soundness.INTACT, found


@contextlib.contextmanager
def no_base() -> Iterator[None]:
    try:
        yield
    except Refused as e:
        if e.error.code not in CODES_OF_NO_BASE:
            raise


def bytes_of(disk: DiskReport, count: int) -> bytes:
    """The first bytes of a disk that nobody has written to."""
    match disk.format:
        case "raw":
            path = Path(disk.path)
        case _:
            # Bytes 8 to 19 of a qcow2 say where the name of its backing file stands.
            with Path(disk.path).open("rb") as file:
                head = file.read(4096)
            offset, length = int.from_bytes(head[8:16]), int.from_bytes(head[16:20])
            path = Path(head[offset : offset + length].decode())
            assert [str(path)] == [backing.path for backing in disk.backing_chain]
    with path.open("rb") as file:
        return file.read(count)


def test_sixteen_workers_over_five_images_never_fail_and_never_see_a_wrong_byte(
    make_agent: MakeAgent, glance: Glance, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "httpx")  # a line for each request
    agent = make_agent(
        options={
            "image_cache": {
                "remove_unused_original_minimum_age_seconds": 0,
                "manager_interval": 1,
                "scrub_interval": 1,
            },
            "DEFAULT": {"max_concurrent_builds": WORKERS},
        }
    )
    contents = [os.urandom(2 * MIB) for _ in range(IMAGES - 1)]
    contents.append(contents[0])  # two with the same bytes, and so the same file
    images = {}
    for data in contents:
        path = tmp_path / "noise"
        path.write_bytes(data)
        images[glance.upload(path, disk_format="raw")] = data
    end = time.monotonic() + SECONDS
    workers = [Worker(number, agent, images, end) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS + 2 * LIMIT_S)

    assert [worker.error for worker in workers if worker.error is not None] == []
    assert not any(worker.is_alive() for worker in workers)
    done = sum((worker.done for worker in workers), Counter[str]())
    assert {"boot", "cancel", "fetch", "gc"} <= done.keys()
    with Client(agent.socket) as client:
        statuses = Counter(job.status.value for job in client.jobs())
        client.gc(dry_run=False)
        assert client.images() == []
        assert client.instances() == []
        assert client.cache().fetching == ()
    LOG.info(
        "%.0f s, %d workers, %d images: %s; jobs %s; %d downloads; the longest step %.1f s",
        SECONDS,
        WORKERS,
        IMAGES,
        dict(done.most_common()),
        dict(statuses.most_common()),
        sum(glance.downloads(image_id) for image_id in images),
        max(worker.longest for worker in workers),
    )
    assert set(statuses) <= {"DONE", "CANCELLED"}
    assert {path.name for path in agent.instances.iterdir()} == {"_base"}
    assert {path.name for path in agent.bases.iterdir() if not path.name.startswith(".")} == set()
    assert [line for line in agent.log.splitlines() if " ERROR " in line] == []
    assert "Traceback" not in agent.log
    for image_id in images:
        glance.delete(image_id)
