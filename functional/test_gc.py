"""What the image cache keeps and lets go, through the installed agent.

Jobs prepare disks and boot nothing, except where a running domain is the point; its disk is
noise then, and it hangs in its firmware.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.client import Client
from agent.hypervisor import Hypervisor
from functional.conftest import MakeAgent
from functional.harness.libvirtd import PrivateLibvirtd
from functional.harness.mounts import small_file_system
from functional.samples import (
    GOES_AT_ONCE,
    MIB,
    WEEK_S,
    Upload,
    fetch,
    job,
    make_old,
    refused,
    upload,
)
from tests.waiting import until

__all__ = ["upload"]


def claim_a_base(disk: Path, base: Path) -> None:
    """Let a disk say that it stands on a base, as a guest can that writes over its header."""
    lie = disk.with_name("lie")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, lie], check=True
    )
    with disk.open("r+b") as file:
        file.write(lie.read_bytes())
    lie.unlink()


def outcome(decision: dict[str, Any]) -> tuple[str, bool, str, int]:
    """What a decision comes to, without the seconds it speaks of."""
    return decision["image_id"], decision["remove"], decision["reason"], decision["bytes"]


def test_dry_run_why_and_gc_tell_one_story_and_nothing_in_use_is_in_it(
    make_agent: MakeAgent, upload: Upload, libvirtd: PrivateLibvirtd
) -> None:
    agent = make_agent(options={"image_cache": GOES_AT_ONCE})
    running, stopped, undefined, pinned, for_a_while, unused = (upload(1) for _ in range(6))
    same = upload(data=unused.data)
    used_twin = upload(data=stopped.data)
    agent.boot(job("running-1", running, action="boot"))
    off = agent.boot(job("stopped-1", stopped, action="boot", libvirt={"start": False}))
    gone = agent.boot(job("undefined-1", undefined, action="boot"))["instance"]["uuid"]
    # Behind the agent's back; the disk stays.
    hypervisor = Hypervisor(libvirtd.uri, virt_type="qemu")
    hypervisor.destroy(gone)
    hypervisor.undefine(gone)
    hypervisor.close()
    fetch(agent, pinned, for_a_while, unused, same, used_twin)
    agent.json("image", "pin", pinned.id)
    # What a guest writes says nothing: neither that it needs that base, nor that it lets go of its.
    claim_a_base(Path(off["disks"][0]["path"]), agent.base(unused.id))
    everything = [running, stopped, undefined, pinned, for_a_while, unused, same, used_twin]
    with Client(agent.socket) as client:  # a command might take longer than the pin holds
        until_s = client.pin_image(for_a_while.id, 3.0).pinned_until
        held = client.why_image(for_a_while.id)
    assert until_s is not None
    assert (held.remove, "a pin until" in held.detail) == (False, True)
    time.sleep(max(0.0, until_s + 0.05 - time.time()))

    planned = agent.json("cache", "gc", "--dry-run")
    assert all(agent.base(sample.id).exists() for sample in everything)
    with Client(agent.socket) as client:
        why = {s.id: client.why_image(s.id).model_dump(mode="json") for s in everything}
    done = agent.json("cache", "gc")

    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert planned["decisions"] == done["decisions"]
    assert {decision["image_id"]: decision for decision in done["decisions"]} == why
    removed = {decision["image_id"] for decision in done["decisions"] if decision["remove"]}
    assert removed == {s.id for s in (for_a_while, unused, same, used_twin)}
    for sample in everything:
        assert agent.base(sample.id).exists() is (sample.id not in removed)
    # A file with another name in use gives nothing back, one with two names its bytes once.
    assert done["bytes"] == sum(decision["bytes"] for decision in done["decisions"])
    assert 2 * MIB <= done["bytes"] < 3 * MIB

    for name, sample in (
        ("instance running-1", running),
        ("instance stopped-1", stopped),
        ("instance undefined-1", undefined),
        ("a pin", pinned),
    ):
        assert name in why[sample.id]["detail"]
        assert name in refused(agent, "image", "remove", sample.id)
        assert sample.is_at(agent.base(sample.id))
    agent.json("image", "unpin", pinned.id)
    agent.json("image", "remove", pinned.id)
    agent.json("instance", "delete", "undefined-1")
    agent.json("image", "remove", undefined.id)
    assert not agent.base(pinned.id).exists()
    assert not agent.base(undefined.id).exists()


def test_what_the_agent_does_by_itself_is_what_gc_does(
    make_agent: MakeAgent, upload: Upload
) -> None:
    agent = make_agent(options={"image_cache": {**GOES_AT_ONCE, "manager_interval": 1}})
    used, unused = upload(1), upload(1)
    agent.boot(job("web-1", used))
    fetch(agent, unused)
    until(lambda: not agent.base(unused.id).exists())
    agent.wait_log(f"image {unused.id} removed from the cache")

    # Not old on the day its instance goes: it counted as used until then.
    agent.stop()
    agent.configure_more({"image_cache": {"remove_unused_original_minimum_age_seconds": 3600}})
    make_old(agent, used, 2 * WEEK_S)
    agent.start()
    until(lambda: agent.base(used.id).stat().st_mtime > time.time() - 60)
    agent.json("instance", "delete", "web-1")
    assert agent.json("image", "why", used.id)["reason"] == "recent"


@pytest.fixture
def small(work: Path) -> Iterator[Path]:
    """The root of an agent whose instances have 48 MiB, some 40 of them free."""
    root = work / f"small-{os.urandom(4).hex()}"
    with small_file_system(root / "instances", mib=48):
        yield root


def test_on_a_small_file_system_the_longest_unused_make_room_and_nothing_else(
    small: Path, make_agent: MakeAgent, upload: Upload
) -> None:
    agent = make_agent(
        root=small, options={"image_cache": {"manager_interval": 0, "high_watermark": 100}}
    )
    used, old, recent = upload(8), upload(8), upload(8)
    agent.boot(job("web-1", used))
    fetch(agent, old, recent)
    make_old(agent, old, 200)
    make_old(agent, used, 300)
    make_old(agent, recent, 100)

    another = upload(20)
    fetch(agent, another)
    assert not agent.base(old.id).exists()
    assert another.is_at(agent.base(another.id))
    assert recent.is_at(agent.base(recent.id))

    # Not even all of them would do, so not one of them goes.
    large = upload(45)
    [failed] = agent.json("image", "fetch", large.id, status=1)["jobs"]
    assert failed["error"]["code"] == "InsufficientFreeSpace"
    assert "removing all bases that nobody needs would not" in failed["error"]["message"]
    assert failed["error"]["retriable"]
    assert {p.name for p in agent.bases.glob("[!.]*") if p.suffix == ""} == {
        agent.base(sample.id).name for sample in (used, recent, another)
    }
    assert not agent.partial(large.id).exists()

    # What an instance stands on stays although it is the oldest, and its disk is untouched.
    agent.boot(job("web-2", another))
    agent.boot(job("web-3", recent))
    more = upload(16)
    [failed] = agent.json("image", "fetch", more.id, status=1)["jobs"]
    assert failed["error"]["code"] == "InsufficientFreeSpace"
    assert all(s.is_at(agent.base(s.id)) for s in (used, recent, another))
    agent.json("instance", "delete", "web-2")
    fetch(agent, more)
    assert not agent.base(another.id).exists()
    assert used.is_at(agent.base(used.id))


def test_watermarks_and_max_size_remove_the_longest_unused_down_to_the_limit(
    small: Path, make_agent: MakeAgent, upload: Upload
) -> None:
    agent = make_agent(
        root=small,
        options={"image_cache": {"manager_interval": 0, "high_watermark": 60, "low_watermark": 40}},
    )
    used, *rest = [upload(5) for _ in range(6)]
    agent.boot(job("web-1", used))
    fetch(agent, *rest)
    for age, sample in enumerate(reversed([used, *rest]), start=1):
        make_old(agent, sample, 100 * age)

    planned, done = agent.json("cache", "gc", "--dry-run"), agent.json("cache", "gc")

    assert [outcome(d) for d in planned["decisions"]] == [outcome(d) for d in done["decisions"]]
    gone = [d["image_id"] for d in done["decisions"] if d["reason"] == "watermark"]
    assert gone == [sample.id for sample in rest[: len(gone)]]
    assert all(agent.base(s.id).exists() is (s.id not in gone) for s in (used, *rest))
    # As df(1) counts: what only root may use is nobody's.
    status = os.statvfs(agent.instances)
    taken = status.f_blocks - status.f_bfree
    low = 0.4 * (taken + status.f_bavail)
    one = 5 * MIB // status.f_frsize
    assert taken <= low < taken + one, "too few are gone, or too many"


def test_max_size_counts_all_that_is_in_the_cache(make_agent: MakeAgent, upload: Upload) -> None:
    """1 GiB is the least there is; a file of nobody's takes most of it at no cost."""
    agent = make_agent(options={"image_cache": {"manager_interval": 0, "max_size": 1}})
    with (agent.bases / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1024 * MIB - 7 * MIB)
    used, old, recent = upload(2), upload(2), upload(2)
    agent.boot(job("web-1", used))
    fetch(agent, old, recent)
    make_old(agent, old, 200)
    make_old(agent, used, 300)

    another = upload(2)
    fetch(agent, another)
    assert [agent.base(s.id).exists() for s in (used, old, recent)] == [True, False, True]
    with (agent.bases / "ballast").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 1024 * MIB - 3 * MIB)
    done = agent.json("cache", "gc")
    assert {d["image_id"]: d["reason"] for d in done["decisions"] if d["remove"]} == {
        recent.id: "max_size",
        another.id: "max_size",
    }
    assert used.is_at(agent.base(used.id))
