"""The configuration, as the command line checks, shows and reads it again."""

import json
import os
from pathlib import Path

import pytest

from agent.commands import configuration
from agent.commands.command import Invocation
from agent.listener import Listener
from tests.api_server import listener, service, socket_path
from tests.cli_kit import alone

__all__ = ["listener", "service", "socket_path"]


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
    assert "the agent ends: the agent must not run as root" in result.stderr


def test_the_socket_is_found_through_the_configuration(
    listener: Listener, socket_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.conf"
    file.write_text(f"[api]\nsocket = {socket_path}\n")
    assert alone("--config-file", str(file), "status").exit_code == 0
