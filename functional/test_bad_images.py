"""Images whose record or bytes are wrong: one error code, what to do, and no trace."""

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from functional.conftest import Images
from functional.harness.agent import Agent
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd
from functional.refusal import MIB, NO_IMAGE, _nothing_left, add, agent, job, local, refused

__all__ = ["_nothing_left", "agent", "local"]

# The image's record


def test_an_image_nobody_has(agent: Agent) -> None:
    assert NO_IMAGE in refused(agent, job(NO_IMAGE), "ImageNotFound")
    assert agent.run("image", "fetch", NO_IMAGE).returncode == 1
    assert agent.run("image", "show", NO_IMAGE).returncode == 4


def test_an_image_without_data(agent: Agent, glance: Glance) -> None:
    said = refused(agent, job(glance.create_queued()), "ImageNotActive")

    assert "'queued'" in said
    assert "upload its data" in said


def test_an_image_that_was_withdrawn(agent: Agent, glance: Glance, guest: Guest) -> None:
    image_id = glance.upload(guest.root, disk_format="raw")
    glance.deactivate(image_id)

    said = refused(agent, job(image_id), "ImageNotActive")

    assert "'deactivated'" in said
    assert "reactivated" in said
    assert glance.downloads(image_id) == 0


def test_a_kernel_that_is_not_there(agent: Agent, glance: Glance, guest: Guest) -> None:
    properties = {"kernel_id": NO_IMAGE}
    image_id = glance.upload(guest.root, disk_format="raw", properties=properties)

    assert NO_IMAGE in refused(agent, job(image_id), "ImageNotFound")
    assert glance.downloads(image_id) == 0


def test_a_ramdisk_without_a_kernel(
    agent: Agent, glance: Glance, guest: Guest, images: Images
) -> None:
    properties = {"ramdisk_id": images.ramdisk}
    image_id = glance.upload(guest.root, disk_format="raw", properties=properties)

    assert "kernel_id" in refused(agent, job(image_id), "InvalidJob", status=2)


def test_a_flavor_smaller_than_min_disk(agent: Agent, glance: Glance, guest: Guest) -> None:
    image_id = glance.upload(guest.root, disk_format="raw", min_disk=3)

    assert "disk: 3 or more" in refused(agent, job(image_id), "FlavorDiskSmallerThanMinDisk")
    assert glance.downloads(image_id) == 0


def test_a_flavor_smaller_than_the_virtual_size(
    agent: Agent, glance: Glance, tmp_path: Path
) -> None:
    path = tmp_path / "large.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "3G"], check=True)
    image_id = glance.upload(path, disk_format="qcow2")

    assert "disk: 3 or more" in refused(agent, job(image_id), "FlavorDiskSmallerThanImage")
    # Glance has looked into it and says the virtual size, so no byte is asked for.
    assert glance.downloads(image_id) == 0


# The image's bytes


def test_a_header_larger_than_the_flavor(
    local: Agent, libvirtd: PrivateLibvirtd, tmp_path: Path
) -> None:
    leftovers = Leftovers(local, libvirtd)
    path = tmp_path / "large.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "3G"], check=True)

    said = refused(local, job(add(local, path, "qcow2")), "FlavorDiskSmallerThanImage")

    assert "disk: 3 or more" in said
    leftovers.assert_none()


def backed_qcow2(path: Path) -> None:
    backing = path.with_suffix(".raw")
    backing.write_bytes(bytes(MIB))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, path], check=True
    )


def data_file_qcow2(path: Path) -> None:
    data = path.with_suffix(".raw")
    subprocess.run(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2"),
            *("-o", f"data_file={data},data_file_raw=on", path, "1M"),
        ],
        check=True,
    )


def plain_raw(path: Path) -> None:
    path.write_bytes(hashlib.shake_256(b"raw").digest(MIB))


def small_qcow2(path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)


def nested_qcow2(path: Path) -> None:
    inner = path.with_suffix(".inner")
    small_qcow2(inner)
    subprocess.run(
        ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", inner, path], check=True
    )


def torn_qcow2(path: Path) -> None:
    """A header that is fine, with an L1 table far behind the end of the file."""
    small_qcow2(path)
    with path.open("r+b") as file:
        file.seek(40)
        file.write(struct.pack(">Q", 1 << 40))


def empty(path: Path) -> None:
    path.touch()


BAD_IMAGES: Final[dict[str, tuple[Callable[[Path], None], str, str]]] = {
    "backing file": (backed_qcow2, "qcow2", "backing file"),
    "data file": (data_file_qcow2, "qcow2", "data file"),
    "raw as qcow2": (plain_raw, "qcow2", "disk_format raw"),
    "qcow2 as raw": (small_qcow2, "raw", "disk_format qcow2"),
    "qcow2 as vmdk": (small_qcow2, "vmdk", "disk_format qcow2"),
    "image in an image": (nested_qcow2, "qcow2", "holds an image of format qcow2"),
    "torn": (torn_qcow2, "qcow2", "L1"),
    "empty": (empty, "raw", "empty"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_is_not_what_it_claims(
    local: Agent, libvirtd: PrivateLibvirtd, tmp_path: Path, kind: str
) -> None:
    make, claim, words = BAD_IMAGES[kind]
    leftovers = Leftovers(local, libvirtd)
    path = tmp_path / "image"
    make(path)

    said = refused(local, job(add(local, path, claim)), "ImageUnacceptable")

    assert words in said
    leftovers.assert_none()


def test_a_backing_file_that_came_into_glance_by_the_back_door(
    agent: Agent, glance: Glance, tmp_path: Path
) -> None:
    raw, good, bad = tmp_path / "raw", tmp_path / "good", tmp_path / "bad"
    plain_raw(raw)
    subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, good], check=True)
    backed_qcow2(bad)
    image_id = glance.upload(good, disk_format="qcow2")
    with (glance.store / image_id).open("r+b") as file:
        file.write(bad.read_bytes())

    said = refused(agent, job(image_id), "ImageUnacceptable")

    assert "backing file" in said
    assert "self-contained" in said


def test_bytes_damaged_in_the_store(agent: Agent, glance: Glance, guest: Guest) -> None:
    image_id = glance.upload(guest.root, disk_format="raw")
    with (glance.store / image_id).open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"damage")

    said = refused(agent, job(image_id), "ImageCorrupt")

    assert "sha512" in said
    assert "upload it again" in said
    # Once more from the start: it might have been the way and not the store.
    assert glance.downloads(image_id) == 2


def test_bytes_damaged_on_the_way_every_time(
    agent: Agent, glance: Glance, guest: Guest, proxy: FaultProxy
) -> None:
    image_id = glance.upload(guest.root, disk_format="raw")
    proxy.afterwards = Fault(flip_at=3 * MIB)

    refused(agent, job(image_id), "ImageCorrupt")


def test_bytes_missing_in_the_store(agent: Agent, glance: Glance, guest: Guest) -> None:
    image_id = glance.upload(guest.root, disk_format="raw")
    os.truncate(glance.store / image_id, 5 * MIB)

    document = job(image_id)
    done = agent.run("--format", "json", "boot", "-f", "-", stdin=json.dumps(document))

    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) in ((1, "ImageCorrupt"), (1, "ImageSourceUnavailable"))
    assert error["hint"]
    # A source that breaks off may go on later, so what it sent is kept; not for this test.
    partial = agent.partial(image_id)
    if partial.exists():
        subprocess.run(["rm", "-r", partial], check=True)
