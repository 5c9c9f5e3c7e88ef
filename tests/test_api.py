"""The API over a real socket, in front of an agent in memory."""

import json
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from agent.api import LARGEST_JOB, create_app, create_metrics_app
from agent.listener import Listener, ListenError, MetricsListener
from tests.api_server import http, listener, service, socket_path
from tests.fake_service import INSTANCE_UUID, FakeService
from tests.waiting import AT_ONCE_S, until

__all__ = ["http", "listener", "service", "socket_path"]

JOB = {
    "instance": {"name": "web-1"},
    "image": {"id": "img-1"},
    "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
}


def error_of(response: httpx.Response) -> dict[str, object]:
    error: dict[str, object] = response.json()["error"]
    assert set(error) == {"code", "message", "hint", "retriable"}
    return error


def test_job_is_accepted_and_found_again(http: httpx.Client) -> None:
    accepted = http.post("/v1/jobs", json=JOB)
    assert accepted.status_code == 202
    job_id = accepted.json()["id"]
    assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "ACTIVE"
    assert [job["id"] for job in http.get("/v1/jobs?status=ACTIVE").json()["jobs"]] == [job_id]
    assert http.get("/v1/jobs?status=ERROR").json() == {"jobs": []}


def test_request_id_of_the_caller_is_the_one_of_the_job_and_of_the_answer(
    http: httpx.Client,
) -> None:
    response = http.post("/v1/jobs", json=JOB, headers={"X-Openstack-Request-Id": "req-abc"})
    assert response.headers["X-Openstack-Request-Id"] == "req-abc"
    assert response.json()["request_id"] == "req-abc"


@pytest.mark.parametrize("given", ["", "nonsense", "req-a\tb", "req-" + "x" * 200])
def test_a_request_id_that_is_none_is_replaced(http: httpx.Client, given: str) -> None:
    response = http.get("/v1/status", headers={"X-Openstack-Request-Id": given})
    assert response.headers["X-Openstack-Request-Id"].startswith("req-")
    assert response.headers["X-Openstack-Request-Id"] != given


def test_same_key_same_body_is_the_same_job_and_another_body_is_refused(
    http: httpx.Client,
) -> None:
    first = http.post("/v1/jobs", json={**JOB, "idempotency_key": "k"})
    again = http.post("/v1/jobs", json={**JOB, "idempotency_key": "k"})
    assert again.json()["id"] == first.json()["id"]
    other = http.post("/v1/jobs", json={**JOB, "idempotency_key": "k", "deadline_s": 5})
    assert other.status_code == 409
    assert error_of(other)["code"] == "IdempotencyConflict"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"job"', b"null"])
