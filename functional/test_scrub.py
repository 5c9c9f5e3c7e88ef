"""Damaged and lost bases: found, put away and fetched anew, through the installed agent."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from functional.conftest import MakeAgent
from functional.harness.agent import Agent, make_user
from functional.harness.glance import Glance
from functional.samples import Sample, Upload, fetch, flip_a_bit, job, upload
from tests.waiting import until

__all__ = ["upload"]


def quarantined(agent: Agent) -> set[str]:
    return {path.name.partition("-")[0] for path in (agent.bases / ".quarantine").iterdir()}


def assert_named(agent: Agent, sample: Sample, *instances: str) -> None:
    [line] = [line for line in agent.log.splitlines() if "is damaged" in line]
    assert "ERROR" in line
    assert str(agent.base(sample.id)) in line
    for name in instances:
        assert f"instance {name}" in line


def test_verify_finds_a_flipped_bit_names_the_instances_and_has_it_fetched_anew(
    agent: Agent, upload: Upload, glance: Glance
) -> None:
    used, unused, sound = upload(), upload(), upload()
    agent.boot(job("web-1", used, action="boot"))
    agent.boot(job("web-2", used))
    fetch(agent, unused, sound)
    flip_a_bit(agent.base(used.id))
    flip_a_bit(agent.base(unused.id))

    found = agent.json("image", "verify", status=1)["images"]

    told = {v["image_id"]: (v["soundness"], sorted(v["instances"])) for v in found}
    assert told == {
        used.id: ("damaged", ["web-1", "web-2"]),
        unused.id: ("damaged", []),
        sound.id: ("intact", []),
    }
    errors = [line for line in agent.log.splitlines() if "is damaged" in line]
    assert all("ERROR" in line for line in errors)
    assert [("web-1" in line, "web-2" in line) for line in errors if used.id in line] == [
        (True, True)
    ]
    assert quarantined(agent) == {agent.base(s.id).name for s in (used, unused)}
    assert not agent.base(unused.id).exists()
    assert agent.base(used.id).exists(), "the overlays would have lost their base"

    for sample in (used, unused):
        fetch(agent, sample)
        assert sample.is_at(agent.base(sample.id))
        assert glance.downloads(sample.id) == 2
    agent.json("image", "verify")
    assert "instance web-1" in agent.json("image", "why", used.id)["detail"]


def test_the_scrub_finds_a_flipped_bit_and_repairs_what_instances_stand_on(
    make_agent: MakeAgent, upload: Upload, glance: Glance
) -> None:
    agent = make_agent(options={"image_cache": {"scrub_interval": 1}})
    sample = upload()
    agent.boot(job("web-1", sample))
    agent.stop()
    flip_a_bit(agent.base(sample.id))
    time.sleep(1.1)  # verified less than a second ago it would not be due

    agent.start()

    until(lambda: glance.downloads(sample.id) == 2 and sample.is_at(agent.base(sample.id)))
    assert_named(agent, sample, "web-1")
    assert quarantined(agent) == {agent.base(sample.id).name}
    assert_stands_back(agent.pid)


def assert_stands_back(pid: int) -> None:
    """One thread of the agent is idle to the disks and last to the processor, and no other."""
    tasks = Path(f"/proc/{pid}/task")
    others = nice_of(tasks / str(pid))  # as the tests are
    idle = []
    for thread in tasks.iterdir():
        done = subprocess.run(
            ["ionice", "-p", thread.name], capture_output=True, text=True, check=False
        )
        try:
            nice = nice_of(thread)
        except (FileNotFoundError, ProcessLookupError):
            continue  # such as that of the fetch, which has just ended
        assert done.returncode == 0, done.stderr
        if done.stdout.strip() == "idle":
            assert nice == 19
            idle.append(thread.name)
        else:
            assert nice == others
    assert len(idle) == 1
    assert idle != [str(pid)]


def nice_of(thread: Path) -> int:
    # Field 19 of proc(5); the name, which may hold anything, is the second, in brackets.
    return int((thread / "stat").read_text().rpartition(")")[2].split()[16])


@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "sound"])
def test_a_base_that_was_replaced_is_verified_before_its_first_use(
    make_agent: MakeAgent, upload: Upload, glance: Glance, damaged: bool
) -> None:
    agent = make_agent(options={"image_cache": {"scrub_interval": 0}})
    sample = upload()
    agent.boot(job("web-1", sample))
    agent.stop()
    base = agent.base(sample.id)
    copy = base.with_name("copy")
    shutil.copyfile(base, copy)
    os.chown(copy, make_user().pw_uid, make_user().pw_gid)
    if damaged:
        flip_a_bit(copy)
    copy.rename(base)

    agent.start()
    result = agent.boot(job("web-2", sample))

    assert sample.is_at(base)
    assert "verifying it before it is used" in agent.log
    assert glance.downloads(sample.id) == (2 if damaged else 1)
    assert result["image"]["source"] == ("glance" if damaged else "cache")
    if damaged:
        assert_named(agent, sample, "web-1")
        assert quarantined(agent) == {base.name}
    else:
        assert "is damaged" not in agent.log


def test_a_bit_that_flips_in_place_is_found_before_a_base_is_used_where_that_is_wanted(
    make_agent: MakeAgent, upload: Upload, glance: Glance
) -> None:
    agent = make_agent(options={"image_cache": {"scrub_interval": 0, "verify_before_use": True}})
    sample = upload()
    fetch(agent, sample)
    flip_a_bit(agent.base(sample.id))

    result = agent.boot(job("web-1", sample))

    assert sample.is_at(agent.base(sample.id))
    assert glance.downloads(sample.id) == 2
    assert result["image"]["source"] == "glance"
    assert quarantined(agent) == {agent.base(sample.id).name}


def test_a_base_that_was_lost_is_put_back_under_its_disks(
    make_agent: MakeAgent, upload: Upload
) -> None:
    agent = make_agent()
    sample = upload(1)
    disk = Path(agent.boot(job("web-1", sample))["disks"][0]["path"])
    base, before = agent.base(sample.id), disk.read_bytes()
    base.unlink()
    base.with_name(f"{base.name}.json").unlink()
    lost = [c for c in agent.json("doctor", status=5)["checks"] if c["result"] == "error"]
    assert [sample.id in check["hint"] for check in lost] == [True]

    agent.boot(job("web-2", sample))

    assert sample.is_at(base)
    assert disk.read_bytes() == before
    agent.json("doctor")
