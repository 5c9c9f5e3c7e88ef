"""One file for images with the same bytes, and one `_base` for several agents."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.client import Client
from agent.report import Status
from functional.conftest import MakeAgent
from functional.harness.agent import Agent, make_user
from functional.harness.fault_proxy import Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.mounts import seen_at
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
from tests.waiting import LIMIT_S, until

__all__ = ["upload"]

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
                        "glance": {"endpoint_override": url, "stall_timeout": 600},
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
        proxy.faults = [Fault(stall_after=16 * MIB)]
        both, sample = hosts(proxy.url), upload(32)
        both.one.json("image", "fetch", "--no-wait", sample.id)
        partial = both.one.partial(sample.id) / "data"
        until(lambda: partial.exists() and partial.stat().st_size > 8 * MIB)
        [waiting] = both.other.json("image", "fetch", "--no-wait", sample.id)["jobs"]
        until(lambda: both.other.json("cache", "status")["fetching"])
        # A waiter that is cancelled leaves at once, although the writer gets no further.
        with Client(both.other.socket) as client:
            leaving = client.submit(job("leaving", sample)).id
            client.cancel(leaving)
            assert client.wait(leaving, LIMIT_S).status is Status.CANCELLED
        assert len(proxy.matching) == 1

        both.one.kill()

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