def test_what_is_no_json_object_is_an_invalid_job(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/jobs", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "InvalidJob"


def test_unknown_field_names_the_nearest(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", json={**JOB, "flavour": {}})
    assert response.status_code == 400
    assert "did you mean flavor?" in str(error_of(response)["message"])


def test_a_body_too_large_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", content=b"x" * (LARGEST_JOB + 1))
    assert response.status_code == 413
    assert error_of(response)["code"] == "InvalidJob"


@pytest.mark.parametrize(
    "path", ["/v1/jobs/none", "/v1/jobs/%2E%2E", "/v1/images/a%20b", "/v1/instances/_", "/nowhere"]
)
def test_what_does_not_exist_is_not_found(http: httpx.Client, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "NotFound"


def test_wrong_query_is_an_invalid_request(http: httpx.Client) -> None:
    response = http.get("/v1/jobs?status=SLEEPING")
    assert response.status_code == 400
    assert "status" in str(error_of(response)["message"])


def test_a_defect_shows_no_traceback(http: httpx.Client, service: FakeService) -> None:
    service.defect = RuntimeError("secret detail")
    response = http.post("/v1/jobs", json=JOB)
    assert response.status_code == 500
    assert error_of(response)["code"] == "InternalError"
    assert "secret detail" not in response.text
    assert response.headers["X-Openstack-Request-Id"] in response.text


def test_wait_ends_when_the_job_does(http: httpx.Client, service: FakeService) -> None:
    service.hold = True
    job_id = http.post("/v1/jobs", json=JOB).json()["id"]
    assert http.get(f"/v1/jobs/{job_id}/wait?timeout=0").json()["status"] == "BUILD"
    timer = threading.Timer(0.2, service.finish, [job_id])
    timer.start()
    begun = time.monotonic()
    assert http.get(f"/v1/jobs/{job_id}/wait?timeout=30").json()["status"] == "ACTIVE"
    assert time.monotonic() - begun < AT_ONCE_S
    timer.join()


def test_many_waiters_keep_nobody_out(
    http: httpx.Client, service: FakeService, socket_path: Path
) -> None:
    service.hold = True
    job_id = http.post("/v1/jobs", json=JOB).json()["id"]

    def wait() -> str:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_path))) as client:
            answer = client.get(f"http://agent/v1/jobs/{job_id}/wait?timeout=30", timeout=60)
            return str(answer.json()["status"])

    with ThreadPoolExecutor(80) as pool:
        waiting = [pool.submit(wait) for _ in range(80)]
        until(lambda: service.waiting == len(waiting))
        assert http.get("/v1/status").status_code == 200
        assert not any(future.done() for future in waiting)
        service.finish(job_id)
        assert {future.result() for future in waiting} == {"ACTIVE"}


