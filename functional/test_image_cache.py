"""What the image cache keeps, lets go, finds damaged and shares, through the installed agent.

Jobs prepare disks and boot nothing, except where a running domain is the point; its disk is
noise then, and it hangs in its firmware.
"""

import dataclasses
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from agent.client import Client
from agent.hypervisor import Hypervisor
from functional.conftest import MakeAgent
from functional.harness.agent import Agent, make_user
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.libvirtd import PrivateLibvirtd
from functional.harness.mounts import seen_at, small_file_system

MIB: Final = 1 << 20
WEEK_S: Final = 7 * 86400.0
WAIT_S: Final = 30.0
GOES_AT_ONCE: Final = {"remove_unused_original_minimum_age_seconds": 0, "manager_interval": 0}
"""A base nobody needs goes, but only when somebody asks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image of noise, a bare file system to all who ask."""

    id: str
    data: bytes

    def is_at(self, path: Path) -> bool:
        return path.read_bytes() == self.data


Upload = Callable[..., Sample]


@pytest.fixture
def upload(glance: Glance, tmp_path: Path) -> Iterator[Upload]:
    """Return a function that uploads so many MiB of noise, or given bytes."""
    samples = []

    def upload(mib: int = 2, *, data: bytes | None = None) -> Sample:
        path = tmp_path / "noise"
        path.write_bytes(data or os.urandom(mib * MIB))
        sample = Sample(id=glance.upload(path, disk_format="raw"), data=path.read_bytes())
        samples.append(sample)
        return sample

    yield upload
    for sample in samples:
        glance.delete(sample.id)


def job(name: str, sample: Sample, **fields: Any) -> dict[str, Any]:
    return {
        "action": "prepare",
        "instance": {"name": name},
        "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
        "image": {"id": sample.id},
        "networks": [],
        **fields,
    }


def fetch(agent: Agent, *samples: Sample) -> None:
    agent.json("image", "fetch", *(sample.id for sample in samples))


def make_old(agent: Agent, sample: Sample, seconds: float) -> None:
    """Let a base look as if nobody had used it for so long."""
    base = agent.base(sample.id)
    manifest = base.with_name(f"{base.name}.json")
    status = manifest.stat()
    then = time.time() - seconds
    os.utime(base, (then, then))
    # A manifest is never younger than what it describes.
    text = manifest.read_text()
    created = text.partition('"created_at":')[2].partition(",")[0].partition("\n")[0].strip()
    manifest.write_text(text.replace(created, str(then)))
    os.chown(manifest, status.st_uid, status.st_gid)


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MIB + 12345)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def claim_a_base(disk: Path, base: Path) -> None:
    """Let a disk say that it stands on a base, as a guest can that writes over its header."""
    lie = disk.with_name("lie")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, lie], check=True
    )
    with disk.open("r+b") as file:
        file.write(lie.read_bytes())
    lie.unlink()


def refused(agent: Agent, *arguments: str) -> str:
    """Run a command that has to fail; return why it does."""
    done = agent.run(*arguments)
    assert done.returncode == 1, (done.stdout, done.stderr)
    return done.stderr


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def outcome(decision: dict[str, Any]) -> tuple[str, bool, str, int]:
    """What a decision comes to, without the seconds it speaks of."""
    return decision["image_id"], decision["remove"], decision["reason"], decision["bytes"]


# Keep, and let go


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
    until_s = agent.json("image", "pin", for_a_while.id, "--for", "3s")["pinned_until"]
    everything = [running, stopped, undefined, pinned, for_a_while, unused, same, used_twin]
    held = agent.json("image", "why", for_a_while.id)
    assert (held["remove"], "a pin until" in held["detail"]) == (False, True)
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
    assert f"image {unused.id} removed from the cache" in agent.log

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


# Same bytes


def test_a_second_id_with_the_same_hash_costs_no_byte_of_glance(
    agent: Agent, upload: Upload, glance: Glance
) -> None:
    first = upload(4)
    second = upload(data=first.data)
    fetch(agent, first)
    result = agent.boot(job("web-1", second))

    assert (glance.downloads(first.id), glance.downloads(second.id)) == (1, 0)
    assert result["image"]["source"] == "cache"
    assert agent.base(first.id).samefile(agent.base(second.id))
    agent.json("image", "remove", first.id)
    assert second.is_at(agent.base(second.id))


# Scrub


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
    idle = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        done = subprocess.run(
            ["ionice", "-p", thread.name], capture_output=True, text=True, check=True
        )
        # Field 19 of proc(5); the name, which may hold anything, is the second, in brackets.
        nice = int((thread / "stat").read_text().rpartition(")")[2].split()[16])
        assert (done.stdout.strip() == "idle") is (nice == 19)
        if nice == 19:
            idle.append(thread.name)
    assert len(idle) == 1
    assert idle != [str(pid)]


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


