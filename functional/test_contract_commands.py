"""The contract of the command line: what is printed, and the exit codes."""

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from functional.conftest import Images
from functional.contract import agent, booted, curl
from functional.harness.agent import Agent
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd

__all__ = ["agent", "booted"]

NOBODY: Final = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"


# What is printed


DOCUMENTS: Final = {
    ("job", "list"): {"jobs"},
    ("job", "events"): {"events"},
    ("instance", "list"): {"instances"},
    ("instance", "show", "all-1"): {"uuid", "name", "state", "disks", "job_id", "image_id"},
    ("instance", "console", "all-1"): {"console"},
    ("image", "list"): {"images"},
    ("cache", "status"): {"directory", "entries", "disk_usage", "free_space", "fetching"},
    ("status",): {"version", "pid", "started_at", "jobs", "instances", "cache", "checks"},
    ("status", "--long"): {"version", "pid", "started_at", "jobs", "instances", "cache", "checks"},
    ("config", "show"): {"options"},
    ("config", "check"): {"warnings", "problems"},
    ("config", "sample"): {"sample"},
}


@pytest.mark.parametrize("arguments", DOCUMENTS, ids=" ".join)
def test_json_is_one_document_with_the_promised_fields(
    agent: Agent, booted: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    done = agent.run(*arguments, "--format", "json")

    assert done.returncode == 0, done.stderr
    assert DOCUMENTS[arguments] <= set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "arguments", [("job", "list"), ("instance", "show", "all-1"), ("config", "show")], ids=" ".join
)
def test_yaml_says_the_same_as_json_and_a_table_is_for_people(
    agent: Agent, booted: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    as_yaml = agent.run("--format", "yaml", *arguments)
    as_table = agent.run(*arguments)

    assert yaml.safe_load(as_yaml.stdout) == agent.json(*arguments)
    assert (as_yaml.returncode, as_table.returncode) == (0, 0)
    assert len(as_table.stdout.splitlines()) > 1
    assert not as_table.stdout.startswith(("{", "["))
    assert "\x1b" not in as_table.stdout


def test_an_image_of_the_cache_names_who_stands_on_it(
    agent: Agent, booted: dict[str, Any], images: Images
) -> None:
    shown = agent.json("image", "show", images.root)

    assert (shown["state"], shown["format"]) == ("cached", "raw")
    assert shown["path"] == str(agent.base(images.root))
    assert shown["instances"] == [booted["instance"]["uuid"]]
    done = agent.run("image", "remove", images.root)
    assert done.returncode == 1
    assert "all-1" in done.stderr
    assert agent.base(images.root).exists()
    assert agent.json("image", "show", images.disk_qcow2)["state"] == "available"


def test_images_are_added_only_where_they_come_from_a_directory(agent: Agent, guest: Guest) -> None:
    done = agent.run("image", "add", guest.disk, "--disk-format", "raw")

    assert (done.returncode, done.stdout) == (2, "")
    assert "Hint: upload the image there" in done.stderr


# Exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ("job", "show", NOBODY),
        ("job", "wait", NOBODY),
        ("job", "cancel", NOBODY),
        ("job", "events", NOBODY),
        ("instance", "show", "nobody"),
        ("instance", "console", "nobody"),
        ("instance", "delete", "nobody"),
        ("image", "show", NOBODY),
        ("image", "remove", NOBODY),
        ("image", "show", "../../etc/passwd"),
    ],
    ids=" ".join,
)
def test_what_does_not_exist_is_exit_4(agent: Agent, arguments: tuple[str, ...]) -> None:
    done = agent.run(*arguments)

    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bot",), "'boot'"),
        (("job", "cancle", "x"), "'cancel'"),
        (("image", "fetsh", "x"), "'fetch'"),
        (("boot", "--flavour", "1x1x1"), "--flavor"),
        (("--formt", "json", "status"), "--format"),
        (("status", "--format", "xml"), "json"),
        (("boot", "--image", "i"), "--flavor"),
        (("boot", "--image", "i", "--name", "n", "--flavor", "big"), "2x2048x20"),
        (("job", "show"), "ID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_exit_2_and_names_what_was_meant(
    agent: Agent, arguments: tuple[str, ...], words: str
) -> None:
    done = agent.run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.partition("Error: ")[2]


def test_without_an_agent_a_command_says_how_to_start_one(agent: Agent, tmp_path: Path) -> None:
    done = agent.run("--socket", tmp_path / "none", "status")

    assert (done.returncode, done.stdout) == (1, "")
    assert "systemctl start bootwright" in done.stderr


def test_an_absurd_configuration_is_exit_2(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "bootwright.conf"
    path.write_text("[DEFAULT]\nmax_concurrent_builds = 0\ninstance_path = /x\n")

    for command in (("config", "check"), ("agent",)):
        done = subprocess.run(
            [*agent.command()[:1], "--config-file", path, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert f"{path}: [DEFAULT] max_concurrent_builds = 0: must be" in done.stderr
    assert agent.run("config", "check").returncode == 0


def test_a_degraded_agent_is_exit_5(
    agent: Agent, booted: dict[str, Any], libvirtd: PrivateLibvirtd
) -> None:
    libvirtd.stop()
    try:
        done = agent.run("--format", "json", "status")
        ready, checks = curl(agent, "/readyz")
        alive, _ = curl(agent, "/healthz")
        shown = agent.json("instance", "show", "all-1")
    finally:
        libvirtd.start()

    assert done.returncode == 5
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["libvirt"]
    assert "is libvirtd running?" in done.stderr
    assert (ready, alive) == (503, 200)
    assert json.loads(checks)["checks"] == json.loads(done.stdout)["checks"]
    assert shown["state"] == "unknown"
    assert agent.run("status").returncode == 0
    assert curl(agent, "/readyz")[0] == 200
    assert agent.json("instance", "show", "all-1")["state"] == "running"
