"""Whatever is wrong with a job, its image or the host: one error code, what to do, and no trace."""

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from functional.conftest import Images
from functional.harness import guest as guests
from functional.harness.agent import Agent
from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd

MIB: Final = 1 << 20
GIB: Final = 1 << 30
NO_IMAGE: Final = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


@pytest.fixture(scope="module")
def proxy(glance: Glance) -> Iterator[FaultProxy]:
    with FaultProxy(glance.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def agent(work: Path, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[Agent]:
    """One for the whole module: bad input leaves an agent as it was."""
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none", "num_retries": 1},
    }
    with Agent(work / "bad-input", options) as agent:
        yield agent


@pytest.fixture(scope="module")
def local(work: Path, libvirtd: PrivateLibvirtd) -> Iterator[Agent]:
    """An agent with images of its own directory, which takes any bytes under any name."""
    root = work / "bad-images"
    options: dict[str, dict[str, object]] = {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "images": {"source": "directory", "directory": root / "images"},
    }
    with Agent(root, options) as agent:
        yield agent


@pytest.fixture(autouse=True)
def _nothing_left(agent: Agent, libvirtd: PrivateLibvirtd, proxy: FaultProxy) -> Iterator[None]:
    leftovers = Leftovers(agent, libvirtd)
    yield
    proxy.faults, proxy.afterwards = [], Fault()
    leftovers.assert_none()


def job(image_id: str, *, disk: int = 1, ram: int = 192, **fields: object) -> dict[str, Any]:
    return {
        "instance": {"name": "web-1"},
        "flavor": {"vcpus": 1, "ram": ram, "disk": disk},
        "image": {"id": image_id},
        **fields,
    }


def refused(agent: Agent, document: dict[str, Any], code: str, *, status: int = 1) -> str:
    """Boot what must fail with `code`; return message and hint."""
    done = agent.run("--format", "json", "boot", "-f", "-", stdin=json.dumps(document))
    assert done.returncode == status, done.stdout + done.stderr
    report = json.loads(done.stdout)
    error = report["error"]
    assert (report["status"], error["code"]) == ("ERROR", code), error
    assert error["message"]
    assert error["hint"]
    assert code in done.stderr
    assert error["message"] in done.stderr
    assert error["hint"] in done.stderr
    assert "Traceback" not in done.stderr
    return f"{error['message']}\n{error['hint']}"


# The job file


BAD_FILES: Final = {
    "not YAML": ("instance: {name: [", "line 1"),
    "no text": ("\x01\x02\udcff", "not YAML"),
    "empty": ("", "holds no job"),
    "a key twice": ("instance: {name: a}\ninstance: {name: b}\n", "instance stands here a second"),
    "a wrong type": (
        "{instance: {name: a}, image: {id: i}, flavor: {vcpus: many, ram: 1, disk: 1}}",
        "flavor.vcpus: should be a valid integer",
    ),
    "an unknown field": (
        "{instance: {name: a}, image: {id: i}, flavor: {vcpu: 1, ram: 1, disk: 1}}",
        "did you mean flavor.vcpus?",
    ),
    "too little": ("instance: {name: a}\n", "needs flavor and image"),
    "a path for an id": (
        "{instance: {name: a}, image: {id: ../../etc/passwd}, flavor: {vcpus: 1, ram: 1, disk: 1}}",
        "image.id",
    ),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_job_file_that_makes_no_sense(
    agent: Agent, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, errors="surrogateescape")

    for command in (("boot", "-f"), ("job", "validate")):
        done = agent.run(*command, path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "InvalidJob" in done.stderr
        assert words in done.stderr
        assert "\nHint: " in done.stderr
        assert "Traceback" not in done.stderr
    assert agent.json("job", "list")["jobs"] == []


def test_a_job_file_that_is_not_there(agent: Agent, tmp_path: Path) -> None:
    done = agent.run("boot", "-f", tmp_path / "job.yaml")

    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{tmp_path}/job.yaml': No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"version": 1, "version": 1}', "stands twice"),
        (b"[]", "not an object"),
        (b'{"instance": {"name": "\\ud800"}}', "instance.name"),
        (b'{"\\ud800": 1}', "not JSON"),
        (b'{"deadline_s": NaN}', "deadline_s"),
        (b'{"deadline_s": 1e999}', "deadline_s"),
        (b'{"version": 1%s}' % (b"0" * 5000), "not JSON"),
    ],
)
def test_a_request_that_makes_no_sense(agent: Agent, body: bytes, words: str) -> None:
    done = subprocess.run(
        [
            *("curl", "-sS", "--unix-socket", agent.socket, "-w", "\n%{http_code}"),
            *("--data-binary", "@-", "http://agent/v1/jobs"),
        ],
        input=body,
        capture_output=True,
        check=True,
    )

    answer, _, status = done.stdout.decode().rpartition("\n")
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == ("400", "InvalidJob")
    assert words in error["message"]
    assert error["hint"]


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


def add(agent: Agent, path: Path, disk_format: str) -> str:
    added = agent.json("image", "add", path, "--disk-format", disk_format)
    return str(added["id"])


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
