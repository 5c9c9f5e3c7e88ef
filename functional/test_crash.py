"""A crash of the agent costs nothing: whatever it interrupts goes on after the restart.

Each test brings a job to one point of its life, holds it there, kills the agent and starts it
again on the same directories. What holds it is never in the agent: a slow Glance, the lock of a
base, or a daemon of libvirt's that is frozen.
"""

import fcntl
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from agent.client import Client
from agent.hypervisor import Hypervisor
from agent.report import JobReport, PhaseReport, Status, TaskState
from functional.conftest import Images, MakeAgent, boot_files
from functional.harness import guest as guests
from functional.harness.agent import Agent
from functional.harness.console import wait_ready
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd
from tests.waiting import LIMIT_S, until

MIB: Final = 1 << 20
GIB: Final = 1 << 30
NAME: Final = "crash-1"
DRAIN_S: Final = 30.0
"""`drain_timeout` by default."""
FILES: Final = {"console.log", "instance.json", "kernel", "ramdisk", "disk"}
"""What an instance of our images has in its directory."""


def job(image_id: str) -> dict[str, Any]:
    return {
        "version": 1,
        "idempotency_key": "crash",
        "instance": {"name": NAME},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 1},
        "image": {"id": image_id},
        "networks": [],
    }


def submit(agent: Agent, document: dict[str, Any]) -> JobReport:
    with Client(agent.socket) as client:
        return client.submit(document)


def in_phase(agent: Agent, job_id: str, phase: TaskState, *, times: int = 1) -> Callable[[], bool]:
    """Whether the job has begun a phase, for the nth time."""

    def look() -> bool:
        with Client(agent.socket) as client:
            events = client.events(job_id=job_id, follow=False)
            return sum(event.task_state is phase for event in events) >= times

    return look


def final(agent: Agent, job_id: str) -> JobReport:
    with Client(agent.socket) as client:
        report = client.wait(job_id, LIMIT_S)
    assert report.status.final, report
    return report


def downloading(report: JobReport) -> PhaseReport:
    [phase] = [p for p in report.timeline if p.phase is TaskState.IMAGE_DOWNLOADING]
    return phase


