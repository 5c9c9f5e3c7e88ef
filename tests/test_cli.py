"""The command line: its options, what its exit codes mean, and how it finds an agent."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.listener import Listener
from agent.views import Check
from tests.api_server import listener, service, socket_path
from tests.cli_kit import ENVIRONMENT, PROGRAM, Cli, alone, cli
from tests.fake_service import FakeService

__all__ = ["cli", "listener", "service", "socket_path"]


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


def test_global_options_stand_anywhere(cli: Cli) -> None:
    for args in (("--format", "json", "image", "list"), ("image", "--format", "json", "list")):
        assert json.loads(cli(*args).stdout) == {"images": []}
    assert cli("image", "list", "--format", "json").exit_code == 0


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
        env=ENVIRONMENT,
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


def test_version_does_not_load_what_it_does_not_need() -> None:
    code = (
        "import sys; from agent.cli import main\n"
        "try: main(['--help'.replace('help', 'version')])\n"
        "except BaseException: pass\n"
        "slow = {'httpx', 'pydantic', 'fastapi', 'oslo_config', 'rich', 'yaml'}\n"
        "sys.exit(bool(slow & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False)
    assert result.returncode == 0
