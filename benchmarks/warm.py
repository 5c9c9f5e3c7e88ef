"""A boot of an image that is in the cache: Bootwright beside the floor, in one run.

    python -m benchmarks.warm [--jobs 300] [DIRECTORY]

For each way, in turn and several times over:

    bootwright          accepted job to disks ready: journal, instance.json, overlay, XML, durably
    overlay alone       what of it is the disk: the overlay, durably
    qemu-img create -b  the same overlay by the program that everybody uses, not durably
    bare write          the overlay's bytes written, fdatasynced, renamed: no less is possible

and, of one more run each under strace, the processes started and the syncs made per boot. Last,
what libvirt takes to define and start such a domain (emulated, paused at once): beside it the
rest counts for little. The ratios are what matters; DIRECTORY says which disk is measured.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import domain_xml, qcow2
from agent.directory import DirectorySource
from agent.hypervisor import Hypervisor
from benchmarks.boots import IMAGE_ID
from functional.conftest import CACHE
from functional.harness.libvirtd import PrivateLibvirtd
from functional.test_hypervisor import new_spec

MIB, GIB = 1 << 20, 1 << 30
ROUNDS = 5
WORKERS = (1, 8, 32)
# Of header, refcount table and refcount block, each with nothing behind its first block.
PLACES = (0, 1 << 16, 2 << 16)
TRACED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Of one way; milliseconds for one boot each."""

    name: str
    milliseconds: list[float]
    per_second: float

    def line(self, baseline: float | None = None) -> str:
        ordered = sorted(self.milliseconds)
        p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
        ratio = "" if baseline is None else f"{p50 / baseline:>13.2f}"
        return f"{self.name:<34}{p50:>9.2f}{p99:>9.2f}{self.per_second:>11.0f}{ratio}"


def boots(directory: Path, images_type: str, workers: int, jobs: int, *trace: str) -> Any:
    process = subprocess.Popen(
        [*trace, sys.executable, "-m", "benchmarks.boots", directory, images_type, str(workers),
         str(jobs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both are pipes")
    process.stdout.readline()
    answer, _ = process.communicate(b"\n")
    if process.returncode:
        raise SystemExit(f"benchmarks.boots ended with {process.returncode}")
    return json.loads(answer)


def bootwright(directory: Path, images_type: str, workers: int, jobs: int) -> Timing:
    answers = [boots(fresh(directory), images_type, workers, jobs // ROUNDS) for _ in range(ROUNDS)]
    return Timing(
        name=f"bootwright, {images_type}, {workers} at a time",
        milliseconds=[each for answer in answers for each in answer["milliseconds"]],
        per_second=jobs // ROUNDS * ROUNDS / sum(answer["seconds"] for answer in answers),
    )


def fresh(directory: Path) -> Path:
    """Make a directory with an image in the local image source."""
    made = Path(tempfile.mkdtemp(dir=directory))
    (made / "images").mkdir()
    DirectorySource(made / "images").add(
        [os.urandom(MIB)] * 16, disk_format="raw", name="warm", image_id=IMAGE_ID
    )
    return made


def alone(name: str, directory: Path, jobs: int, make: Callable[[Path], None]) -> Timing:
    """Time something that makes one overlay, again and again."""
    directory.mkdir()
    milliseconds = []
    for number in range(jobs):
        began = time.perf_counter()
        make(directory / f"disk{number}")
        milliseconds.append((time.perf_counter() - began) * 1000)
    return Timing(name=name, milliseconds=milliseconds, per_second=1000 * jobs / sum(milliseconds))


def qemu_img(base: Path, target: Path) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", target, "1G"],
        check=True,
    )


def native(base: Path, target: Path) -> None:
    qcow2.create_overlay(target, virtual_size=GIB, backing_file=base, backing_format="raw")


def bare(data: list[tuple[int, bytes]], length: int, target: Path) -> None:
    """What `qcow2.create_overlay` writes, with nothing around it."""
    aside = target.with_suffix(".tmp")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    os.ftruncate(fd, length)
    for offset, piece in data:
        os.pwrite(fd, piece, offset)
    os.fdatasync(fd)
    os.close(fd)
    aside.rename(target)


def traced(directory: Path, images_type: str) -> tuple[float, float]:
    """Return processes started and syncs made per boot."""
    log = directory / f"strace-{images_type}"
    calls = "execve,fsync,fdatasync"
    strace = ("strace", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}")
    counts = []
    # The difference between many and few leaves out what starting and ending costs.
    for jobs in (TRACED, 2 * TRACED):
        boots(fresh(directory), images_type, 1, jobs, *strace)
        found = re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)\(", log.read_text(), re.MULTILINE)
        counts.append(Counter(found))
    few, many = counts
    difference = many - few
    syncs = difference["fsync"] + difference["fdatasync"]
    return difference["execve"] / TRACED, syncs / TRACED


def libvirt_share(directory: Path) -> Timing:
    """Time define and start of the domain that such a boot ends with."""
    milliseconds = []
    with PrivateLibvirtd(directory / "libvirt", cache=CACHE / "libvirt") as libvirtd:
        hypervisor = Hypervisor(libvirtd.uri, virt_type="qemu")
        hypervisor.check()
        for _ in range(10):
            spec = new_spec(directory)
            began = time.perf_counter()
            hypervisor.define(domain_xml.build(spec))
            hypervisor.start(spec.uuid)
            milliseconds.append((time.perf_counter() - began) * 1000)
            hypervisor.destroy(spec.uuid)
            hypervisor.undefine(spec.uuid)
        hypervisor.close()
    return Timing(
        name="libvirt: define and start",
        milliseconds=milliseconds,
        per_second=1000 * len(milliseconds) / sum(milliseconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bootwright-", dir=arguments.directory) as name:
        directory = Path(name)
        directory.chmod(0o755)
        measure(directory, arguments.jobs)


def measure(directory: Path, jobs: int) -> None:
    base = directory / "base"
    base.write_bytes(os.urandom(MIB))
    model = directory / "model"
    native(base, model)
    data = [(offset, model.read_bytes()[offset : offset + 4096]) for offset in PLACES]
    length = model.stat().st_size
    floor = alone("bare write", directory / "bare", jobs, lambda path: bare(data, length, path))
    theirs = alone(
        "qemu-img create -b", directory / "qemu-img", jobs // 5, lambda path: qemu_img(base, path)
    )
    overlay = alone("overlay alone", directory / "overlay", jobs, lambda path: native(base, path))
    ours = [bootwright(directory, "qcow2", workers, jobs) for workers in WORKERS]
    flat = bootwright(directory, "raw", 1, jobs // 5)
    print(f"{'':<34}{'p50 ms':>9}{'p99 ms':>9}{'a second':>11}{'of qemu-img':>13}")
    baseline = statistics.median(theirs.milliseconds)
    for timing in (floor, theirs, overlay, *ours, flat):
        print(timing.line(baseline))
    for images_type in ("qcow2", "raw"):
        processes, syncs = traced(directory, images_type)
        print(f"{images_type}: {processes:g} processes and {syncs:g} syncs a boot")
    print(libvirt_share(directory).line())


if __name__ == "__main__":
    main()
