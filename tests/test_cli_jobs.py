"""What the command line shows and changes of jobs and instances, and its tables."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from agent.listener import Listener
from tests.api_server import listener, service, socket_path
from tests.cli_kit import ENVIRONMENT, FLAGS, PROGRAM, Cli, cli
from tests.fake_service import FakeService

__all__ = ["cli", "listener", "service", "socket_path"]


def test_jobs_are_listed_shown_cancelled_and_their_events_told(
    cli: Cli, service: FakeService
) -> None:
    service.hold = True
    job_id = cli("boot", *FLAGS, "--no-wait").stdout.strip()
    assert job_id in cli("job", "list").stdout
    assert cli("job", "list", "--status", "active").stdout.count("\n") == 1
    assert json.loads(cli("--format", "json", "job", "show", job_id).stdout)["status"] == "BUILD"
    assert yaml.safe_load(cli("job", "show", job_id, "--format", "yaml").stdout)["id"] == job_id
    assert "image_downloading" in cli("job", "events", job_id).stdout
    assert cli("job", "cancel", job_id).exit_code == 0
    assert cli("job", "wait", job_id).exit_code == 1
    events = json.loads(cli("job", "events", "--format", "json").stdout)["events"]
    assert [event["status"] for event in events] == ["QUEUED", "BUILD", "CANCELLED"]


def test_a_console_that_moves_while_it_is_read_is_shown_whole_or_said_not_to_be(
    cli: Cli, service: FakeService
) -> None:
    cli("boot", *FLAGS)
    service.console_output = b"".join(b"line number %5d\n" % number for number in range(9))
    service.console_rotates = True
    shown = cli("instance", "console", "web-1")
    assert shown.stdout_bytes == service.console_output[18:]
    assert "the beginning is gone" in shown.stderr
    document = json.loads(cli("instance", "console", "web-1", "--format=json").stdout)
    assert document == {"console": shown.stdout, "complete": False}


def test_instances_are_shown_and_deleted(cli: Cli, service: FakeService) -> None:
    cli("boot", *FLAGS)
    assert "running" in cli("instance", "list").stdout
    assert json.loads(cli("instance", "show", "web-1", "--format=json").stdout)["name"] == "web-1"
    shown = cli("instance", "console", "web-1")
    assert (shown.stdout_bytes, shown.stderr) == (service.console_output, "")
    assert cli("instance", "delete", "web-1").exit_code == 0
    assert json.loads(cli("instance", "list", "--format=json").stdout) == {"instances": []}


@pytest.mark.parametrize("format_", ["table", "yaml", "json"])
def test_what_strangers_write_does_nothing_to_a_terminal(
    cli: Cli, service: FakeService, format_: str
) -> None:
    name = "a\x1b]0;b\x07\x9bc\u202ed\x7f\ufffd"
    assert cli("image", "fetch", "img-1").exit_code == 0
    service._images["img-1"] = service._images["img-1"].model_copy(update={"name": name})
    shown = cli("image", "list", "--format", format_)
    assert shown.exit_code == 0
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.stdout)
    if format_ != "table":
        assert yaml.safe_load(shown.stdout)["images"][0]["name"] == name
    else:
        assert r"a\x1b]0;b\x07\x9bc\u202ed\x7f" in shown.stdout


@pytest.mark.parametrize("args", [("job", "show"), ("job", "events"), ("image", "list")])
def test_no_line_of_a_table_on_a_pipe_is_filled_with_blanks(
    cli: Cli, args: tuple[str, ...]
) -> None:
    job_id = json.loads(cli("boot", *FLAGS, "--format=json").stdout)["id"]
    lines = cli(*args, *([] if "list" in args else [job_id])).stdout.splitlines()
    assert len({len(line) for line in lines}) > 1
    assert [line for line in lines if line != line.rstrip()] == []


def test_events_since_more_than_there_can_be_is_wrong_usage(cli: Cli) -> None:
    assert cli("job", "events", "--since", str(10**23)).exit_code == 2
    assert cli("job", "events", "--since", str(2**63 - 1)).exit_code == 0


def test_events_are_followed(listener: Listener, socket_path: Path, service: FakeService) -> None:
    with subprocess.Popen(
        [*PROGRAM, "--socket", str(socket_path), "job", "events", "-f"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        service.submit(
            {
                "instance": {"name": "web-1"},
                "image": {"id": "i"},
                "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
            },
            request_id="req-1",
        )
        assert process.stdout is not None
        assert "QUEUED" in process.stdout.readline()
        assert "ACTIVE" in process.stdout.readline()
        process.terminate()
