"""Disks as a hostile guest leaves them, and an installed agent that does not open them to look."""

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from functional.conftest import Images
from functional.harness.agent import Agent
from functional.harness.libvirtd import PrivateLibvirtd
from tests.corpus import qcow2_images
from tests.corpus.case import MIB

_IN_OPEN: Final = 0x20  # inotify(7)
_EVENT: Final = struct.Struct("=iIII")
_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def watched(path: Path, mask: int = _IN_OPEN) -> Iterator[list[int]]:
    """Note whoever opens a file, of whatever process, into the list that is given."""
    seen: list[int] = []
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    assert _libc.inotify_add_watch(fd, os.fsencode(path), mask) >= 0
    try:
        yield seen
        with open(fd, "rb", buffering=0, closefd=False) as file:
            for _, what, _, _ in _EVENT.iter_unpack(file.read(1 << 16) or b""):
                if what & mask:  # that the file is gone is told unasked
                    seen.append(what)
    finally:
        os.close(fd)


def root_disk(result: dict[str, Any]) -> dict[str, Any]:
    [disk] = [disk for disk in result["disks"] if disk["role"] == "root"]
    return dict(disk)


def test_the_watch_sees_who_opens(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with watched(file) as opened:
        subprocess.run(["cat", file], check=True, capture_output=True)
    assert opened


@pytest.mark.parametrize("images_type", ["raw", "qcow2"])
def test_disk_with_a_header_its_guest_wrote_is_not_opened_to_look(
    images_type: str,
    agent: Agent,
    images: Images,
    libvirtd: PrivateLibvirtd,
    tmp_path: Path,
) -> None:
    secret = tmp_path / f"secret-{images_type}"
    secret.write_bytes(b"secret" * 1000)
    result = agent.boot(
        {
            "instance": {"name": "evil"},
            "flavor": {"vcpus": 1, "ram": 192, "disk": 1},
            "image": {"id": images.root},
            "images_type": images_type,
            "libvirt": {"define": True, "start": False},
            "networks": [],
        }
    )
    path, uuid = Path(root_disk(result)["path"]), result["instance"]["uuid"]
    header = tmp_path / "header"
    header.write_bytes(qcow2_images.backed(os.fspath(secret)).ljust(MIB, b"\0"))
    command = f"write -q -s {header} 0 {header.stat().st_size}"
    subprocess.run(["qemu-io", "-f", images_type, "-c", command, path], check=True)

    with watched(path) as opened, watched(secret) as secret_opened:
        agent.json("cache", "gc")
        agent.json("image", "why", images.root)
        agent.json("image", "verify", images.root)
        agent.json("instance", "show", "evil")
        agent.json("cache", "status")
        assert agent.run("status", "--long").returncode in (0, 5)
        assert agent.stop() == 0
        agent.start()
        agent.json("cache", "gc")
        assert agent.base(images.root).exists()
        agent.json("instance", "delete", "evil")

    assert opened == []
    assert secret_opened == []
    assert not path.exists()
    assert uuid not in libvirtd.domains()
