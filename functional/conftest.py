"""What the functional tests share: one Glance, one libvirtd, one guest for a whole run."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from functional.harness import glance as glances
from functional.harness import guest as guests
from functional.harness.agent import Agent, Options
from functional.harness.fault_proxy import FaultProxy
from functional.harness.glance import Glance
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd

# Those are for a kernel with device-mapper, in which test_lvm.py runs them.
collect_ignore = [] if os.environ.get("BOOTWRIGHT_INSIDE") else ["inside"]

CACHE = Path(os.environ.get("BOOTWRIGHT_CACHE", "/var/cache/bootwright-dev"))
"""What is expensive to make and the same in every run."""
WORK = Path(os.environ.get("BOOTWRIGHT_WORK", "/var/tmp"))
"""Where everything else is made."""


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.getuid() != 0:
        reason = "the functional tests need root, to start libvirtd and become the service user"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A directory that the service user and QEMU's may pass through; pytest's own are root's."""
    path = Path(tempfile.mkdtemp(prefix="bootwright-", dir=WORK))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def guest() -> Guest:
    return guests.build(CACHE / "guest")


@pytest.fixture(scope="session")
def libvirtd(work: Path) -> Iterator[PrivateLibvirtd]:
    with PrivateLibvirtd(work / "libvirt", cache=CACHE / "libvirt") as libvirtd:
        yield libvirtd


@pytest.fixture(scope="session")
def glance(work: Path) -> Iterator[Glance]:
    with Glance(glances.install(CACHE / "openstack"), work / "glance") as glance:
        yield glance


@pytest.fixture(scope="module")
def proxy(glance: Glance) -> Iterator[FaultProxy]:
    """The same Glance, as long as no test gives it a fault."""
    with FaultProxy(glance.url) as proxy:
        yield proxy


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The ids of the guest's images in Glance."""

    disk_qcow2: str
    disk_raw: str
    kernel: str
    ramdisk: str
    root: str
    """A bare file system whose properties name kernel and ramdisk."""


@pytest.fixture(scope="session")
def images(glance: Glance, guest: Guest) -> Images:
    kernel = glance.upload(guest.kernel, disk_format="aki", container_format="aki")
    ramdisk = glance.upload(guest.ramdisk, disk_format="ari", container_format="ari")
    return Images(
        disk_qcow2=glance.upload(guest.disk_qcow2, disk_format="qcow2"),
        disk_raw=glance.upload(guest.disk, disk_format="raw"),
        kernel=kernel,
        ramdisk=ramdisk,
        root=glance.upload(guest.root, disk_format="raw", properties=boot_files(kernel, ramdisk)),
    )


def boot_files(kernel: str, ramdisk: str) -> dict[str, str]:
    """The properties of a root image that boots with this kernel and ramdisk."""
    return {
        "kernel_id": kernel,
        "ramdisk_id": ramdisk,
        "os_command_line": guests.COMMAND_LINE,
    }


MakeAgent = Callable[..., Agent]


@pytest.fixture
def make_agent(work: Path, libvirtd: PrivateLibvirtd, glance: Glance) -> Iterator[MakeAgent]:
    """Return a function that starts an agent of its own, on the shared libvirtd and Glance.

    Keyword arguments: `options` for the configuration over the defaults, `root`
    for a directory of one's own. Whatever the agent still runs goes at the end.
    """
    agents: list[Agent] = []

    def make(*, options: Options | None = None, root: Path | None = None) -> Agent:
        merged: dict[str, dict[str, object]] = {
            "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
            "glance": {"endpoint_override": glance.url, "auth_type": "none"},
        }
        for section, values in (options or {}).items():
            merged.setdefault(section, {}).update(values)
        agent = Agent(root or work / f"agent-{next(_NUMBERS)}", merged)
        agents.append(agent)
        agent.start()
        return agent

    yield make
    for agent in agents:
        agent.close()


_NUMBERS = itertools.count()


@pytest.fixture
def agent(make_agent: MakeAgent) -> Agent:
    return make_agent()
