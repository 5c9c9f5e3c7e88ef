"""An image that is not here yet: Bootwright beside doing it by hand, in one run.

    python -m benchmarks.cold [--rounds 5] [--scale 1.0] [--only NAME] [DIRECTORY]

For each image of one set, served by a real Glance on loopback:

    bootwright   the agent's image cache: fetched, verified, raw, durable
    by hand      curl to a file, fsync, sha512sum, qemu-img convert to raw (durable)
    curl+fsync   the bytes alone, unverified, not converted
    hash alone   openssl's SHA-512 of the bytes, which is twice as fast as sha512sum

A raw image may take 1.15 times as long as the bytes alone or the hash alone,
whichever takes longer; a qcow2 0.6 times as long as by hand, compressed 0.85
times. What is written may be 1.05 times what the base occupies, and the process
200 MiB large.

The ratios are what counts; the seconds belong to the machine. DIRECTORY is
where everything is written, and says which disk is measured. Other work on the same processors
meets those most that use several at once, so run it with `nice -n -15` if there
is any.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agent.manifest import base_name
from benchmarks.process import Sample, alternate, run
from functional.harness import glance as glances
from functional.harness.glance import Glance

MIB = 1 << 20

_MAX_WRITTEN = 1.05
_MAX_RSS_MIB = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One image of the set."""

    name: str
    disk_format: str
    path: Path
    target: float
    """The wall clock's ratio to what it is measured against."""


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
    q1, q2 = qcow2(small, directory / "q1"), qcow2(large, directory / "q2")
    q3, q4 = qcow2(small, directory / "q3", *zlib), qcow2(small, directory / "q4", *zstd)
    large.unlink()
    return [
        Subject(name="raw, dense", disk_format="raw", path=dense, target=1.15),
        Subject(name="raw, holes", disk_format="raw", path=small, target=1.15),
        Subject(name="qcow2, 300 MiB", disk_format="qcow2", path=q1, target=0.6),
        Subject(name="qcow2, 1 GiB", disk_format="qcow2", path=q2, target=0.6),
        Subject(name="qcow2 zlib", disk_format="qcow2", path=q3, target=0.85),
        Subject(name="qcow2 zstd", disk_format="qcow2", path=q4, target=0.85),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What measures one subject."""

    subject: Subject
    url: str
    image_id: str
    target: Path
    """A directory that each way finds empty."""

    def measure(self, rounds: int) -> dict[str, Sample]:
        """Return the medians of each way, Bootwright's last."""
        source = f"{self.url}/v2/images/{self.image_id}/file"
        data, raw = self.target / "data", self.target / "raw"
        fetch = f"curl -sf -o {data} {source} && sync {data}"
        by_hand = f"{fetch} && sha512sum {data} >{self.target}/sum"
        if self.subject.disk_format == "qcow2":
            by_hand += f" && qemu-img convert -f qcow2 -O raw {data} {raw} && sync {raw}"
        check = f"openssl dgst -sha512 -out {self.target}/sum {self.subject.path}"
        ours: list[str | Path] = [
            sys.executable,
            "-m",
            "benchmarks.fetch",
            self.url,
            self.image_id,
            self.target,
        ]
        return alternate(
            {
                "by hand": lambda: self._run(["sh", "-c", by_hand]),
                "curl+fsync": lambda: self._run(["sh", "-c", fetch]),
                "hash alone": lambda: self._run(["sh", "-c", check]),
                "bootwright": lambda: self._run(ours, warm=True),
            },
            rounds,
        )

    def _run(self, argv: list[str | Path], *, warm: bool = False) -> Sample:
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir()
        os.sync()
        return run(argv, warm=warm)

    def base_allocated(self) -> int:
        """Bytes that Bootwright's base occupies, after it was measured."""
        return (self.target / "_base" / base_name(self.image_id)).stat().st_blocks * 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sizes")
    parser.add_argument("--only", default="", help="images whose name has this in it")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    cache = Path(os.environ.get("BOOTWRIGHT_CACHE", "/var/cache/bootwright-dev"))
    with tempfile.TemporaryDirectory(prefix="bootwright-cold-", dir=arguments.directory) as name:
        directory = Path(name)
        with Glance(glances.install(cache / "openstack"), directory / "glance") as glance:
            print(f"medians of {arguments.rounds}, scale {arguments.scale:g}")
            print(f"{'image':<16}{'way':<12}{'wall s':>8}{'CPU s':>8}{'written':>10}{'RSS':>8}")
            for subject in subjects(directory, arguments.scale):
                if arguments.only not in subject.name:
                    continue
                image_id = glance.upload(subject.path, disk_format=subject.disk_format)
                bench = Bench(
                    subject=subject,
                    url=glance.url,
                    image_id=image_id,
                    target=directory / "target",
                )
                show(subject, bench.measure(arguments.rounds), bench.base_allocated())
                glance.delete(image_id)


def show(subject: Subject, measured: dict[str, Sample], allocated: int) -> None:
    for way, sample in measured.items():
        print(
            f"{subject.name:<16}{way:<12}{sample.wall_s:>8.2f}{sample.cpu_s:>8.2f}"
            f"{sample.written // MIB:>6} MiB{sample.rss // MIB:>4} MiB"
        )
    ours = measured["bootwright"]
    if subject.disk_format == "raw":
        slower = max(("curl+fsync", "hash alone"), key=lambda way: measured[way].wall_s)
    else:
        slower = "by hand"
    verdicts = (
        verdict(f"of {slower}", ours.wall_s / measured[slower].wall_s, subject.target),
        verdict(
            f"written of {allocated // MIB} MiB allocated", ours.written / allocated, _MAX_WRITTEN
        ),
        verdict("MiB RSS", ours.rss / MIB, _MAX_RSS_MIB),
    )
    print(f"{subject.name:<16}{'; '.join(verdicts)}", flush=True)


def verdict(what: str, value: float, target: float) -> str:
    return f"{value:.3g} {what} ({'met' if value <= target else 'MISSED'}: {target:g})"


if __name__ == "__main__":
    main()
