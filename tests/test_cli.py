"""The command line: against an agent in memory, behind a real socket."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli import main
from agent.commands import configuration
from agent.commands.command import Invocation
from agent.listener import Listener
from agent.report import ErrorReport
from agent.views import Check
from tests.api_server import listener, service, socket_path
from tests.fake_service import FakeService

__all__ = ["listener", "service", "socket_path"]

Cli = Callable[..., Result]

JOB = """
instance: {name: web-1}
image: {id: img-1}
flavor: {vcpus: 1, ram: 512, disk: 1}
"""
PROGRAM = (sys.executable, "-c", "from agent.cli import main; main()")
FLAGS = ("--image", "img-1", "--flavor", "1x512x1", "--name", "web-1")


@pytest.fixture
def cli(listener: Listener, socket_path: Path) -> Cli:
    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, ["--socket", str(socket_path), *args], input=stdin)

    return run


def alone(*args: str) -> Result:
    """A command without any agent."""
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


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


@pytest.mark.parametrize(
    "args",
    [
        ("job", "show", "none"),
        ("job", "wait", "none"),
        ("job", "cancel", "none"),
        ("job", "show", ".."),
        ("job", "show", "a/b?c"),
        ("instance", "show", "none"),
        ("instance", "delete", "none"),
        ("instance", "console", "none"),
        ("image", "show", "none"),
        ("image", "remove", "none"),
        ("image", "why", "none"),
        ("image", "pin", "none"),
        ("image", "unpin", "none"),
        ("image", "verify", "none"),
    ],
)
def test_no_such_thing_exits_4(cli: Cli, args: tuple[str, ...]) -> None:
    result = cli(*args)
    assert result.exit_code == 4, result.output
    assert "NotFound" in result.stderr


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


def test_images_are_fetched_shown_and_removed(cli: Cli) -> None:
    result = cli("image", "fetch", "img-1", "img-2", "--format", "json")
    assert [job["status"] for job in json.loads(result.stdout)["jobs"]] == ["DONE", "DONE"]
    assert "img-2" in cli("image", "list").stdout
    assert "1.0 GiB" in cli("image", "show", "img-1").stdout
    assert cli("image", "remove", "img-1").exit_code == 0
    assert cli("image", "show", "img-1").exit_code == 4
    assert "free" in cli("cache", "status").stdout


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


def test_a_refused_fetch_does_not_hide_the_jobs_before_it(cli: Cli, service: FakeService) -> None:
    result = cli("image", "fetch", "img-1", "not an id", "--format", "json")
    assert result.exit_code == 4
    (job,) = json.loads(result.stdout)["jobs"]
    assert job["id"] in service.all_jobs
    assert "NotFound" in result.stderr
    assert cli("image", "fetch", "not an id").stdout == ""


def test_global_options_stand_anywhere(cli: Cli) -> None:
    for args in (("--format", "json", "image", "list"), ("image", "--format", "json", "list")):
        assert json.loads(cli(*args).stdout) == {"images": []}
    assert cli("image", "list", "--format", "json").exit_code == 0


def test_events_since_more_than_there_can_be_is_wrong_usage(cli: Cli) -> None:
    assert cli("job", "events", "--since", str(10**23)).exit_code == 2
    assert cli("job", "events", "--since", str(2**63 - 1)).exit_code == 0


def test_an_image_is_pinned_and_gc_tells_first_what_it_does(cli: Cli) -> None:
    cli("image", "fetch", "img-1", "img-2")
    assert cli("image", "pin", "img-1", "--for", "7d").exit_code == 0
    assert "pinned" in cli("image", "show", "img-1").stdout
    assert "keeps it" in cli("image", "why", "img-1").stdout
    told = json.loads(cli("cache", "gc", "--dry-run", "--format", "json").stdout)
    assert {d["image_id"]: d["remove"] for d in told["decisions"]} == {
        "img-1": False,
        "img-2": True,
    }
    assert cli("image", "show", "img-2").exit_code == 0
    assert "removed" in cli("cache", "gc").stdout
    assert cli("image", "show", "img-2").exit_code == 4
    assert cli("image", "unpin", "img-1").exit_code == 0
    assert "removes it" in cli("image", "why", "img-1").stdout


@pytest.mark.parametrize("given", ["7", "d", "0s", "-1d", "7y", "1e9d", "99999999w"])
def test_a_time_that_is_none_is_wrong_usage(cli: Cli, given: str) -> None:
    result = cli("image", "pin", "img-1", f"--for={given}")
    assert result.exit_code == 2
    assert "7d" in result.stderr


def test_verify_reads_all_images_and_fails_if_one_is_damaged(
    cli: Cli, service: FakeService
) -> None:
    cli("image", "fetch", "img-1", "img-2")
    assert cli("image", "verify").exit_code == 0
    service.damaged.add("img-2")
    assert cli("image", "verify", "img-1").exit_code == 0
    result = cli("image", "verify", "--format", "json")
    assert result.exit_code == 1
    assert [v["soundness"] for v in json.loads(result.stdout)["images"]] == ["intact", "damaged"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("job events", "events [OPTIONS] [ID]"),
        ("job wait", "for ever if not given"),
        ("boot", "for ever if not given"),
        ("boot", "Wait for the end (the default)"),
        ("image fetch", "for ever if not given"),
        ("image fetch", "Wait for the end (the default)"),
        ("image remove", "stays in Glance or in the local directory"),
    ],
)
def test_help_tells_what_happens_without_and_besides(command: str, words: str) -> None:
    shown = alone(*command.split(), "--help")
    assert words in " ".join(shown.stdout.split())


def test_an_image_in_use_stays(cli: Cli) -> None:
    cli("boot", *FLAGS)
    result = cli("image", "remove", "img-1")
    assert result.exit_code == 1
    assert "Hint: delete the instance first" in result.stderr


def test_a_file_becomes_an_image(cli: Cli, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(os.urandom(3 << 20))
    options = ("--disk-format", "raw", "--name", "n", "--property", "a=b", "--id", "img-7")
    result = cli("image", "add", str(file), *options)
    assert result.stdout == "img-7\n"
    assert service.added["img-7"] == file.read_bytes()


def test_status_exits_5_when_degraded(cli: Cli, service: FakeService) -> None:
    assert cli("status").exit_code == 0
    assert "1.2.3" in cli("status", "--long").stdout
    service.checks = (Check(name="libvirt", ok=False, message="away", hint="start it"),)
    result = cli("status", "--format", "json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["checks"][0]["ok"] is False
    assert json.loads(result.stdout)["degraded"] is True
    assert "libvirt: away (start it)" in result.stderr


def test_no_certificate_authorities_are_looked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert cli("status").exit_code == 0


def test_without_an_agent_the_sentence_says_what_to_do(tmp_path: Path) -> None:
    result = alone("--socket", str(tmp_path / "none"), "status")
    assert result.exit_code == 1
    assert "systemctl start bootwright" in result.stderr


def test_a_dead_agent_is_told_from_one_never_started(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    result = alone("job", "list", "--socket", str(path))
    assert result.exit_code == 1
    assert "is gone" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_permission_denied_names_the_group(listener: Listener, socket_path: Path) -> None:
    for directory in [socket_path.parent, *socket_path.parent.parents][:-2]:
        directory.chmod(directory.stat().st_mode | 0o055)
    socket_path.parent.chmod(0o700)
    result = subprocess.run(
        [*PROGRAM, "--socket", str(socket_path), "status"],
        user=65534,
        group=65534,
        extra_groups=[],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "permission denied" in result.stderr
    assert "group" in result.stderr


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (("statsu",), "status"),
        (("job", "lst"), "list"),
        (("instance", "remove"), None),
        (("boot", "--flavour", "x"), "--flavor"),
        (("image", "add", "f", "--dsk-format", "x"), "--disk-format"),
    ],
)
def test_unknown_command_or_option_exits_2_and_names_the_nearest(
    args: tuple[str, ...], near: str | None
) -> None:
    result = alone(*args)
    assert result.exit_code == 2
    if near is not None:
        assert re.search(rf"Did you mean .*{near}", result.stderr), result.stderr


def test_config_check_and_show(tmp_path: Path) -> None:
    file = tmp_path / "c.conf"
    file.write_text("[images]\nsource = directory\n[DEFAULT]\nmax_concurent_builds = 3\n")
    result = alone("config", "check", "--config-file", str(file))
    assert result.exit_code == 0
    assert "did you mean max_concurrent_builds?" in result.stderr
    shown = json.loads(alone("--config-file", str(file), "config", "show", "--format=json").stdout)
    (source,) = (o for o in shown["options"] if (o["section"], o["name"]) == ("images", "source"))
    assert (source["value"], source["origin"]) == ("directory", str(file))
    file.write_text("[DEFAULT]\nmax_concurrent_builds = 0\n")
    result = alone("config", "check", "--config-file", str(file))
    assert result.exit_code == 2
    assert f"{file}: [DEFAULT] max_concurrent_builds = 0" in result.stderr
    assert alone("agent", "--config-file", str(file)).exit_code == 2


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("c.conf", "[glance] auth_type = v3applicationcredential"),
        ("none.conf", "no such configuration file"),
        ("\0", "embedded null byte"),  # nobody expects that
    ],
)
def test_a_configuration_that_cannot_be_read_again_does_not_end_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, words: str
) -> None:
    (tmp_path / "c.conf").write_text(
        "[glance]\nauth_type = v3applicationcredential\nauth_url = http://k\n"
        "application_credential_id = a\n"
    )
    configuration._reload(Invocation(config_file=(str(tmp_path / file),)))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert words in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="the agent refuses to start as root only")
def test_an_agent_that_cannot_start_says_so_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "c.conf"
    file.write_text("[images]\nsource = directory\n")
    result = alone("agent", "--config-file", str(file))
    assert result.exit_code == 1
    assert "the agent ends: the agent does not run as root" in result.stderr


def test_the_socket_is_found_through_the_configuration(
    listener: Listener, socket_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.conf"
    file.write_text(f"[api]\nsocket = {socket_path}\n")
    assert alone("--config-file", str(file), "status").exit_code == 0


def test_events_are_followed(listener: Listener, socket_path: Path, service: FakeService) -> None:
    with subprocess.Popen(
        [*PROGRAM, "--socket", str(socket_path), "job", "events", "-f"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
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


def test_on_a_terminal_one_line_shows_phase_bytes_and_rate(
    listener: Listener, socket_path: Path, service: FakeService
) -> None:
    service.hold = True
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "--socket", str(socket_path), "boot", *FLAGS],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm"},
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
    end = time.monotonic() + 20
    while b"1.0 MiB of 4.0 MiB" not in screen and time.monotonic() < end:
        time.sleep(0.05)
    (job_id,) = service.all_jobs
    service.finish(job_id)
    stdout, _ = process.communicate(timeout=20)
    reader.join()
    os.close(ours)
    assert process.returncode == 0
    assert b"image_downloading" in screen
    assert b"1.0 MiB of 4.0 MiB" in screen
    assert b"ACTIVE" in stdout
    assert b"image_downloading" not in stdout


def test_version_does_not_load_what_it_does_not_need() -> None:
    code = (
        "import sys; from agent.cli import main\n"
        "try: main(['--help'.replace('help', 'version')])\n"
        "except BaseException: pass\n"
        "slow = {'httpx', 'pydantic', 'fastapi', 'oslo_config', 'rich', 'yaml'}\n"
        "sys.exit(bool(slow & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == 0