@contextmanager
def held(lock: Path, owner: Path) -> Iterator[None]:
    """Hold the lock of a base, as another process that fetches it does."""
    with lock.open("w") as file:
        status = owner.stat()
        os.fchown(file.fileno(), status.st_uid, status.st_gid)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def ending_with(agent: Agent) -> Iterator[None]:
    """See that the one process the agent has started, its privileged helper, ends in the block."""
    children = Path(f"/proc/{agent.pid}/task").glob("*/children")
    [helper] = {int(word) for path in children for word in path.read_text().split()}
    process = os.pidfd_open(helper)
    try:
        yield
        assert select.select([process], [], [], LIMIT_S)[0], "it lives on with its privilege"
    finally:
        os.close(process)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image, and how its only instance has to look when all is well."""

    image_id: str
    contents: str
    images: set[str]
    """Of kernel, ramdisk and root."""
    size: int

    def assert_booted_once(
        self, agent: Agent, libvirtd: PrivateLibvirtd, report: JobReport
    ) -> None:
        """Everything a boot makes is there, once, with the right contents, and nothing else."""
        assert report.status is Status.ACTIVE, report
        assert report.instance is not None
        assert report.domain is not None
        assert report.domain.state == "running"
        uuid = report.instance.uuid
        assert libvirtd.domains() == {uuid: "running"}
        assert {path.name for path in agent.instances.iterdir()} == {uuid, "_base"}
        directory = agent.instances / uuid
        assert {path.name for path in directory.iterdir()} == FILES
        bases = {agent.base(image).name for image in self.images}
        assert {path.name for path in agent.bases.iterdir()} == {
            *(".hosts", ".locks", ".partial", ".pins", ".quarantine"),
            *bases,
            *(f"{name}.json" for name in bases),
        }
        assert list((agent.bases / ".partial").iterdir()) == []
        with Client(agent.socket) as client:
            cache = client.cache()
            assert (cache.entries, cache.fetching) == (len(self.images), ())
        seen = wait_ready((directory / "console.log").read_text)
        assert (seen.content_sha256, seen.disks["vda"], seen.bootcount) == (self.contents, GIB, 1)


@pytest.fixture(scope="module")
def small(images: Images, guest: Guest) -> Sample:
    return Sample(
        image_id=images.root,
        contents=guest.content_sha256,
        images={images.root, images.kernel, images.ramdisk},
        size=guest.root.stat().st_size,
    )


@pytest.fixture(scope="module")
def big(work: Path, glance: Glance, images: Images) -> Sample:
    variant = guests.variant(work, seed="crash", extra_mib=100)
    properties = boot_files(images.kernel, images.ramdisk)
    image_id = glance.upload(variant.root, disk_format="raw", properties=properties)
    size = variant.root.stat().st_size
    variant.root.unlink()
    return Sample(
        image_id=image_id,
        contents=variant.content_sha256,
        images={image_id, images.kernel, images.ramdisk},
        size=size,
    )


@pytest.fixture(scope="module")
def laborious(work: Path, glance: Glance, images: Images, guest: Guest) -> Sample:
    """An image of a format that only qemu-img can read."""
    raw, vmdk = work / "laborious.raw", work / "laborious.vmdk"
    shutil.copyfile(guest.root, raw)
    with raw.open("ab") as file:
        file.write(b"x" * MIB)
    options = ("-o", "subformat=streamOptimized")
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", *options, raw, vmdk], check=True
    )
    properties = boot_files(images.kernel, images.ramdisk)
    image_id = glance.upload(vmdk, disk_format="vmdk", properties=properties)
    size = vmdk.stat().st_size
    raw.unlink()
    vmdk.unlink()
    return Sample(
        image_id=image_id,
        contents=guest.content_sha256,
        images={image_id, images.kernel, images.ramdisk},
        size=size,
    )


@pytest.fixture
def slow_glance(glance: Glance, big: Sample) -> Iterator[FaultProxy]:
    """A Glance that takes its time with the big image, once, and never gets to its end."""
    fault = Fault(rate=60 * MIB, stall_after=big.size * 3 // 4)
    with FaultProxy(glance.url, [fault], only=f"/{big.image_id}/file") as proxy:
        yield proxy


@pytest.fixture
def distant_agent(make_agent: MakeAgent, slow_glance: FaultProxy) -> Agent:
    """An agent that has only the slow Glance."""
    return make_agent(options={"glance": {"endpoint_override": slow_glance.url}})


def halfway(agent: Agent, image: Sample) -> Callable[[], bool]:
    data = agent.partial(image.image_id) / "data"
    return lambda: data.exists() and data.stat().st_size > image.size // 2


def assert_resumed(
    agent: Agent, proxy: FaultProxy, report: JobReport, image: Sample, kept: int
) -> None:
    phase = downloading(report)
    assert phase.resumed == kept
    first, second = proxy.matching
    assert first.range is None
    assert second.range == f"bytes={kept}-"
    # It would be less than 2 MiB more than what was missing, if not for every byte being kept.
    assert second.sent == image.size - kept


def test_killed_download_goes_on_at_the_byte(
    distant_agent: Agent, slow_glance: FaultProxy, big: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = distant_agent
    report = submit(agent, job(big.image_id))
    until(halfway(agent, big))

    with ending_with(agent):
        agent.kill()
    kept = (agent.partial(big.image_id) / "data").stat().st_size
    agent.start()

    report = final(agent, report.id)
    assert_resumed(agent, slow_glance, report, big, kept)
    big.assert_booted_once(agent, libvirtd, report)


def test_stopped_download_goes_on_at_the_byte(
    distant_agent: Agent, slow_glance: FaultProxy, big: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = distant_agent
    report = submit(agent, job(big.image_id))
    until(halfway(agent, big))

    began = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - began < DRAIN_S
    kept = (agent.partial(big.image_id) / "data").stat().st_size
    assert kept > big.size // 2
    agent.start()

    report = final(agent, report.id)
    assert_resumed(agent, slow_glance, report, big, kept)
    big.assert_booted_once(agent, libvirtd, report)


def test_killed_conversion_is_made_again_from_the_kept_bytes(
    make_agent: MakeAgent, glance: Glance, laborious: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    report = submit(agent, job(laborious.image_id))
    raw = agent.partial(laborious.image_id) / "raw"
    until(raw.exists)

    # Without systemd, which ends all of a service, qemu-img goes on beside the next one.
    agent.kill()
    assert raw.exists()
    agent.start()

    report = final(agent, report.id)
    assert downloading(report).resumed == laborious.size
    assert glance.downloads(laborious.image_id) == 1
    laborious.assert_booted_once(agent, libvirtd, report)


@contextmanager
def before_define(agent: Agent, small: Sample, libvirtd: PrivateLibvirtd) -> Iterator[JobReport]:
    """Have a boot come to where libvirtd has to define its domain, and does not answer."""
    lock = agent.bases / ".locks" / agent.base(small.image_id).name
    with ExitStack() as frozen:
        with held(lock, agent.instances):
            report = submit(agent, job(small.image_id))
            until(in_phase(agent, report.id, TaskState.IMAGE_DOWNLOADING))
            # The job has asked libvirtd what it had to ask before.
            frozen.enter_context(libvirtd.frozen())
        yield report


def test_killed_with_its_overlay_made_and_no_domain(
    make_agent: MakeAgent, small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    with before_define(agent, small, libvirtd) as report:
        assert report.instance is not None
        until((agent.instances / report.instance.uuid / "disk").exists)

        agent.kill()
    agent.start()

    small.assert_booted_once(agent, libvirtd, final(agent, report.id))


@pytest.fixture
def starting(
    make_agent: MakeAgent, small: Sample, libvirtd: PrivateLibvirtd
) -> Iterator[tuple[Agent, JobReport, ExitStack]]:
    """A job whose domain is being started when its agent is killed, until the stack is closed."""
    agent = make_agent()
    with ExitStack() as frozen:
        frozen.enter_context(libvirtd.frozen("virtlogd"))
        report = submit(agent, job(small.image_id))
        until(lambda: libvirtd.is_starting(NAME))
        agent.kill()
        yield agent, report, frozen


def test_killed_with_its_domain_defined(
    starting: tuple[Agent, JobReport, ExitStack], small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent, report, frozen = starting
    assert report.instance is not None
    uuid = report.instance.uuid
    frozen.close()
    until(lambda: libvirtd.domains() == {uuid: "running"})
    Hypervisor(libvirtd.uri, virt_type="qemu").destroy(uuid)
    assert libvirtd.domains() == {uuid: "shut off"}

    agent.start()

    small.assert_booted_once(agent, libvirtd, final(agent, report.id))


def test_killed_with_its_domain_started(
    starting: tuple[Agent, JobReport, ExitStack], small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent, report, frozen = starting
    assert report.instance is not None
    uuid = report.instance.uuid
    frozen.close()
    until(lambda: libvirtd.domains() == {uuid: "running"})
    qemu = libvirtd.qemu_pid(NAME)

    agent.start()

    small.assert_booted_once(agent, libvirtd, final(agent, report.id))
    assert libvirtd.qemu_pid(NAME) == qemu


def test_killed_while_its_domain_starts(
    starting: tuple[Agent, JobReport, ExitStack], small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent, report, frozen = starting

    agent.start()
    # Then it asks libvirt, which has no answer as long as virtlogd has none.
    until(in_phase(agent, report.id, TaskState.IMAGE_RESOLVING, times=2))
    frozen.close()

    small.assert_booted_once(agent, libvirtd, final(agent, report.id))


def test_job_that_was_acknowledged_is_done_and_only_once(
    make_agent: MakeAgent, small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    job_id = agent.submit(job(small.image_id))

    agent.kill()
    agent.start()

    assert submit(agent, job(small.image_id)).id == job_id
    small.assert_booted_once(agent, libvirtd, final(agent, job_id))
    assert submit(agent, job(small.image_id)).id == job_id
    other = agent.run(
        *("boot", "--no-wait", "--idempotency-key", "crash"),
        *("--image", small.image_id, "--flavor", "1x256x1", "--name", NAME),
    )
    assert other.returncode == 1
    assert "IdempotencyConflict" in other.stderr
    with Client(agent.socket) as client:
        assert [report.id for report in client.jobs()] == [job_id]


def test_cancel_that_was_acknowledged_counts_after_a_kill(
    make_agent: MakeAgent, small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    with before_define(agent, small, libvirtd) as report:
        until(in_phase(agent, report.id, TaskState.SPAWNING))
        with Client(agent.socket) as client:
            assert not client.cancel(report.id).status.final

        agent.kill()
    agent.start()

    assert final(agent, report.id).status is Status.CANCELLED
    assert libvirtd.domains() == {}
    assert {path.name for path in agent.instances.iterdir()} == {"_base"}


def test_killed_delete_leaves_nothing_in_the_end(
    make_agent: MakeAgent, small: Sample, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent()
    made = final(agent, submit(agent, job(small.image_id)).id)
    assert made.status is Status.ACTIVE
    with libvirtd.frozen():
        with Client(agent.socket) as client:
            report = client.delete_instance(NAME)
        until(in_phase(agent, report.id, TaskState.DELETING))
        agent.kill()

    agent.start()

    assert final(agent, report.id).status is Status.DONE
    assert libvirtd.domains() == {}
    assert {path.name for path in agent.instances.iterdir()} == {"_base"}
    assert agent.base(small.image_id).is_file()
