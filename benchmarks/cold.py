"""An image that is not here yet: Bootwright beside doing it by hand, in one run.

    python -m benchmarks.cold [--rounds 5] [--scale 1.0] [DIRECTORY]

For each image of one set, served by a real Glance on loopback:

    bootwright   the agent's image cache: fetched, verified, raw, durable
    by hand      curl to a file, fsync, sha512sum, qemu-img convert to raw (durable)
    curl+fsync   the bytes alone, unverified, not converted

The ratios are what counts; the seconds belong to the machine. DIRECTORY is
where everything is written, and says which disk is measured.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import Sample, alternate, run
from functional.harness import glance as glances
from functional.harness.glance import Glance

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One image of the set."""

    name: str
    disk_format: str
    path: Path


def data(path: Path, mib: int, *, virtual_mib: int) -> Path:
    """Write `mib` MiB of half-compressible data in islands over a sparse file."""
    islands = 8
    with path.open("wb") as file:
        for island in range(islands):
            file.seek(island * (virtual_mib // islands) * MIB)
            for _ in range(mib // islands):
                # Debian's root file systems compress to somewhat more than a third.
                file.write(os.urandom(3 * MIB // 8) + b"\x55" * (5 * MIB // 8))
        file.truncate(virtual_mib * MIB)
    return path


def qcow2(raw: Path, target: Path, *options: str) -> Path:
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, target], check=True
    )
    return target


def subjects(directory: Path, scale: float) -> list[Subject]:
    def mib(count: int) -> int:
        return max(8, int(count * scale)) // 8 * 8

    small = data(directory / "small", mib(304), virtual_mib=mib(2048))
    large = data(directory / "large", mib(1024), virtual_mib=mib(4096))
    dense = data(directory / "dense", mib(1024), virtual_mib=mib(1024))
    zlib = ("-c", "-o", "compression_type=zlib")
    zstd = ("-c", "-o", "compression_type=zstd")
    found = [
        Subject(name="raw, dense", disk_format="raw", path=dense),
        Subject(name="raw, holes", disk_format="raw", path=small),
        Subject(name="qcow2, 300 MiB", disk_format="qcow2", path=qcow2(small, directory / "q1")),
        Subject(name="qcow2, 1 GiB", disk_format="qcow2", path=qcow2(large, directory / "q2")),
        Subject(name="qcow2 zlib", disk_format="qcow2", path=qcow2(small, directory / "q3", *zlib)),
        Subject(name="qcow2 zstd", disk_format="qcow2", path=qcow2(small, directory / "q4", *zstd)),
    ]
    large.unlink()
    return found


def ways(
    subject: Subject, url: str, image_id: str, directory: Path
) -> dict[str, Callable[[], Sample]]:
    target = directory / "target"
    source = f"{url}/v2/images/{image_id}/file"

    def clean(argv: list[str | Path], *, warm: bool = False) -> Sample:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()
        return run(argv, warm=warm)

    fetch = f"curl -sf -o {target}/data {source} && sync {target}/data"
    check = f"sha512sum {target}/data >{target}/sum"
    convert = f"qemu-img convert -f qcow2 -O raw {target}/data {target}/raw && sync {target}/raw"
    by_hand = [fetch, check] + ([convert] if subject.disk_format == "qcow2" else [])
    return {
        "bootwright": lambda: clean(
            [sys.executable, "-m", "benchmarks.fetch", url, image_id, target], warm=True
        ),
        "by hand": lambda: clean(["sh", "-c", " && ".join(by_hand)]),
        "curl+fsync": lambda: clean(["sh", "-c", fetch]),
    }


def allocated(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sizes")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    cache = Path(os.environ.get("BOOTWRIGHT_CACHE", "/var/cache/bootwright-dev"))
    with tempfile.TemporaryDirectory(prefix="bootwright-cold-", dir=arguments.directory) as name:
        directory = Path(name)
        with Glance(glances.install(cache / "openstack"), directory / "glance") as glance:
            print(f"medians of {arguments.rounds}, scale {arguments.scale:g}")
            print(
                f"{'image':<16}{'way':<12}{'wall s':>8}{'CPU s':>8}{'written':>10}{'RSS':>8}"
                f"{'ratio':>8}"
            )
            for subject in subjects(directory, arguments.scale):
                image_id = glance.upload(subject.path, disk_format=subject.disk_format)
                measured = alternate(
                    ways(subject, glance.url, image_id, directory), arguments.rounds
                )
                show(subject, measured)
                glance.delete(image_id)


def show(subject: Subject, measured: dict[str, Sample]) -> None:
    ours = measured["bootwright"].wall_s
    for way, sample in measured.items():
        print(
            f"{subject.name:<16}{way:<12}{sample.wall_s:>8.2f}{sample.cpu_s:>8.2f}"
            f"{sample.written // MIB:>6} MiB{sample.rss // MIB:>4} MiB"
            f"{ours / sample.wall_s:>8.2f}"
        )


if __name__ == "__main__":
    main()
