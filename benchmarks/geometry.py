"""How a new qcow2 overlay should be divided: small writes of a guest, in one run.

    python -m benchmarks.geometry [DIRECTORY]

For each cluster size, with and without extended L2 entries: 2000 writes of 4 KiB, 1 MiB apart, to
a new overlay on a base of 2 GiB with data everywhere, each on the disk before the next (as a
database does it), and what the file takes from the file system then. Ratios to the first line.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from agent.qcow2 import Geometry, create_overlay

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WRITES = 2000
ROUNDS = 3

GEOMETRIES = [
    Geometry(),
    Geometry(cluster_size=64 * KIB, extended_l2=True),
    Geometry(cluster_size=128 * KIB, extended_l2=True),
    Geometry(cluster_size=16 * KIB),
    Geometry(cluster_size=2 * MIB),
]


def written(directory: Path, base: Path, geometry: Geometry) -> tuple[float, int]:
    """Return seconds, and bytes allocated."""
    overlay = directory / "overlay"
    create_overlay(
        overlay, virtual_size=2 * GIB, backing_file=base, backing_format="raw", geometry=geometry
    )
    began = time.perf_counter()
    subprocess.run(
        ["qemu-img", "bench", "-w", "-t", "none", "-d", "1", "-c", str(WRITES), "-s", "4096",
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
    with tempfile.TemporaryDirectory(prefix="bootwright-", dir=arguments.directory) as name:
        base = Path(name, "base")
        with base.open("wb") as file:
            for _ in range(2 * GIB // MIB):
                file.write(b"\x5a" * MIB)
        samples: dict[Geometry, list[tuple[float, int]]] = {each: [] for each in GEOMETRIES}
        for _ in range(ROUNDS):
            for geometry, taken in samples.items():
                taken.append(written(Path(name), base, geometry))
    print(f"{'clusters':>10}{'extended L2':>13}{'seconds':>9}{'ratio':>7}{'allocated':>11}")
    first = None
    for geometry, taken in samples.items():
        seconds = statistics.median(each for each, _ in taken)
        first = first or seconds
        print(
            f"{geometry.cluster_size // KIB:>6} KiB{geometry.extended_l2!s:>13}{seconds:>9.2f}"
            f"{seconds / first:>7.2f}{taken[0][1] // MIB:>7} MiB"
        )


if __name__ == "__main__":
    main()
