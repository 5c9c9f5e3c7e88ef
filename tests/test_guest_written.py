"""Disks after their guests have written to them, and links where files are expected.

Whatever a guest writes is content. Nothing here may take it for a header, and
nothing that stands where a disk should stand may lead anywhere else.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from agent.backends import Backend
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import BackendError, BootwrightError
from agent.image import Image
from agent.manifest import base_name, manifest_path
from agent.qemu_img import QemuImg
from agent.report import Role
from tests import cache_kit
from tests.corpus import qcow2_images, vmdk_images
from tests.corpus.case import MIB

SECRET = b"secret" * 1000

HEADERS: Mapping[str, Callable[[Path], bytes]] = {
    "backing file": lambda secret: qcow2_images.backed(os.fspath(secret)),
    "data file": lambda secret: qcow2_images.with_fields(
        qcow2_images.extended(0x44415441, os.fsencode(secret)), incompatible=4
    ),
    "huge size": lambda _: qcow2_images.with_fields(qcow2_images.honest(), size=8 << 40),
    "bogus version": lambda _: qcow2_images.with_fields(qcow2_images.honest(), version=99),
    "vmdk text": lambda secret: vmdk_images.text(extent=f'RW 99 FLAT "{secret}" 0'),
    "qed": lambda _: b"QED\0".ljust(512, b"\1"),
    # A superblock whose counts make whoever checks or grows it run out of memory.
    "ext4": lambda _: bytes(1024) + b"\xff" * 56 + b"\x53\xef" + b"\xff" * 64,
    "luks": lambda _: b"LUKS\xba\xbe\0\1".ljust(512, b"\1"),
}


@pytest.fixture(params=[Flat(), Qcow2(QemuImg())], ids=["flat", "qcow2"])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param
    return made


@pytest.fixture
def base(tmp_path: Path) -> Base:
    path = tmp_path / ("a1" * 20)
    path.write_bytes(os.urandom(MIB))
    return Base(
        path=path,
        format="raw",
        virtual_size=MIB,
        image=Image(id="1", name="", source="directory", status="active", disk_format="raw"),
        digest="sha512:00",
        origin="cache",
    )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    uuid = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
    (tmp_path / uuid).mkdir()
    return Home(uuid=uuid, directory=tmp_path / uuid)


def written(disk: Disk, header: bytes, work: Path) -> None:
    """Write what a guest would, from byte 0 of its disk on."""
    data = work / "header"
    data.write_bytes(header.ljust(-(-len(header) // 512) * 512, b"\0"))
    command = f"write -q -s {data} 0 {data.stat().st_size}"
    subprocess.run(["qemu-io", "-f", disk.format, "-c", command, disk.path], check=True)


def read(disk: Disk, work: Path) -> bytes:
    raw = work / "raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.path, raw], check=True
    )
    return raw.read_bytes()


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_written_by_a_guest_is_only_content(
    name: str, backend: Backend, base: Base, home: Home, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    header = HEADERS[name](secret)
    before = base.path.read_bytes()
    disk = backend.plan(home, Role.ROOT, "disk", base, MIB)
    backend.prepare(disk, base, Cancellation())
    written(disk, header, tmp_path)

    backend.prepare(disk, base, Cancellation())
    grown = backend.grow(disk, 4 * MIB)

    content = read(grown, tmp_path)
    assert len(content) == 4 * MIB
    assert content[: len(header)] == header
    assert not content[MIB:].strip(b"\0")
    assert secret.read_bytes() == SECRET
    assert base.path.read_bytes() == before
    backend.remove(grown, home, Cancellation())
    assert secret.exists()
    assert list(home.directory.iterdir()) == []


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_the_disks_place_is_not_followed(
    dangling: bool, backend: Backend, base: Base, home: Home, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    if not dangling:
        secret.write_bytes(SECRET)
    disk = backend.plan(home, Role.ROOT, "disk", base, MIB)
    disk.path.symlink_to(secret)

    with pytest.raises(BackendError, match="not a regular file"):
        backend.prepare(disk, base, Cancellation())
    with pytest.raises(BackendError, match="not a regular file"):
        backend.generate(disk, lambda _: None, Cancellation())
    backend.remove(disk, home, Cancellation())

    assert not os.path.lexists(disk.path)
    assert secret.exists() != dangling
    if not dangling:
        assert secret.read_bytes() == SECRET


@pytest.mark.parametrize("place", ["partial", "data", "state", "base", "manifest"])
def test_a_link_where_the_cache_writes_is_not_followed(place: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir() if place == "partial" else secret.write_bytes(SECRET)
    source = cache_kit.Source()
    image = source.add(os.urandom(MIB))
    kit = cache_kit.CacheKit(directory=tmp_path / "instances", source=source)
    partial = kit.store.partial_of(image)
    links = {
        "partial": partial.directory,
        "data": partial.data,
        "state": partial.directory / "state.json",
        "base": kit.store.path_of(base_name(image.id)),
        "manifest": manifest_path(kit.store.path_of(base_name(image.id))),
    }
    if place in ("data", "state"):
        partial.begin()
        links[place].unlink(missing_ok=True)
    links[place].symlink_to(secret)

    with contextlib.suppress(BootwrightError):
        base = kit.acquire(image)
        assert base.path.read_bytes() == source.data[image.id]
        assert not base.path.is_symlink()

    assert list(secret.iterdir()) == [] if place == "partial" else secret.read_bytes() == SECRET