# Hosts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """Two agents that know nothing of each other but `_base`."""

    one: Agent
    other: Agent


MakeHosts = Callable[..., Hosts]


@pytest.fixture
def hosts(make_agent: MakeAgent, work: Path, glance: Glance) -> Iterator[MakeHosts]:
    with ExitStack() as stack:

        def make(url: str = glance.url) -> Hosts:
            root = work / f"hosts-{os.urandom(4).hex()}"
            shared, account = root / "share", make_user()
            shared.mkdir(parents=True)
            os.chown(shared, account.pw_uid, account.pw_gid)
            roots = [root / "one", root / "other"]
            for place in roots:
                place.mkdir()
                (place / "instances").mkdir()
            stack.enter_context(seen_at(shared, *(r / "instances/_base" for r in roots)))
            agents = [
                make_agent(
                    root=place,
                    options={
                        "glance": {"endpoint_override": url},
                        "image_cache": {**GOES_AT_ONCE, "host_id": place.name},
                    },
                )
                for place in roots
            ]
            # Before the directories go: a mount point that is in use stays.
            for agent in agents:
                stack.callback(agent.close)
            return Hosts(one=agents[0], other=agents[1])

        yield make


def test_two_hosts_that_want_one_image_make_one_download(
    hosts: MakeHosts, upload: Upload, glance: Glance
) -> None:
    with FaultProxy(glance.url) as proxy:
        proxy.afterwards = Fault(rate=8.0 * MIB)
        both, sample = hosts(proxy.url), upload(12)
        fetches = [
            threading.Thread(target=fetch, args=(agent, sample)) for agent in (both.one, both.other)
        ]
        for thread in fetches:
            thread.start()
        for thread in fetches:
            thread.join()

    assert glance.downloads(sample.id) == 1
    assert sample.is_at(both.one.base(sample.id))
    assert both.one.base(sample.id).samefile(both.other.base(sample.id))


def test_the_death_of_the_writer_hands_over_to_the_other_host_which_resumes(
    hosts: MakeHosts, upload: Upload, glance: Glance
) -> None:
    with FaultProxy(glance.url) as proxy:
        proxy.afterwards = Fault(rate=16.0 * MIB)
        both, sample = hosts(proxy.url), upload(64)
        both.one.json("image", "fetch", "--no-wait", sample.id)
        partial = both.one.partial(sample.id) / "data"
        until(lambda: partial.exists() and partial.stat().st_size > 8 * MIB)
        [waiting] = both.other.json("image", "fetch", "--no-wait", sample.id)["jobs"]
        until(lambda: both.other.json("cache", "status")["fetching"])
        # A waiter that is cancelled leaves at once, however long the writer takes.
        leaving = both.other.submit(job("leaving", sample))
        both.other.json("job", "cancel", leaving)
        began = time.monotonic()
        assert both.other.wait(leaving, status=1)["status"] == "CANCELLED"
        assert time.monotonic() - began < 2.5
        assert len(proxy.matching) == 1

        both.one.kill()
        proxy.hurry()

        done = both.other.wait(waiting["id"])
    first, second = proxy.matching
    assert (first.range, done["status"]) == (None, "DONE")
    resumed = int(str(second.range).removeprefix("bytes=").rstrip("-"))
    assert resumed > 8 * MIB
    assert sum(phase["bytes"] for phase in done["timeline"]) == len(sample.data) - resumed
    assert sample.is_at(both.other.base(sample.id))
    both.one.start()  # its own job goes on, and finds the base
    until(lambda: all(j["status"] == "DONE" for j in both.one.json("job", "list")["jobs"]))
    assert len(proxy.matching) == 2


def test_a_host_that_is_down_for_a_week_still_protects_its_bases(
    hosts: MakeHosts, upload: Upload
) -> None:
    both = hosts()
    needed, unused = upload(1), upload(1)
    both.one.boot(job("web-1", needed))
    fetch(both.one, unused)
    both.one.stop()  # it takes back what it no longer needs when it starts, or later
    both.one.start()
    both.one.kill()
    long_ago = time.time() - WEEK_S
    for sample in (needed, unused):
        make_old(both.other, sample, WEEK_S)
    os.utime(both.other.bases / ".hosts/one.json", (long_ago, long_ago))

    done = both.other.json("cache", "gc")

    assert {d["image_id"]: d["remove"] for d in done["decisions"]} == {
        needed.id: False,
        unused.id: True,
    }
    assert "host " in refused(both.other, "image", "remove", needed.id)
    assert needed.is_at(both.other.base(needed.id))

    both.one.start()
    both.one.json("instance", "delete", "web-1")
    both.one.stop()
    both.one.start()
    both.other.json("image", "remove", needed.id)
    assert not both.other.base(needed.id).exists()
