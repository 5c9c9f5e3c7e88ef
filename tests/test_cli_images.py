"""What the command line shows and changes of images."""

import json
import os
from pathlib import Path

import pytest

from tests.api_server import listener, service, socket_path
from tests.cli_kit import FLAGS, Cli, cli
from tests.fake_service import FakeService

__all__ = ["cli", "listener", "service", "socket_path"]


def test_images_are_fetched_shown_and_removed(cli: Cli) -> None:
    result = cli("image", "fetch", "img-1", "img-2", "--format", "json")
    assert [job["status"] for job in json.loads(result.stdout)["jobs"]] == ["DONE", "DONE"]
    assert "img-2" in cli("image", "list").stdout
    assert "1.0 GiB" in cli("image", "show", "img-1").stdout
    assert cli("image", "remove", "img-1").exit_code == 0
    assert cli("image", "show", "img-1").exit_code == 4
    assert "free" in cli("cache", "status").stdout


def test_a_refused_fetch_does_not_hide_the_jobs_before_it(cli: Cli, service: FakeService) -> None:
    result = cli("image", "fetch", "img-1", "not an id", "--format", "json")
    assert result.exit_code == 4
    (job,) = json.loads(result.stdout)["jobs"]
    assert job["id"] in service.all_jobs
    assert "NotFound" in result.stderr
    assert cli("image", "fetch", "not an id").stdout == ""


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
