"""The campaign: trouble at every step of the agent on journal and file system, and all is well.

`make campaign` runs all of it, which takes long, and prints a table. Otherwise each scenario meets
a few steps, spread over its whole length, and always the same ones.
"""

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import pytest

from agent.report import Status
from functional.conftest import Images
from functional.harness.agent import Options
from functional.harness.campaign import Field, Reference, Scenario
from functional.harness.campaign_scenarios import scenarios_of
from functional.harness.campaign_table import Row, Table
from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.libvirtd import PrivateLibvirtd
from functional.harness.mounts import small_file_system
from functional.harness.steps import ALL, Action, Kind, Steps, Trouble

MIB: Final = 1 << 20
WHOLE: Final = os.environ.get("BOOTWRIGHT_CAMPAIGN") == "whole"
SEED: Final = int(os.environ.get("BOOTWRIGHT_CAMPAIGN_SEED", "20240607"))

pytestmark = [
    pytest.mark.timeout(6 * 3600 if WHOLE else 300),
    # httpx leaves one behind when the agent dies while it connects.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

TAKES_SPACE: Final = (
    Kind.CREATE | Kind.WRITE | Kind.RESIZE | Kind.LINK | Kind.MKDIR | Kind.COPY | Kind.ALLOCATE
)
TROUBLES: Final = {
    "killed": Trouble(action=Action.KILL),
    "fsync": Trouble(action=Action.FAIL, kinds=Kind.SYNC, error=errno.EIO),
    "enospc": Trouble(action=Action.FAIL, kinds=TAKES_SPACE, error=errno.ENOSPC),
    "eio": Trouble(action=Action.FAIL, kinds=ALL ^ Kind.SYNC, error=errno.EIO),
    "torn": Trouble(action=Action.TEAR, kinds=Kind.WRITE | Kind.COPY),
    "short": Trouble(action=Action.SHORTEN, kinds=Kind.WRITE | Kind.COPY),
}


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")

    def show(lines: str) -> None:
        if WHOLE:
            with capture.global_and_fixture_disabled():
                sys.stdout.write(f"{lines}\n")
                sys.stdout.flush()

    table = Table(show)
    yield table
    show(f"\n{table}")


@pytest.fixture(scope="module")
def scenarios(work: Path, glance: Glance, images: Images) -> dict[str, Scenario]:
    raw, qcow2 = work / "campaign.raw", work / "campaign.qcow2"
    content = random.Random(SEED)
    with raw.open("wb") as file:
        file.write(content.randbytes(3 * MIB))
        file.truncate(18 * MIB)
        file.seek(0, os.SEEK_END)
        file.write(content.randbytes(2 * MIB))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    every = scenarios_of(
        raw=glance.upload(raw, disk_format="raw"),
        twin=glance.upload(raw, disk_format="raw", name="the same bytes again"),
        qcow2=glance.upload(qcow2, disk_format="qcow2"),
        root=images.root,
        kernel=images.kernel,
    )
    return {scenario.name: scenario for scenario in every}


@pytest.fixture(scope="module")
def options(proxy: FaultProxy, libvirtd: PrivateLibvirtd) -> Options:
    patience = {"stall_timeout": 1, "num_retries": 10}
    return {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none", **patience},
        # It would read all bases at each start. Each round has them verified in its end.
        "image_cache": {"scrub_interval": 0},
    }


@pytest.fixture(scope="module")
def ground(work: Path, options: Options) -> Iterator[Field]:
    ground = Field(work / "campaign", options)
    yield ground
    ground.close()


@pytest.fixture(scope="module")
def pruning_ground(work: Path, options: Options) -> Iterator[Field]:
    """Where a base that nobody needs is too old at once."""
    cache = {**options["image_cache"], "remove_unused_original_minimum_age_seconds": 0}
    ground = Field(work / "campaign-pruning", {**options, "image_cache": cache})
    yield ground
    ground.close()


# What each scenario meets in a slice, besides kills.
BESIDES: Final = {
    "qcow2-cold": "enospc",
    "raw-cold": "fsync",
    "kernel-ramdisk-root": "eio",
    "every-disk": "fsync",
    "twin": "short",
    "two-at-once": "torn",
    "delete": "enospc",
    "remove": "fsync",
    "prune": "eio",
    "defined": "eio",
    "resize": "fsync",
    "rebuild": "enospc",
    "rescue": "short",
    "booted": None,
}
# Each of them is killed before one of them meets anything else: that finds the most.
MEETINGS: Final = [
    (trouble, name)
    for trouble in TROUBLES
    for name, besides in BESIDES.items()
    if WHOLE or trouble in ("killed", besides)
]


@pytest.mark.parametrize(("trouble_name", "name"), MEETINGS)
def test_trouble_at_any_step_costs_nothing(
    *,
    trouble_name: str,
    name: str,
    ground: Field,
    pruning_ground: Field,
    scenarios: dict[str, Scenario],
    table: Table,
) -> None:
    trouble = TROUBLES[trouble_name]
    if name == "prune":
        ground = pruning_ground
    reference = ground.reference(scenarios[name])
    steps = ground.count(trouble)
    every = itertools.count(1) if steps else ()
    with table.row(name, trouble_name) as row:
        for at in every if WHOLE else a_few(steps, name, trouble_name):
            taken, problem = ground.round(reference, trouble, at)
            row.note(f"step {at}", taken, problem)
            if row.misses == ENOUGH_MISSES:
                break
    row.assert_well()


# So many steps in succession that an agent did not come to: it has no more. How many there are
# depends on the pieces in which an image happens to arrive.
ENOUGH_MISSES: Final = 5


def a_few(steps: int, name: str, trouble: str) -> list[int]:
    """Return which steps of a scenario meet the trouble in a slice: a few, evenly spread."""
    # A round that starts a guest takes as long as many others, and kills in the middle of a boot
    # and of a rescue are in test_crash.py and test_changes.py as well.
    starts_a_guest = name in ("booted", "rescue")
    wanted = min(steps, 2 if trouble == "killed" and not starts_a_guest else 1)
    if (name, trouble) == ("every-disk", "fsync"):
        # The last of them is of the journal, and comes when all is done but to say so.
        return list(range(max(1, steps - 2), steps + 1))
    return [1 + (2 * number + 1) * steps // (2 * wanted) for number in range(wanted)]


OVERLAY: Final = """
import sys
from pathlib import Path
from agent.qcow2 import create_overlay
create_overlay(
    Path(sys.argv[1], "disk"), virtual_size=1 << 30, backing_file=Path("/base"),
    backing_format="raw",
)
"""


def test_each_short_write_of_an_overlay_is_gone_on_with(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    steps = Steps(tmp_path / "steps", below=[place])
    environment = {**os.environ, **steps.environment}
    made = set()
    for at in range(10):
        steps.arm(0, TROUBLES["short"], at=at)
        subprocess.run([sys.executable, "-c", OVERLAY, place], env=environment, check=True)
        hit = steps.disarm().hit
        made.add((place / "disk").read_bytes())
        assert len(made) == 1, hit
        if at and hit is None:
            break
    assert at > 1, "nothing was written"


def test_a_kill_at_any_instant_under_load_costs_nothing(
    ground: Field, scenarios: dict[str, Scenario], table: Table
) -> None:
    reference = ground.reference(scenarios["load"])
    with table.row("load", "instant") as row:
        killed_at_instants(ground, reference, row, 200 if WHOLE else 3)
    row.assert_well()


def killed_at_instants(
    ground: Field,
    reference: Reference,
    row: Row,
    rounds: int,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Have the agent killed in so many rounds, each within `around`."""
    chance = random.Random(f"{SEED} {row.scenario}")
    for number in range(rounds):
        seconds = chance.uniform(0.0, 1.5)
        with around():
            taken, problem = ground.round_at(reference, seconds)
        row.note(f"instant {number}, {seconds:.3f} s", taken, problem)
        row.hits += 1


FAULTS: Final = {
    "cut-10%": [Fault(cut_after=2 * MIB)],
    "cut-50%": [Fault(cut_after=10 * MIB)],
    "cut-90%": [Fault(cut_after=18 * MIB)],
    "reset": [Fault(cut_after=10 * MIB, reset=True), Fault(refuse=True)],
    "wrong-byte": [Fault(flip_at=3 * MIB // 2)],
    "5xx-storm": [Fault(answer=Answer(status=n)) for n in (500, 502, 503, 504, 503, 502)],
    "slow-drip": [Fault(rate=12 * MIB)],
    "stall": [Fault(stall_after=10 * MIB)],
    "no-length": [Fault(drop_length=True, cut_after=5 * MIB)],
    "no-ranges": [Fault(cut_after=10 * MIB), Fault(ignore_range=True)],
    "restart": [Fault(rate=12 * MIB)],
}


@pytest.mark.parametrize("name", FAULTS if WHOLE else ["slow-drip", "wrong-byte"])
def test_a_kill_while_glance_fails_costs_nothing(
    *,
    name: str,
    ground: Field,
    proxy: FaultProxy,
    glance: Glance,
    scenarios: dict[str, Scenario],
    table: Table,
) -> None:
    @contextmanager
    def failing() -> Iterator[None]:
        proxy.faults = list(FAULTS[name])
        restart = threading.Timer(0.3, glance.restart)
        if name == "restart":
            restart.start()
        try:
            yield
        finally:
            proxy.faults = []
            if name == "restart":
                restart.join()

    reference = ground.reference(scenarios["raw-cold"])
    with table.row(f"glance-{name}", "instant") as row:
        killed_at_instants(ground, reference, row, 10 if WHOLE else 2, failing)
    row.assert_well()


def test_a_disk_that_is_really_full_costs_nothing(
    work: Path, options: Options, scenarios: dict[str, Scenario], table: Table
) -> None:
    root = work / "campaign-full"
    with table.row("full-disk", "enospc") as row, small_file_system(root / "agent", mib=96):
        ground = Field(root, options)
        try:
            reference = ground.reference(scenarios["raw-cold"])
            for free in range(0, 40 * MIB, MIB if WHOLE else 8 * MIB):
                report = ground.round_with(reference, free)
                row.rounds += 1
                row.hits += report is None or report.status is not Status.DONE
        finally:
            ground.close()
    assert row.hits, "the disk was never full"
    assert row.hits < row.rounds, "the disk was always full"
