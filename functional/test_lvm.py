"""Disks on logical volumes: the tests of `functional/inside`, run in a kernel of their own."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from functional.conftest import CACHE
from functional.harness import uml
from functional.harness.agent import CHECKOUT, make_user
from functional.harness.guest import Guest

_INSIDE = Path(__file__).parent / "inside"
_LIMIT_S = 280.0


def run_inside(
    tmp_path: Path,
    module: str,
    *,
    udev: bool = False,
    memory_mib: int = 512,
    writable: Sequence[Path] = (),
) -> None:
    """Run a test module in there, and fail as it does."""
    disk = tmp_path / f"{module}.disk"
    with disk.open("wb") as file:
        file.truncate(200 << 20)
    done = uml.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"),
            _INSIDE / module,
        ],
        disks=[disk],
        writable=writable,
        environment={
            "BOOTWRIGHT_INSIDE": "1",
            "BOOTWRIGHT_CACHE": os.fspath(CACHE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CI": os.environ.get("CI", ""),
        },
        directory=CHECKOUT,
        udev=udev,
        memory_mib=memory_mib,
        timeout_s=_LIMIT_S,
    )
    print(done.stdout)  # noqa: T201 - how many tests, and how long each took
    assert done.status == 0, done.stdout + done.stderr


def test_command_in_another_kernel(tmp_path: Path) -> None:
    """The harness itself: what a command sees, leaves and returns."""
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    shown.mkdir()
    hidden.mkdir()
    script = f"uname -r; echo is >{shown}/there; echo not >{hidden}/there; echo oh >&2; exit 7"

    done = uml.run(["sh", "-c", script], writable=[shown])

    assert done.status == 7
    assert done.stdout.strip() != os.uname().release
    assert done.stderr.strip() == "oh"
    assert (shown / "there").read_text() == "is\n"
    assert list(hidden.iterdir()) == []


def test_kernel_that_does_not_come_to_an_end_is_killed() -> None:
    with pytest.raises(uml.KernelFailed, match="killed after 8 s"):
        uml.run(["sleep", "60"], timeout_s=8)


def test_volumes(tmp_path: Path) -> None:
    """Two kernels at a time: each has one processor."""
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run_inside, tmp_path, module)
            for module in ("test_lvm_contract.py", "test_lvm.py")
        ]
    for run in runs:
        run.result()


def test_domains(tmp_path: Path, guest: Guest) -> None:
    make_user()
    libvirt_cache = CACHE / "libvirt-uml"
    libvirt_cache.mkdir(exist_ok=True)
    run_inside(tmp_path, "test_lvm_boot.py", udev=True, memory_mib=1024, writable=[libvirt_cache])
