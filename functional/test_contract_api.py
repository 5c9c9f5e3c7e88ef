"""The contract of the API, for those who use no program of ours."""

import json
from typing import Any

from functional.conftest import Images
from functional.contract import agent, booted, curl
from functional.harness.agent import Agent

__all__ = ["agent", "booted"]


def test_the_api_answers_curl(agent: Agent, booted: dict[str, Any], images: Images) -> None:
    status, body = curl(agent, "/v1/jobs", "--json", json.dumps({"action": "fetch"}))
    assert (status, json.loads(body)["error"]["code"]) == (400, "InvalidJob")
    document = {"action": "fetch", "image": {"id": images.root}}
    header = "X-Openstack-Request-Id: req-from-curl"
    status, body = curl(agent, "/v1/jobs", "-i", "-H", header, "--json", json.dumps(document))
    assert status == 202
    head, _, text = body.replace("\r\n", "\n").partition("\n\n")
    assert "x-openstack-request-id: req-from-curl" in head.lower()
    accepted = json.loads(text)
    assert accepted["request_id"] == "req-from-curl"
    status, body = curl(agent, f"/v1/jobs/{accepted['id']}/wait?timeout=20")
    assert (status, json.loads(body)["status"]) == (200, "DONE")
    for path, key in (
        ("/v1/jobs", "jobs"),
        ("/v1/images", "images"),
        ("/v1/instances", "instances"),
        ("/v1/cache", "entries"),
        ("/v1/status", "checks"),
        ("/healthz", "live"),
        ("/readyz", "checks"),
        ("/v1/openapi.json", "paths"),
    ):
        status, body = curl(agent, path)
        assert (status, key in json.loads(body)) == (200, True), path
    status, body = curl(agent, "/metrics")
    assert status == 200
    assert "# TYPE " in body
    status, body = curl(agent, "/v2/jobs")
    assert (status, json.loads(body)["error"]["code"]) == (404, "NotFound")
    status, body = curl(agent, f"/v1/images/{images.root}", "-X", "DELETE")
    assert (status, json.loads(body)["error"]["code"]) == (409, "BackendError")


def test_events_are_numbered_and_resumable(agent: Agent, booted: dict[str, Any]) -> None:
    path = f"/v1/events?job={booted['id']}&follow=false"
    status, body = curl(agent, path)
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in _split(body)]
    numbers = [int(event["id"]) for event in events]
    data = [json.loads(event["data"]) for event in events]

    assert status == 200
    assert numbers == sorted(set(numbers))
    assert {event["event"] for event in events} == {"job"}
    assert [item["seq"] for item in data] == numbers
    assert data[0]["status"] == "QUEUED"
    assert data[-1]["status"] == "ACTIVE"
    _, rest = curl(agent, path, "-H", f"Last-Event-ID: {numbers[1]}")
    assert _split(rest) == _split(body)[2:]
    assert (
        agent.json("job", "events", booted["id"], "--since", str(numbers[1]))["events"] == data[2:]
    )


def _split(body: str) -> list[str]:
    return [event for event in body.split("\n\n") if event.strip()]
