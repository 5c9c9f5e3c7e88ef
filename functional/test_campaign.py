"""The campaign: trouble at every step of the agent on journal and file system, and all is well.

`make campaign` runs all of it, which takes long, and prints a table. Otherwise each scenario meets
a few steps, spread over its whole length, and always the same ones.
"""

import errno
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

from agent.client import Client, Refused
from agent.report import Status
from functional.conftest import Images
from functional.harness.agent import Options
from functional.harness.campaign import Document, Field, Reference, Scenario
from functional.harness.campaign_table import Row, Table
from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.libvirtd import PrivateLibvirtd
from functional.harness.mounts import small_file_system
from functional.harness.steps import ALL, Action, Kind, Trouble

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
    "torn": Trouble(action=Action.TEAR, kinds=Kind.WRITE | Kind.COPY),
    "enospc": Trouble(action=Action.FAIL, kinds=TAKES_SPACE, error=errno.ENOSPC),
    "eio": Trouble(action=Action.FAIL, kinds=ALL ^ Kind.SYNC, error=errno.EIO),
    "fsync": Trouble(action=Action.FAIL, kinds=Kind.SYNC, error=errno.EIO),
    "short": Trouble(action=Action.SHORTEN, kinds=Kind.WRITE | Kind.COPY),
}
FIRST: Final = "6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e01"
SECOND: Final = "6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e02"
THIRD: Final = "6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e03"
FOURTH: Final = "6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e04"
FIFTH: Final = "6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e05"


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


# The scenarios


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
    small_raw = glance.upload(raw, disk_format="raw")
    twin_raw = glance.upload(raw, disk_format="raw", name="the same bytes again")
    small_qcow2 = glance.upload(qcow2, disk_format="qcow2")

    def job(image: str, **fields: Any) -> Document:
        instance = {"uuid": FIRST, "name": "campaign-1", **fields.pop("instance", {})}
        return {
            "version": 1,
            "action": "prepare",
            "instance": instance,
            "flavor": {"vcpus": 1, "ram": 192, "disk": 1, **fields.pop("flavor", {})},
            "image": {"id": image},
            "networks": [],
            **fields,
        }

    full: dict[str, Any] = {
        "instance": {"config_drive": True, "user_data": "#cloud-config\n"},
        "flavor": {"ephemeral": [{"size": 1, "guest_format": "ext4"}], "swap": 64},
        "images_type": "raw",
    }
    every = [
        Scenario(name="qcow2-cold", jobs=(job(small_qcow2),)),
        Scenario(name="raw-cold", jobs=(job(small_raw, images_type="raw"),)),
        Scenario(name="kernel-ramdisk-root", jobs=(job(images.root),)),
        Scenario(
            name="every-disk",
            before=(_fetch(small_raw),),
            jobs=(job(small_raw, **full),),
        ),
        Scenario(
            name="twin",
            before=(_fetch(small_raw),),
            jobs=(job(twin_raw),),
        ),
        Scenario(
            name="two-at-once",
            jobs=(
                job(small_raw),
                job(small_raw, instance={"uuid": SECOND, "name": "campaign-2"}),
            ),
        ),
        Scenario(
            name="delete",
            before=(job(small_raw, **full),),
            jobs=({"version": 1, "action": "delete", "instance": {"uuid": FIRST}},),
        ),
        Scenario(name="remove", before=(_fetch(small_raw),), call=_removing(small_raw)),
        Scenario(
            name="defined",
            before=(_fetch(small_raw),),
            jobs=(job(small_raw, action="boot", libvirt={"start": False}),),
        ),
        Scenario(
            name="booted",
            before=(_fetch(small_raw),),
            jobs=(job(small_raw, action="boot"),),
            ends=Status.ACTIVE,
            guest_writes=True,
        ),
    ]
    load = Scenario(
        name="load",
        before=(_fetch(images.kernel), job(small_raw, images_type="raw")),
        jobs=(
            job(small_qcow2, instance={"uuid": SECOND, "name": "campaign-2"}),
            job(twin_raw, **{**full, "instance": {"uuid": THIRD, "name": "campaign-3"}}),
            {"version": 1, "action": "delete", "instance": {"uuid": FIRST}},
            job(images.root, instance={"uuid": FOURTH, "name": "campaign-4"}),
            job(small_qcow2, instance={"uuid": FIFTH, "name": "campaign-5"}, images_type="raw"),
            _fetch(small_raw),
        ),
    )
    return {scenario.name: scenario for scenario in [*every, load]}


def _fetch(image: str) -> Document:
    return {"version": 1, "action": "fetch", "image": {"id": image}}


def _removing(image: str) -> Callable[[Client], object]:
    def remove(client: Client) -> None:
        try:
            client.remove_image(image)
        except Refused as e:
            # Done already is what a kill after the last step leaves.
            if e.error.code != "NotFound":
                raise

    return remove


@pytest.fixture(scope="module")
def proxy(glance: Glance) -> Iterator[FaultProxy]:
    with FaultProxy(glance.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def options(proxy: FaultProxy, libvirtd: PrivateLibvirtd) -> Options:
    patience = {"stall_timeout": 1, "num_retries": 10}
    return {
        "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
        "glance": {"endpoint_override": proxy.url, "auth_type": "none", **patience},
    }


@pytest.fixture(scope="module")
def ground(work: Path, options: Options) -> Iterator[Field]:
    ground = Field(work / "campaign", options)
    yield ground
    ground.close()


DISKS_ONLY: Final = (
    "qcow2-cold",
    "raw-cold",
    "kernel-ramdisk-root",
    "every-disk",
    "twin",
    "two-at-once",
    "delete",
    "remove",
)


def chosen(name: str) -> list[str]:
    """The troubles a scenario meets: all of them, or kills and one of the others in turn."""
    if WHOLE:
        return list(TROUBLES)
    if name == "booted":
        return ["killed"]
    others = ["enospc", "fsync", "eio", "fsync", "short", "torn"]
    return ["killed", others[DISKS_ONLY.index(name) % len(others) if name in DISKS_ONLY else 2]]


# Each of them is killed before one of them meets anything else: that finds the most.
MEETINGS: Final = [
    (trouble, name)
    for trouble in TROUBLES
    for name in (*DISKS_ONLY, "defined", "booted")
    if trouble in chosen(name)
]


@pytest.mark.parametrize(("trouble_name", "name"), MEETINGS)
def test_trouble_at_any_step_costs_nothing(
    *,
    trouble_name: str,
    name: str,
    ground: Field,
    scenarios: dict[str, Scenario],
    table: Table,
) -> None:
    trouble = TROUBLES[trouble_name]
    reference = ground.reference(scenarios[name])
    steps = ground.count(trouble)
    with table.row(name, trouble_name, steps) as row:
        for at in some(steps, name, trouble_name):
            taken, problem = ground.round(reference, trouble, at)
            row.note(f"step {at} of {steps}", taken, problem)
    row.assert_well()


def some(steps: int, name: str, trouble: str) -> list[int]:
    """Return which steps of a scenario meet the trouble: all, or a few, evenly spread."""
    wanted = 2 if trouble == "killed" and name != "booted" else 1
    if WHOLE or steps <= wanted:
        return list(range(1, steps + 1))
    if (name, trouble) == ("every-disk", "fsync"):
        # The last of them is of the journal, and comes when all is done but to say so.
        return list(range(max(1, steps - 2), steps + 1))
    return [1 + (2 * number + 1) * steps // (2 * wanted) for number in range(wanted)]


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
