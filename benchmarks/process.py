"""One command as a whole process: how long, how much work, how much written, how large."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run, with all children that were waited for."""

    wall_s: float
    cpu_s: float
    written: int
    """Bytes sent towards the disk, proc(5)."""
    rss: int
    """Bytes, the largest process's peak."""


def run(argv: Sequence[str | Path], *, warm: bool = False) -> Sample:
    """Run a command to its end; its output goes to standard error.

    `warm`: the command writes a line to standard output when it has started,
    and works when it reads one. It is measured from there, as a service is
    that was started long ago.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    pipe = subprocess.PIPE if warm else None
    process = subprocess.Popen(argv, stdin=pipe or subprocess.DEVNULL, stdout=pipe or 2)
    if process.stdin is not None and process.stdout is not None:
        process.stdout.readline()
    before = _accounts(process.pid)
    began = time.monotonic()
    if process.stdin is not None:
        process.stdin.write(b"\n")
        process.stdin.close()
    # Left unreaped for a moment, so that its accounts can still be read.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall_s = time.monotonic() - began
    after = _accounts(process.pid)
    if process.stdout is not None:
        process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return Sample(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime - before.cpu_s,
        written=after.written - before.written,
        rss=usage.ru_maxrss * 1024,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Accounts:
    cpu_s: float
    written: int


def _accounts(pid: int) -> _Accounts:
    """What the kernel has counted so far for a process and its reaped children, proc(5)."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    ticks = sum(int(field) for field in stat[11:15])
    # What was removed before it got to the disk was never written.
    written = int(io["write_bytes"]) - int(io["cancelled_write_bytes"])
    return _Accounts(cpu_s=ticks / os.sysconf("SC_CLK_TCK"), written=written)


def alternate(ways: dict[str, Callable[[], Sample]], rounds: int) -> dict[str, Sample]:
    """Run each way once a round, in turn, and return the medians of each.

    In turn, so that whatever else the machine does meets all of them.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(way())
    return {
        name: Sample(
            **{
                field.name: statistics.median(getattr(sample, field.name) for sample in taken)
                for field in fields(Sample)
            }
        )
        for name, taken in samples.items()
    }
