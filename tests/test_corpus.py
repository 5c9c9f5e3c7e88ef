"""Every case of the corpus, through the inspection and through the cache."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.base import Base
from agent.cancellation import Cancellation
from agent.errors import BackendError, BootwrightError, ImageUnacceptable, InternalError
from agent.image import Image
from agent.inspection import Inspection
from agent.manifest import base_name
from agent.qemu_img import QemuImg
from tests import cache_kit
from tests.cache_kit import CacheKit
from tests.corpus import CASES, ELSEWHERE, VERDICTS, By, Case, Sample
from tests.corpus.case import GIB, MIB, VMDK_TYPES
from tests.corpus.qcow2_images import expanding
from tests.qemu_images import needs_qemu_img

pytestmark = needs_qemu_img


class Executions:
    """What this process starts, by whatever way; told by the interpreter itself.

    A hook cannot be taken away again, so there is one for all tests.
    """

    def __init__(self) -> None:
        self._started: list[list[str]] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            argv = arguments[1]
            assert isinstance(argv, list)
            self._started.append([os.fspath(word) for word in argv])
        elif event in ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork"):
            self._started.append([event])

    def clear(self) -> None:
        self._started.clear()

    def of_qemu(self) -> list[list[str]]:
        """Every command that has anything to do with QEMU, or that cannot be told."""
        return [argv for argv in self._started if len(argv) == 1 or "qemu" in " ".join(argv)]


EXECUTIONS = Executions()

CONVERTED = {"vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
"""Glance's name and QEMU's of what goes through qemu-img, if it is honest."""


class Source(cache_kit.Source):
    """An image source that answers as the sample wants."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self._sample = sample
        self.sent = 0
        self.on_chunk: Callable[[], None] = lambda: None

    def open(self, image: Image, offset: int, end: int | None = None) -> "Body":  # noqa: ARG002
        self.opened.append((image.id, offset))
        answers = self._sample.answers
        answer = answers[min(len(self.opened), len(answers)) - 1]
        return Body(self, answer(self._sample.data, offset), offset)


class Body(cache_kit.Body):
    def __init__(self, source: Source, chunks: Iterator[bytes], offset: int) -> None:
        super().__init__(source, b"", offset)
        self._answering = source
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._answering.sent += len(chunk)
            self._answering.on_chunk()
            yield chunk


def allocated(directory: Path) -> int:
    """What du says."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def image_of(case: Case, sample: Sample) -> Image:
    digest = sample.digest or ("sha512", hashlib.sha512(sample.data).hexdigest())
    size = len(sample.data) if sample.size is None else sample.size
    return Image(
        id="fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0",
        name=case.name,
        source="corpus",
        status="active",
        disk_format=case.disk_format,
        size=size if case.size_known else None,
        digest=digest if case.hash_known else None,
    )


def acquire(kit: CacheKit, image: Image, max_virtual_size: int | None) -> Base:
    return kit.cache.acquire(
        image,
        pin="job-1",
        max_virtual_size=max_virtual_size,
        cancellation=Cancellation(60),
        on_progress=lambda _: None,
    )


def made(case: Case, tmp_path: Path) -> Sample:
    work = tmp_path / "work"
    work.mkdir()
    sample = case.make(work)
    shutil.rmtree(work)
    return sample


def judge(case: Case, sample: Sample, chunk: int) -> None:
    inspected = Inspection("img-1", case.disk_format, size=len(sample.data), vmdk_types=VMDK_TYPES)
    for begin in range(0, len(sample.data), chunk):
        inspected.feed(memoryview(sample.data)[begin : begin + chunk])
    inspected.finish()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, tmp_path: Path) -> None:
    sample = made(case, tmp_path)
    image = image_of(case, sample)
    kit = CacheKit(directory=tmp_path / "instances", source=Source(sample))
    EXECUTIONS.clear()

    if case.refused is None:
        judge(case, sample, MIB)
        base = acquire(kit, image, case.max_virtual_size)
        truth = sample.data if sample.truth is None else sample.truth
        content = base.path.read_bytes()
        assert content[: len(truth)] == truth
        # Of a fixed geometry there may be some sectors more.
        assert not content[len(truth) :].strip(b"\0")
        assert (base.format, base.virtual_size) == ("raw", len(content))
        started = EXECUTIONS.of_qemu()
        if case.disk_format not in CONVERTED:
            assert started == []
        else:
            [argv] = started
            # The format is never left to be guessed.
            assert argv[argv.index("-f") + 1] == CONVERTED[case.disk_format]
        return

    if case.by is By.INSPECTION:
        for chunk in (MIB, 100_003):
            with pytest.raises(ImageUnacceptable) as judged:
                judge(case, sample, chunk)
            assert re.search(case.refused, judged.value.message)
    with pytest.raises(BootwrightError) as caught:
        acquire(kit, image, case.max_virtual_size)
    assert re.search(case.refused, caught.value.message, re.DOTALL)
    assert not isinstance(caught.value, BackendError | InternalError)
    assert EXECUTIONS.of_qemu() == []
    assert list(kit.store.entries()) == []
    assert not kit.store.path_of(base_name(image.id)).exists()


def test_every_number_has_its_verdict_and_a_test() -> None:
    here = {case.number for case in CASES} - {0}
    assert here | ELSEWHERE.keys() == set(range(1, 68))
    assert here == VERDICTS.keys()
    for number, verdict in VERDICTS.items():
        found = {case.refused is None for case in CASES if case.number == number}
        assert found == verdict, f"case {number}"
    for test in (test for tests in ELSEWHERE.values() for test in tests):
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (Path(__file__).parent / file).read_text(), test
    # A reason of its own: no pattern that would fit whatever is said.
    assert not [case for case in CASES if case.refused is not None and len(case.refused) < 4]


def test_the_watch_sees_what_is_started(tmp_path: Path) -> None:
    EXECUTIONS.clear()
    with pytest.raises(ImageUnacceptable):
        QemuImg().convert(
            Path("/dev/null"), "qcow2", tmp_path / "raw", Cancellation(), virtual_size=MIB
        )
    [argv] = EXECUTIONS.of_qemu()
    assert any(word.endswith("qemu-img") for word in argv)


def test_what_would_expand_is_refused_before_it_does(tmp_path: Path) -> None:
    # What follows the tables is more of the same: there is no need to read it.
    sample = Sample(data=expanding() + bytes(200 * MIB))
    assert len(expanding()) < 9 * MIB // 10
    case = next(case for case in CASES if case.number == 40)
    image = image_of(case, sample)
    source = Source(sample)
    kit = CacheKit(directory=tmp_path / "instances", source=source)
    most = 0

    def measure() -> None:
        nonlocal most
        most = max(most, allocated(kit.directory))

    source.on_chunk = measure
    EXECUTIONS.clear()

    with pytest.raises(BootwrightError, match="the flavor's disk only"):
        acquire(kit, image, GIB)

    assert EXECUTIONS.of_qemu() == []
    assert source.sent < 64 * MIB
    assert most < 64 * MIB
    assert list(kit.store.entries()) == []
    assert allocated(kit.directory) < MIB
