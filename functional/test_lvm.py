"""Disks on logical volumes: the tests of `functional/inside`, run in a kernel of their own."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from functional.conftest import CACHE
from functional.harness import uml
from functional.harness.agent import CHECKOUT, make_user
from functional.harness.guest import Guest

_INSIDE = Path(__file__).parent / "inside"
# A minute on two processors that have nothing else to do.
_LIMIT_S = 600.0


def run_inside(
    work: Path,
    module: str,
    *,
    disk_mib: int = 128,
    udev: bool = False,
    memory_mib: int = 512,
    writable: Sequence[Path] = (),
) -> uml.Completed:
    """Run a test module in there, on a disk of its own."""
    disk = work / f"{module}.disk"
    with disk.open("wb") as file:
        file.truncate(disk_mib << 20)
    return uml.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"),
            _INSIDE / f"{module}.py",
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


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, guest: Guest
) -> Iterator[Mapping[str, Future[uml.Completed]]]:
    """All of them at a time, for each has but one processor."""
    make_user()
    assert guest.kernel.exists()  # built, so that it is found in there
    libvirt_cache = CACHE / "libvirt-uml"
    libvirt_cache.mkdir(exist_ok=True)
    work = tmp_path_factory.mktemp("uml")
    with ThreadPoolExecutor() as pool:
        yield {
            "test_lvm_boot": pool.submit(
                lambda: run_inside(
                    work,
                    "test_lvm_boot",
                    disk_mib=200,
                    udev=True,
                    memory_mib=1024,
                    writable=[libvirt_cache],
                )
            ),
            "test_lvm": pool.submit(run_inside, work, "test_lvm"),
            "test_lvm_contract": pool.submit(run_inside, work, "test_lvm_contract"),
        }


@pytest.mark.timeout(_LIMIT_S + 60)
@pytest.mark.parametrize("module", ["test_lvm_contract", "test_lvm", "test_lvm_boot"])
def test_inside(runs: Mapping[str, Future[uml.Completed]], module: str) -> None:
    done = runs[module].result()
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
