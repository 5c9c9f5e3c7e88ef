"""Run by test_backends.py as the service user: makes disks that are files, or finds them made.

The first argument is a directory, the second a value of `preallocate_images`.
"""

import os
import sys
from pathlib import Path

from agent.backends import Backend
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Home
from agent.image import Image
from agent.qemu_img import QemuImg
from agent.report import Role

MIB = 1 << 20


def main() -> None:
    """Prepare a root disk and a config drive with each backend."""
    directory, preallocate = Path(sys.argv[1]), sys.argv[2] == "space"
    content = directory / "base"
    content.write_bytes(b"base" * (MIB // 4))
    base = Base(
        path=content,
        format="raw",
        virtual_size=MIB,
        image=Image(id="1", name="", source="directory", status="active", disk_format="raw"),
        digest="sha512:00",
        origin="cache",
    )
    backends: dict[str, Backend] = {
        "flat": Flat(preallocate=preallocate),
        "qcow2": Qcow2(QemuImg(), preallocate=preallocate),
    }
    for name, backend in backends.items():
        home = Home(uuid=name, directory=directory / name)
        home.directory.mkdir(exist_ok=True)
        root = backend.plan(home, Role.ROOT, "disk", base, 4 * MIB)
        backend.prepare(root, base, Cancellation())
        drive = backend.plan(home, Role.CONFIG_DRIVE, "disk.config", None, 4 * MIB)
        backend.generate(drive, lambda fd: os.truncate(fd, 4 * MIB), Cancellation())


if __name__ == "__main__":
    main()