def events_of(lines: Iterator[str], count: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    while len(found) < count:
        line = next(lines)
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
    return found


def test_events_go_on_after_the_last_one_seen(http: httpx.Client, service: FakeService) -> None:
    first = http.post("/v1/jobs", json=JOB).json()["id"]
    with http.stream("GET", "/v1/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = events_of(response.iter_lines(), 2)
    assert [event["status"] for event in seen] == ["QUEUED", "ACTIVE"]
    http.post("/v1/jobs", json=JOB)
    with http.stream("GET", "/v1/events", headers={"Last-Event-ID": "2"}) as response:
        (third,) = events_of(response.iter_lines(), 1)
    assert third["seq"] == 3
    past = http.get(f"/v1/events?follow=false&job={first}").text
    assert past.count("event: job") == 2


def test_an_image_is_streamed_to_the_source(http: httpx.Client, service: FakeService) -> None:
    pieces = [b"a" * 100_000, b"b" * 300_000]
    query = "disk_format=raw&name=n&id=img-9&property=os=linux&property=k=v=w"
    response = http.post(f"/v1/images?{query}", content=iter(pieces))
    assert response.status_code == 201
    assert service.added["img-9"] == b"".join(pieces)
    assert response.json()["name"] == "raw n os=linux k=v=w"
    assert http.post("/v1/images?disk_format=raw&property=nonsense", content=b"").status_code == 400
    assert http.post("/v1/images", content=b"").status_code == 400


def test_images_are_fetched_listed_and_removed(http: httpx.Client) -> None:
    assert http.post("/v1/images/img-1/fetch").status_code == 202
    assert [entry["id"] for entry in http.get("/v1/images").json()["images"]] == ["img-1"]
    assert http.delete("/v1/images/img-1").status_code == 204
    assert http.get("/v1/images/img-1").status_code == 404


def test_instances_and_their_consoles(http: httpx.Client) -> None:
    http.post("/v1/jobs", json=JOB)
    assert http.get("/v1/instances/web-1").json()["state"] == "running"
    console = http.get("/v1/instances/web-1/console?offset=6")
    assert console.content.startswith(b"version")
    assert console.headers["content-type"].startswith("text/plain")
    assert (console.headers["etag"], console.headers["x-console-complete"]) == ('"0"', "true")
    assert http.delete("/v1/instances/web-1").status_code == 202
    assert http.get("/v1/instances").json() == {"instances": []}


def test_probes_and_schema(http: httpx.Client, service: FakeService) -> None:
    assert http.get("/healthz").json() == {"live": True}
    assert http.get("/readyz").status_code == 200
    service.checks = (*service.checks, service.checks[0].model_copy(update={"ok": False}))
    assert http.get("/readyz").status_code == 503
    assert b"python_info" in http.get("/metrics").content
    schema = http.get("/v1/openapi.json").json()
    assert "JobRequest" in schema["components"]["schemas"]
    assert "/v1/jobs/{job_id}/wait" in schema["paths"]


def test_the_schema_promises_the_errors_that_are_answered(http: httpx.Client) -> None:
    schema = http.get("/v1/openapi.json").json()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    answer = {"schema": {"$ref": "#/components/schemas/Answer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            content = operation["responses"]["default"]["content"]
            assert content["application/json"] == answer, path


@pytest.mark.parametrize(
    "query", ["events?follow=false&since={}", "instances/web-1/console?offset={}"]
)
def test_no_number_is_too_large_to_be_refused(http: httpx.Client, query: str) -> None:
    http.post("/v1/jobs", json=JOB)
    response = http.get("/v1/" + query.format(10**23))
    assert response.status_code == 400
    assert error_of(response)["code"] == "InvalidJob"
    assert http.get("/v1/" + query.format(2**63 - 1)).status_code == 200


def test_an_instance_is_asked_for_by_any_spelling_of_its_uuid(http: httpx.Client) -> None:
    response = http.get(f"/v1/instances/{INSTANCE_UUID.upper()}")
    assert response.status_code == 404
    assert INSTANCE_UUID in str(error_of(response)["message"])


def test_socket_is_for_owner_and_group_only(listener: Listener, socket_path: Path) -> None:
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o660
    assert [path.name for path in socket_path.parent.iterdir()] == [socket_path.name]


def test_socket_of_a_living_agent_is_not_taken(listener: Listener, socket_path: Path) -> None:
    with pytest.raises(ListenError, match="another agent"):
        Listener(create_app(FakeService()), socket_path).start()


def test_socket_of_a_dead_agent_is_replaced(service: FakeService, socket_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    with Listener(create_app(service), socket_path):
        transport = httpx.HTTPTransport(uds=str(socket_path))
        with httpx.Client(transport=transport) as client:
            assert client.get("http://agent/healthz").status_code == 200
    assert not socket_path.exists()


def test_where_nothing_can_be_made_the_error_says_so(service: FakeService, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="there is no directory"):
        Listener(create_app(service), tmp_path / "none" / "sock").start()
    with pytest.raises(ListenError, match="no group"):
        Listener(create_app(service), tmp_path / "sock", group="no-such-group").start()
    assert list(tmp_path.iterdir()) == []


def test_stop_does_not_wait_for_those_who_wait(service: FakeService, socket_path: Path) -> None:
    service.hold = True
    listener = Listener(create_app(service), socket_path)
    listener.start()
    transport = httpx.HTTPTransport(uds=str(socket_path))
    with httpx.Client(transport=transport, base_url="http://agent", timeout=20) as client:
        job_id = client.post("/v1/jobs", json=JOB).json()["id"]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get, f"/v1/jobs/{job_id}/wait?timeout=60")
            until(lambda: service.waiting)
            begun = time.monotonic()
            listener.stop()
            assert time.monotonic() - begun < AT_ONCE_S
            assert waiting.result().json()["status"] == "BUILD"


def test_metrics_listener_serves_nothing_else(service: FakeService) -> None:
    metrics = MetricsListener(create_metrics_app(service), ("127.0.0.1", 0))
    host, port = metrics.start()
    try:
        base = f"http://{host}:{port}"
        assert httpx.get(f"{base}/metrics").status_code == 200
        assert httpx.get(f"{base}/readyz").status_code == 200
        assert httpx.get(f"{base}/v1/jobs").status_code == 404
        assert httpx.get(f"{base}/v1/openapi.json").status_code == 404
    finally:
        metrics.stop()
