"""Booting from the command line, from a file or from flags."""

import contextlib
import json
import os
import pty
import re
import subprocess
import threading
from pathlib import Path

import pytest

from agent.listener import Listener
from agent.report import ErrorReport
from tests.api_server import listener, service, socket_path
from tests.cli_kit import ENVIRONMENT, FLAGS, JOB, PROGRAM, Cli, alone, cli, job_file
from tests.fake_service import FakeService
from tests.waiting import LIMIT_S, until

__all__ = ["cli", "job_file", "listener", "service", "socket_path"]


def test_boot_from_a_file_prints_the_result_and_nothing_else(cli: Cli, job_file: Path) -> None:
    result = cli("boot", "-f", str(job_file), "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["status"] == "ACTIVE"
    assert result.stderr == ""


def test_boot_from_flags(cli: Cli, service: FakeService) -> None:
    result = cli("boot", *FLAGS)
    assert result.exit_code == 0, result.output
    assert "ACTIVE" in result.stdout
    assert "web-1" in result.stdout


def test_boot_reads_a_job_from_standard_input(cli: Cli) -> None:
    assert cli("boot", "-f", "-", "--no-wait", stdin=JOB).exit_code == 0


def test_no_wait_prints_the_id(cli: Cli, service: FakeService) -> None:
    service.hold = True
    result = cli("boot", *FLAGS, "--no-wait")
    assert result.exit_code == 0
    assert result.stdout.strip() in service.all_jobs


def test_wait_that_times_out_exits_3_and_the_job_goes_on(cli: Cli, service: FakeService) -> None:
    service.hold = True
    result = cli("boot", *FLAGS, "--timeout", "0.1")
    assert result.exit_code == 3
    assert "still in BUILD (image_downloading)" in result.stderr
    assert result.stdout == ""
    (job_id,) = service.all_jobs
    assert job_id in result.stderr
    service.finish(job_id)
    assert cli("job", "wait", job_id).exit_code == 0


def test_the_same_key_boots_once(cli: Cli, service: FakeService) -> None:
    first = cli("boot", *FLAGS, "--idempotency-key", "k", "--format", "json")
    again = cli("boot", *FLAGS, "--idempotency-key", "k", "--format", "json")
    assert json.loads(first.stdout)["id"] == json.loads(again.stdout)["id"]
    other = cli("boot", *FLAGS[:-1], "web-2", "--idempotency-key", "k")
    assert other.exit_code == 1
    assert "IdempotencyConflict" in other.stderr


def test_failed_boot_exits_1_with_code_message_and_hint(cli: Cli, service: FakeService) -> None:
    service.failure = ErrorReport(code="ImageCorrupt", message="hash differs", hint="upload again")
    result = cli("boot", *FLAGS)
    assert result.exit_code == 1
    assert "ImageCorrupt: hash differs" in result.stderr
    assert "Hint: upload again" in result.stderr
    assert "ERROR" in result.stdout
    assert not re.search("hash differs|upload again", result.stdout)
    job_id = re.findall(r"^id +(.+)", result.stdout)[0]
    waited = cli("job", "wait", job_id)
    assert not re.search("hash differs|upload again", waited.stdout)
    assert "Hint: upload again" in waited.stderr
    shown = cli("job", "show", job_id).stdout
    assert re.findall(r"(?m)^(error|hint) +(.+)", shown) == [
        ("error", "ImageCorrupt: hash differs"),
        ("hint", "upload again"),
    ]
    document = cli("boot", *FLAGS, "--format", "json")
    assert document.exit_code == 1
    assert json.loads(document.stdout)["error"]["code"] == "ImageCorrupt"


def test_a_job_that_proves_invalid_exits_2(cli: Cli, service: FakeService) -> None:
    service.failure = ErrorReport(code="InvalidJob", message="no")
    assert cli("boot", *FLAGS).exit_code == 2


def test_unknown_field_exits_2_and_names_the_nearest(cli: Cli, job_file: Path) -> None:
    job_file.write_text(JOB.replace("flavor", "flavour"))
    result = cli("boot", "-f", str(job_file))
    assert result.exit_code == 2
    assert "did you mean flavor?" in result.stderr


@pytest.mark.parametrize("flavor", ["1x512", "axbxc", "1x512x", "1 x 512 x 1", "-1x512x1"])
def test_wrong_flavor_exits_2_with_an_example(flavor: str) -> None:
    result = alone("boot", "--image", "i", "--name", "n", "--flavor", flavor)
    assert result.exit_code == 2
    assert "2x2048x20" in result.stderr


@pytest.mark.parametrize(
    "args", [(), ("--image", "i"), ("--name", "n", "--flavor", "1x1x1"), ("-f", "-", "--name", "n")]
)
def test_boot_with_too_little_or_too_much_exits_2(args: tuple[str, ...]) -> None:
    assert alone("boot", *args).exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c\n", "line 1, column 5"),
        ("instance: {name: a}\ninstance: {name: b}\n", "line 2, column 1: instance stands here"),
        ("flavor: {vcpus: 1, vcpus: 2}\n", "line 1, column 20"),
        ("- a\n", "holds no job"),
        ("", "holds no job"),
        ("!!python/object/apply:os.system [id]\n", "line 1"),
        ("\x00", "not YAML"),
        ("a: &x [*x]\n", "line 1, column 8: *x: write it out"),
        ("a: &x [1]\n<<: *x\n", "line 2, column 5"),
        ("a: !!binary aGk=\n", "line 1, column 4"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_a_file_that_holds_no_job_exits_2_and_says_where(
    job_file: Path, text: str, words: str
) -> None:
    job_file.write_text(text)
    for command in (("boot", "-f"), ("job", "validate")):
        result = alone(*command, str(job_file))
        assert result.exit_code == 2
        assert words in result.stderr
        assert str(job_file) in result.stderr


@pytest.mark.parametrize("name", ["2020-01-01", "on", "no", "0777", "1e10"])
def test_text_without_quotes_stays_the_text_that_was_written(job_file: Path, name: str) -> None:
    job_file.write_text(
        JOB.replace("web-1", name) + "networks: [{bridge: b, mac: 52:54:00:12:34:56}]\n"
    )
    result = alone("job", "validate", str(job_file), "--format", "json")
    assert result.exit_code == 0, result.stderr
    job = json.loads(result.stdout)
    assert job["instance"]["name"] == name
    assert job["networks"][0]["mac"] == "52:54:00:12:34:56"


def test_boot_does_not_delete(job_file: Path) -> None:
    job_file.write_text("action: delete\ninstance: {name: web-1}\n")
    result = alone("boot", "-f", str(job_file))
    assert result.exit_code == 2
    assert "bootwright instance delete" in result.stderr


def test_validate_needs_no_agent(job_file: Path) -> None:
    assert alone("job", "validate", str(job_file)).exit_code == 0
    job_file.write_text(JOB + "deadline: 5\n")
    result = alone("job", "validate", str(job_file))
    assert result.exit_code == 2
    assert "did you mean deadline_s?" in result.stderr
    assert "Hint: the fields are in docs/job.md" in result.stderr
    assert "job validate" not in result.stderr


@pytest.mark.parametrize("command", [("job", "list"), ("job", "show", "{}"), ("job", "events")])
def test_what_may_be_copied_is_not_cut_to_the_width_of_the_terminal(
    cli: Cli, socket_path: Path, service: FakeService, command: tuple[str, ...]
) -> None:
    job_id = cli("boot", *FLAGS, "--no-wait").stdout.strip()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "--socket", str(socket_path), *(word.format(job_id) for word in command)],
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "40"},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    screen = bytearray()
    with contextlib.suppress(OSError):  # the other end is closed
        while True:
            screen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(LIMIT_S) == 0
    assert job_id in screen.decode()
    plain = re.sub(r"\x1b\[[0-9]*m", "", screen.decode())
    assert [line for line in plain.splitlines() if line.endswith(" ")] == []


def test_on_a_terminal_one_line_shows_phase_bytes_and_rate(
    listener: Listener, socket_path: Path, service: FakeService
) -> None:
    service.hold = True
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "--socket", str(socket_path), "boot", *FLAGS],
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    screen = bytearray()

    def read() -> None:
        while True:
            try:
                screen.extend(os.read(ours, 4096))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: b"1.0 MiB of 4.0 MiB" in screen)
    (job_id,) = service.all_jobs
    service.finish(job_id)
    stdout, _ = process.communicate(timeout=LIMIT_S)
    reader.join()
    os.close(ours)
    assert process.returncode == 0
    assert b"image_downloading" in screen
    assert b"1.0 MiB of 4.0 MiB" in screen
    assert b"ACTIVE" in stdout
    assert b"image_downloading" not in stdout
