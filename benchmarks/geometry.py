"""How a new qcow2 overlay should be divided: small writes of a guest, in one run.

    python -m benchmarks.geometry [DIRECTORY]

For each cluster size, with and without extended L2 entries and lazy refcounts: 2000 writes of
4 KiB, 1 MiB apart, to a new overlay on a base of 2 GiB with data everywhere, one after the other;
500 such writes each of which is flushed before the next, as a database does it; and what the file
takes from the file system then. Ratios to the first line.

The agent asks for no lazy refcounts, so QEMU sets them here.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from agent.qcow2 import Geometry, create_overlay

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WRITES = 2000
FLUSHED_WRITES = 500
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    kib: int = 64
    extended_l2: bool = False
    lazy: bool = False


CANDIDATES = [
    Candidate(),
    Candidate(lazy=True),
    Candidate(extended_l2=True),
    Candidate(extended_l2=True, lazy=True),
    Candidate(kib=128, extended_l2=True),
    Candidate(kib=16),
    Candidate(kib=16, lazy=True),
    Candidate(kib=2048),
]


def written(directory: Path, base: Path, candidate: Candidate, *, flush: bool) -> tuple[float, int]:
    """Return seconds, and bytes allocated."""
    overlay = directory / "overlay"
    create_overlay(
        overlay,
        virtual_size=2 * GIB,
        backing_file=base,
        backing_format="raw",
        geometry=Geometry(cluster_size=candidate.kib * KIB, extended_l2=candidate.extended_l2),
    )
    if candidate.lazy:
        subprocess.run(
            ["qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", overlay], check=True
        )
    count = ["-c", str(WRITES)]
    if flush:
        count = ["-c", str(FLUSHED_WRITES), "--flush-interval", "1"]
    began = time.perf_counter()
    subprocess.run(
        ["qemu-img", "bench", "-w", "-t", "none", "-d", "1", *count, "-s", "4096",
         "-S", str(MIB), "-f", "qcow2", overlay],
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    allocated = overlay.stat().st_blocks * 512
    overlay.unlink()
    return seconds, allocated


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    plain: dict[Candidate, list[float]] = {each: [] for each in CANDIDATES}
    flushed: dict[Candidate, list[float]] = {each: [] for each in CANDIDATES}
    taken: dict[Candidate, int] = {}
    with tempfile.TemporaryDirectory(prefix="bootwright-", dir=arguments.directory) as name:
        base = Path(name, "base")
        with base.open("wb") as file:
            for _ in range(2 * GIB // MIB):
                file.write(b"\x5a" * MIB)
        for _ in range(ROUNDS):
            for candidate in CANDIDATES:
                seconds, taken[candidate] = written(Path(name), base, candidate, flush=False)
                plain[candidate].append(seconds)
                flushed[candidate].append(written(Path(name), base, candidate, flush=True)[0])
    print("clusters  extended L2   lazy    plain  ratio  flushed  ratio  allocated")
    first = statistics.median(plain[CANDIDATES[0]]), statistics.median(flushed[CANDIDATES[0]])
    for each in CANDIDATES:
        one, other = statistics.median(plain[each]), statistics.median(flushed[each])
        print(
            f"{each.kib:>4} KiB{each.extended_l2!s:>13}{each.lazy!s:>7}"
            f"{one:>7.2f} s{one / first[0]:>7.2f}{other:>7.2f} s{other / first[1]:>7.2f}"
            f"{taken[each] // MIB:>7} MiB"
        )


if __name__ == "__main__":
    main()
