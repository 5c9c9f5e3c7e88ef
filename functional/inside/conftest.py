"""Tests in here need a kernel with device-mapper: `functional/test_lvm.py` runs them in one."""

import subprocess
from collections.abc import Iterator

import pytest
from oslo_config import cfg

import privsep
from functional.harness import uml

GROUP = "vg"
POOL = "pool"


def tool(*words: str) -> str:
    return subprocess.run(
        words, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="session", autouse=True)
def _group() -> None:
    """A volume group on the first disk, a third of it a thin pool."""
    tool("vgcreate", "--quiet", GROUP, str(uml.DISK))
    options = ("--type=thin-pool", "--extents=33%VG", f"--name={POOL}")
    tool("lvcreate", "--quiet", "--yes", *options, GROUP)


@pytest.fixture(scope="session")
def _helper() -> Iterator[None]:
    """The verbs run in this process, which is root's; the real helper is in `test_boot`."""
    privsep.volumes.set_client_mode(False)
    cfg.CONF.set_override("images_volume_group", GROUP, group="libvirt")
    yield
    privsep.volumes.set_client_mode(True)
    cfg.CONF.clear_override("images_volume_group", group="libvirt")
