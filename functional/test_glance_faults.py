"""A Glance that breaks in every way it can, and images that arrive whole all the same."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.client import Client
from agent.ranges import PART
from agent.report import Status
from functional.conftest import CACHE, MakeAgent
from functional.harness import glance as glances
from functional.harness.agent import Agent
from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from functional.harness.glance import Glance
from functional.harness.keystone import Keystone
from tests.waiting import LIMIT_S, until

MIB = 1 << 20
SIZE = 48 * MIB


@pytest.fixture(scope="module")
def blob(work: Path) -> Path:
    path = work / "blob"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def image_id(glance: Glance, blob: Path) -> Iterator[str]:
    image_id = glance.upload(blob, disk_format="raw")
    yield image_id
    glance.delete(image_id)


def agent_behind(make_agent: MakeAgent, proxy: FaultProxy, **glance: object) -> Agent:
    options = {"endpoint_override": proxy.url, "stall_timeout": 2, **glance}
    return make_agent(options={"glance": options})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Fault(cut_after=10 * MIB)], id="cut"),
        pytest.param([Fault(cut_after=20 * MIB, reset=True), Fault(refuse=True)], id="reset"),
        pytest.param([Fault(stall_after=15 * MIB)], id="stall"),
        pytest.param([Fault(answer=Answer(status=s)) for s in (503, 502, 429)], id="5xx-and-429"),
        pytest.param(
            [Fault(cut_after=30 * MIB), Fault(ignore_range=True)], id="no-ranges-any-more"
        ),
        pytest.param(
            [Fault(cut_after=30 * MIB), Fault(answer=Answer(status=416))], id="416-to-a-range"
        ),
        pytest.param([Fault(drop_length=True, cut_after=25 * MIB)], id="no-length-and-cut"),
        pytest.param([Fault(flip_at=12345678)], id="a-bit-flipped-once"),
    ],
)
def test_a_fault_costs_no_boot_and_no_wrong_byte(
    make_agent: MakeAgent, glance: Glance, image_id: str, blob: Path, faults: list[Fault]
) -> None:
    with FaultProxy(glance.url, faults) as proxy:
        agent = agent_behind(make_agent, proxy, num_retries=4)

        agent.json("image", "fetch", image_id)

        assert sha256(agent.base(image_id)) == sha256(blob)
        assert not agent.partial(image_id).exists()
        assert proxy.faults == [], "not every fault has happened"


def test_what_was_received_is_not_asked_for_again(
    make_agent: MakeAgent, glance: Glance, image_id: str
) -> None:
    with FaultProxy(glance.url, [Fault(cut_after=n * MIB) for n in (8, 8, 8)]) as proxy:
        agent = agent_behind(make_agent, proxy)

        [job] = agent.json("image", "fetch", image_id)["jobs"]

        starts = [exchange.range for exchange in proxy.matching]
        assert starts[0] is None
        assert [int(str(r).removeprefix("bytes=").rstrip("-")) for r in starts[1:]] == [
            8 * MIB,
            16 * MIB,
            24 * MIB,
        ]
        assert sum(phase["bytes"] for phase in job["timeline"]) == SIZE
        assert agent.log.count("WARNING") == 3


def test_a_glance_that_restarts_in_the_middle_is_waited_for(
    make_agent: MakeAgent, work: Path, blob: Path
) -> None:
    venv = glances.install(CACHE / "openstack")
    with (
        Glance(venv, work / "restarting-glance") as glance,
        FaultProxy(glance.url, [Fault(rate=20 * MIB)]) as proxy,
    ):
        image_id = glance.upload(blob, disk_format="raw")
        agent = agent_behind(make_agent, proxy, num_retries=20)
        fetch = threading.Thread(target=agent.json, args=("image", "fetch", image_id))
        fetch.start()
        until((agent.partial(image_id) / "data").exists)

        glance.restart()
        fetch.join()

        assert sha256(agent.base(image_id)) == sha256(blob)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_an_endpoint_that_is_dead_or_dies_is_passed_over(
    make_agent: MakeAgent, glance: Glance, image_id: str, blob: Path
) -> None:
    with (
        FaultProxy(glance.url, [Fault(cut_after=8 * MIB)]) as dying,
        FaultProxy(glance.url) as lively,
    ):
        dying.afterwards = Fault(refuse=True)
        endpoints = (f"http://127.0.0.1:{closed_port()}", dying.url, lively.url)
        options = {"endpoint_override": ",".join(endpoints), "num_retries": 2}
        agent = make_agent(options={"glance": options})

        agent.json("image", "fetch", image_id)

        assert sha256(agent.base(image_id)) == sha256(blob)
        # What the second one had sent, the third is not asked for.
        assert [exchange.range for exchange in lively.matching] == [f"bytes={8 * MIB}-"]


def test_all_fetches_together_keep_to_the_bandwidth_limit(
    make_agent: MakeAgent, glance: Glance, image_id: str, blob: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(blob.read_bytes()[: 16 * MIB])
    other_id = glance.upload(other, disk_format="raw")
    agent = make_agent(options={"glance": {"bandwidth_limit": 32}})
    begin = time.monotonic()

    agent.json("image", "fetch", image_id, other_id)

    assert time.monotonic() - begin > (SIZE + 16 * MIB) / (32 * MIB) - 0.2
    assert sha256(agent.base(image_id)) == sha256(blob)
    assert sha256(agent.base(other_id)) == sha256(other)
    glance.delete(other_id)


def test_an_expired_token_is_renewed_in_the_middle(
    make_agent: MakeAgent, work: Path, blob: Path
) -> None:
    venv = glances.install(CACHE / "openstack")
    with (
        Keystone(venv, work / "keystone", token_ttl=5) as keystone,
        Glance(venv, work / "glance-with-keystone", keystone=keystone) as glance,
        # The answer to the first request for the bytes is longer than a token lives.
        FaultProxy(glance.url, [Fault(rate=4 * MIB, cut_after=28 * MIB)]) as proxy,
    ):
        image_id = glance.upload(blob, disk_format="raw")
        options = {
            "auth_type": "password",
            "auth_url": keystone.auth_url,
            "username": "demo",
            "password": "demo",
            "project_name": "demo",
            "user_domain_id": "default",
            "project_domain_id": "default",
        }
        agent = agent_behind(make_agent, proxy, **options)

        agent.json("image", "fetch", image_id)

        assert sha256(agent.base(image_id)) == sha256(blob)
        first, second = proxy.matching
        assert first.headers["x-auth-token"] != second.headers["x-auth-token"]
        for token in (first.headers["x-auth-token"], second.headers["x-auth-token"]):
            assert token not in agent.log


def test_a_throttled_connection_gets_company_and_one_that_breaks_is_resumed(
    make_agent: MakeAgent, glance: Glance, image_id: str, blob: Path
) -> None:
    rate = 6 * MIB
    slow = Fault(rate=rate)
    cut = replace(slow, cut_after=2 * MIB)
    with FaultProxy(glance.url, [slow, slow, cut]) as proxy:
        proxy.afterwards = slow
        agent = agent_behind(make_agent, proxy, max_connections_per_image=4)
        with Client(agent.socket) as client:  # the start of a command is none of its time
            began = time.monotonic()
            report = client.wait(client.fetch_image(image_id).id, LIMIT_S)
            took = time.monotonic() - began

        assert report.status is Status.DONE
        assert took < SIZE / rate
        assert sha256(agent.base(image_id)) == sha256(blob)
        first, *others = [exchange.range for exchange in proxy.matching]
        assert first is None
        spans = sorted(tuple(map(int, str(r).removeprefix("bytes=").split("-"))) for r in others)
        # The broken part is asked for from the byte on where it broke; all else comes once.
        [rest] = [span for span in spans if (span[0] - spans[0][0]) % PART]
        assert rest[0] % PART == (spans[0][0] + 2 * MIB) % PART
        spans.remove(rest)
        assert [begin for begin, _ in spans[1:]] == [last + 1 for _, last in spans[:-1]]
        assert spans[-1][1] == SIZE - 1


def test_a_store_without_ranges_is_read_on_over_the_one_connection(
    make_agent: MakeAgent, glance: Glance, image_id: str, blob: Path
) -> None:
    slow = Fault(rate=8 * MIB)
    with FaultProxy(glance.url, [slow]) as proxy:
        proxy.afterwards = replace(slow, ignore_range=True)
        agent = agent_behind(make_agent, proxy, max_connections_per_image=4)

        [job] = agent.json("image", "fetch", image_id)["jobs"]

        assert sha256(agent.base(image_id)) == sha256(blob)
        first, *others = proxy.matching
        assert first.sent == SIZE
        assert others, "nobody tried"
        assert all(exchange.sent < SIZE // 2 for exchange in others)
        assert sum(phase["bytes"] for phase in job["timeline"]) == SIZE
