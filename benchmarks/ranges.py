"""One image over several connections, each of them throttled.

    python -m benchmarks.ranges [--mib 256] [--rate 12] [DIRECTORY]

A raw image in a real Glance, behind a proxy that gives each connection so many
MiB a second.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.cold import data
from benchmarks.process import run
from functional.harness import glance as glances
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256, help="size of the image")
    parser.add_argument("--rate", type=float, default=12, help="MiB a second and connection")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    cache = Path(os.environ.get("BOOTWRIGHT_CACHE", "/var/cache/bootwright-dev"))
    with (
        tempfile.TemporaryDirectory(prefix="bootwright-ranges-", dir=arguments.directory) as name,
        Glance(glances.install(cache / "openstack"), Path(name, "glance")) as glance,
    ):
        raw = data(Path(name, "raw"), arguments.mib, virtual_mib=arguments.mib)
        image_id = glance.upload(raw, disk_format="raw")
        print(f"{arguments.mib} MiB, {arguments.rate:g} MiB/s a connection")
        print(f"{'connections':<12}{'wall s':>8}{'CPU s':>8}{'RSS':>9}{'requests':>10}")
        for connections in (1, 2, 4):
            target = Path(name, "target")
            target.mkdir()
            with FaultProxy(glance.url) as proxy:
                proxy.afterwards = Fault(rate=arguments.rate * MIB)
                argv = [sys.executable, "-m", "benchmarks.fetch"]
                where = [proxy.url, image_id, str(target), str(connections)]
                sample = run([*argv, *where], warm=True)
                print(
                    f"{connections:<12}{sample.wall_s:>8.1f}{sample.cpu_s:>8.2f}"
                    f"{sample.rss // MIB:>5} MiB{len(proxy.matching):>10}",
                    flush=True,
                )
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
