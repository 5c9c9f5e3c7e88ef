"""Boots, pre-seeds, removals, passes of gc and verifications of the same few images, all at once.

BOOTWRIGHT_STRESS_S makes it last longer than the few seconds of an ordinary run.
"""

import contextlib
import dataclasses
import os
import random
import threading
import time
from pathlib import Path

from agent.cancellation import Cancellation
from agent.errors import BackendError, Cancelled, NotFound
from tests.cache_kit import NEVER, CacheKit, Source, random_bytes

SECONDS = float(os.environ.get("BOOTWRIGHT_STRESS_S", "3"))
WORKERS = 16
EVERYTHING_UNUSED = dataclasses.replace(NEVER, minimum_age_s=-1)


class Worker(threading.Thread):
    def __init__(self, number: int, kit: CacheKit, source: Source, end: float) -> None:
        super().__init__(name=f"stress-{number}")
        self.done: dict[str, int] = {}
        self.error: BaseException | None = None
        self._number = number
        self._kit = kit
        self._source = source
        self._end = end
        self._random = random.Random(number)

    def run(self) -> None:
        steps = [self.boot, self.boot, self.boot, self.preload, self.leave, self.remove, self.gc]
        steps.append(self.verify)
        try:
            while time.monotonic() < self._end:
                step = self._random.choice(steps)
                step(self._random.choice(list(self._source.images)))
                self.done[step.__name__] = self.done.get(step.__name__, 0) + 1
        except BaseException as e:  # noqa: BLE001 - seen by the test
            self.error = e

    def boot(self, image_id: str) -> None:
        pin = f"boot-{self._number}"
        base = self._kit.acquire(self._source.images[image_id], pin=pin)
        record = self._kit.add_instance(base, name=f"on-{pin}")
        self._kit.cache.unpin(pin)
        # From here on only the instance keeps it.
        time.sleep(self._random.random() * 0.01)
        assert base.path.read_bytes() == self._source.data[image_id]
        self._kit.instances.remove(record.uuid)

    def preload(self, image_id: str) -> None:
        pin = f"preload-{self._number}"
        base = self._kit.acquire(self._source.images[image_id], pin=pin)
        assert base.path.read_bytes() == self._source.data[image_id]
        self._kit.cache.unpin(pin)

    def leave(self, image_id: str) -> None:
        """A boot that is cancelled while it waits."""
        cancellation = Cancellation()
        timer = threading.Timer(self._random.random() * 0.01, cancellation.cancel, [Cancelled("")])
        timer.start()
        try:
            self._kit.cache.acquire(
                self._source.images[image_id],
                pin=f"leave-{self._number}",
                max_virtual_size=None,
                cancellation=cancellation,
                on_progress=lambda _: None,
            )
        except Cancelled:
            pass
        finally:
            timer.join()
            self._kit.cache.unpin(f"leave-{self._number}")

    def remove(self, image_id: str) -> None:
        with contextlib.suppress(BackendError, NotFound):  # in use, or gone
            self._kit.pruner.remove(image_id)

    def gc(self, _: str) -> None:
        self._kit.pruner.gc(dry_run=False)

    def verify(self, image_id: str) -> None:
        try:
            found = self._kit.verifier.verify(image_id, Cancellation())
        except NotFound:
            return
        assert found.digest == found.expected


def test_sixteen_workers_over_five_images_never_fail_and_never_see_a_wrong_byte(
    tmp_path: Path,
) -> None:
    source = Source()
    shared = random_bytes(1)
    for number in range(5):
        # Two of them have the same bytes, and so the same file.
        source.add(shared if number < 2 else random_bytes(1), image_id=f"image-{number}")
    kit = CacheKit(directory=tmp_path / "instances", source=source, policy=EVERYTHING_UNUSED)
    end = time.monotonic() + SECONDS
    workers = [Worker(number, kit, source, end) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS + 60)

    errors = [worker.error for worker in workers if worker.error is not None]
    assert errors == []
    assert not any(worker.is_alive() for worker in workers)
    assert {name for worker in workers for name in worker.done} >= {"boot", "preload", "gc"}
    for image_id in source.images:
        try:
            found = kit.verifier.verify(image_id, Cancellation())
        except NotFound:
            continue
        assert found.digest == found.expected
    kit.pruner.gc(dry_run=False)
    assert kit.store.entries() == []
    kit.store.sweep(partials_s=-1, quarantine_s=-1, keep=kit.usage.may_need)
    kit.usage.settle()
    left = [p for p in kit.store.directory.rglob("*") if p.is_file() and p.parent.name != ".locks"]
    assert [path.parent.name for path in left] == [".hosts"]
