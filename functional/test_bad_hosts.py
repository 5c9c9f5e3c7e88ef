"""What a host needs is away or used up: one error code, what to do, and no trace."""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.conftest import Images
from functional.harness import guest as guests
from functional.harness.agent import Agent
from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd
from functional.refusal import MIB, _nothing_left, add, agent, job, local, refused

__all__ = ["_nothing_left", "agent", "local"]

# The image source


def test_glance_does_not_run(agent: Agent, glance: Glance, images: Images) -> None:
    glance.stop()
    try:
        said = refused(agent, job(images.root), "ImageSourceUnavailable")
    finally:
        glance.restart()

    assert "check that Glance and Keystone run" in said


def test_glance_in_a_storm_of_503(agent: Agent, images: Images, proxy: FaultProxy) -> None:
    proxy.afterwards = Fault(answer=Answer(status=503))

    said = refused(agent, job(images.disk_raw), "ImageSourceUnavailable")

    assert "503 Service Unavailable" in said
    assert "see their logs" in said


def test_glance_does_not_let_us(agent: Agent, images: Images, proxy: FaultProxy) -> None:
    proxy.afterwards = Fault(answer=Answer(status=403))
    before = len(proxy.matching)

    said = refused(agent, job(images.disk_raw), "ImageNotAuthorized")

    assert "deactivated" in said
    assert len(proxy.matching) == before + 1


def test_a_login_page_in_place_of_glance(agent: Agent, images: Images, proxy: FaultProxy) -> None:
    proxy.afterwards = Fault(answer=Answer(status=200))

    said = refused(agent, job(images.disk_raw), "ImageSourceUnavailable")

    assert "check endpoint_override" in said


def test_glance_takes_longer_than_the_job_has(
    agent: Agent, images: Images, proxy: FaultProxy
) -> None:
    proxy.afterwards = Fault(stall_after=0)

    said = refused(agent, job(images.disk_raw, deadline_s=2), "DeadlineExceeded")

    assert "raise deadline_s" in said


# The host


def test_libvirtd_does_not_run(
    agent: Agent, images: Images, glance: Glance, libvirtd: PrivateLibvirtd
) -> None:
    before = glance.downloads(images.disk_raw)
    libvirtd.stop()
    try:
        said = refused(agent, job(images.disk_raw), "HypervisorError")
    finally:
        libvirtd.start()

    assert "is libvirtd running?" in said
    # It is seen before a long fetch, not after it.
    assert glance.downloads(images.disk_raw) == before


def test_a_domain_xml_that_is_none(local: Agent, libvirtd: PrivateLibvirtd, guest: Guest) -> None:
    image_id = add(local, guest.root, "raw")
    local.json("image", "fetch", image_id)
    leftovers = Leftovers(local, libvirtd)
    template = "<domain type='qemu'><name>web-1</name><os><type>no such</type></os></domain>"

    document = job(image_id, libvirt={"domain_xml": template}, networks=[])
    done = local.run("--format", "json", "boot", "-f", "-", stdin=json.dumps(document))

    error = json.loads(done.stdout)["error"]
    assert error["code"] in ("InvalidJob", "HypervisorError")
    assert done.returncode == (2 if error["code"] == "InvalidJob" else 1)
    assert error["hint"]
    leftovers.assert_none()


@pytest.fixture
def small_root(work: Path) -> Iterator[Path]:
    """The root directory for an agent whose instances are on an ext4 of 48 MiB."""
    image, root = work / "small.ext4", work / "no-space"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", image], check=True)
    mounted = root / "instances"
    mounted.mkdir(parents=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_no_space(
    small_root: Path, glance: Glance, proxy: FaultProxy, libvirtd: PrivateLibvirtd, tmp_path: Path
) -> None:
    large = guests.variant(tmp_path, seed="large", extra_mib=40).root
    fitting = guests.variant(tmp_path, seed="fitting", extra_mib=22).root
    too_large = glance.upload(large, disk_format="raw")
    once = glance.upload(fitting, disk_format="raw")
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none"},
    }
    with Agent(small_root, options) as agent:
        leftovers = Leftovers(agent, libvirtd)

        # Seen from the record, before the fetch has begun to fill the disk.
        said = refused(agent, job(too_large), "InsufficientFreeSpace")
        assert str(large.stat().st_size) in said
        leftovers.assert_none()
        assert proxy.matching[-1].sent < large.stat().st_size

        # Somebody else fills it meanwhile.
        proxy.afterwards = Fault(rate=4.0 * MIB)
        with _filling(agent.instances / "hog", agent.partial(once) / "data"):
            refused(agent, job(once), "InsufficientFreeSpace")
        proxy.afterwards = Fault()
        (agent.instances / "hog").unlink()
        leftovers.assert_none()

        # The base fits, a full copy of it for the instance does not.
        agent.json("image", "fetch", once)
        leftovers = Leftovers(agent, libvirtd)
        said = refused(agent, job(once, images_type="raw"), "InsufficientFreeSpace")
        assert str(agent.instances) in said
        leftovers.assert_none()


@contextlib.contextmanager
def _filling(hog: Path, partial: Path) -> Iterator[None]:
    """Take all the space there is as soon as `partial` has grown to a MiB."""
    done = threading.Event()

    def fill() -> None:
        while not done.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                if partial.stat().st_size > MIB:
                    break
        else:
            return
        free = os.statvfs(hog.parent)
        with hog.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
