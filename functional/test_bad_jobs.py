"""Jobs that make no sense: one error code, what to do, and no trace."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from functional.harness.agent import Agent
from functional.refusal import _nothing_left, agent

__all__ = ["_nothing_left", "agent"]

# The job file


BAD_FILES: Final = {
    "not YAML": ("instance: {name: [", "line 1"),
    "no text": ("\x01\x02\udcff", "not YAML"),
    "empty": ("", "holds no job"),
    "a key twice": ("instance: {name: a}\ninstance: {name: b}\n", "instance stands here a second"),
    "a wrong type": (
        "{instance: {name: a}, image: {id: i}, flavor: {vcpus: many, ram: 1, disk: 1}}",
        "flavor.vcpus: should be a valid integer",
    ),
    "an unknown field": (
        "{instance: {name: a}, image: {id: i}, flavor: {vcpu: 1, ram: 1, disk: 1}}",
        "did you mean flavor.vcpus?",
    ),
    "too little": ("instance: {name: a}\n", "needs flavor and image"),
    "a path for an id": (
        "{instance: {name: a}, image: {id: ../../etc/passwd}, flavor: {vcpus: 1, ram: 1, disk: 1}}",
        "image.id",
    ),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_job_file_that_makes_no_sense(
    agent: Agent, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, errors="surrogateescape")

    for command in (("boot", "-f"), ("job", "validate")):
        done = agent.run(*command, path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "InvalidJob" in done.stderr
        assert words in done.stderr
        assert "\nHint: " in done.stderr
        assert "Traceback" not in done.stderr
    assert agent.json("job", "list")["jobs"] == []


def test_a_job_file_that_is_not_there(agent: Agent, tmp_path: Path) -> None:
    done = agent.run("boot", "-f", tmp_path / "job.yaml")

    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{tmp_path}/job.yaml': No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"version": 1, "version": 1}', "stands twice"),
        (b"[]", "not an object"),
        (b'{"instance": {"name": "\\ud800"}}', "instance.name"),
        (b'{"\\ud800": 1}', "not JSON"),
        (b'{"deadline_s": NaN}', "deadline_s"),
        (b'{"deadline_s": 1e999}', "deadline_s"),
        (b'{"version": 1%s}' % (b"0" * 5000), "not JSON"),
    ],
)
def test_a_request_that_makes_no_sense(agent: Agent, body: bytes, words: str) -> None:
    done = subprocess.run(
        [
            *("curl", "-sS", "--unix-socket", agent.socket, "-w", "\n%{http_code}"),
            *("--data-binary", "@-", "http://agent/v1/jobs"),
        ],
        input=body,
        capture_output=True,
        check=True,
    )

    answer, _, status = done.stdout.decode().rpartition("\n")
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == ("400", "InvalidJob")
    assert words in error["message"]
    assert error["hint"]
