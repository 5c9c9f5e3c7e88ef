"""The privilege boundary for real: a process of the service user, and its helper."""

import json
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import privileges
from tests import service_user
from tests.waiting import AT_ONCE_S

PROGRAM = Path(__file__).with_name("privileged_process.py")
FOREIGN = "0d5e6b61602d758984b3bf038267614d6016eb2a"
QEMU_USER = "libvirt-qemu"
ALL_CAPABILITIES = "fowner,+dac_override,+sys_admin"


@pytest.fixture
def instances() -> Iterator[Path]:
    """An instances_path with one base, which libvirt has given to qemu."""
    service_user.require_root()
    owner = service_user.account()
    qemu = pwd.getpwnam(QEMU_USER)
    with service_user.directory() as path:
        cache = path / "_base"
        cache.mkdir()
        cache.chmod(0o711)
        os.chown(cache, owner.pw_uid, owner.pw_gid)
        base = cache / FOREIGN
        base.write_bytes(b"base")
        base.chmod(0o640)
        os.chown(base, qemu.pw_uid, qemu.pw_uid)
        os.utime(base, (1, 1))
        (path / "bootwright.conf").write_text("")
        yield path


def observe(
    instances: Path, scenario: str, *names: str, capability: str = "fowner"
) -> tuple[dict[str, Any], str]:
    """What the program printed, and what it logged."""
    finished = service_user.run(
        PROGRAM, scenario, instances, instances / "bootwright.conf", *names, capability=capability
    )
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stdout.splitlines()  # one process spoke, not two
    return json.loads(line), finished.stderr


def test_helper_touches_what_the_agent_cannot(instances: Path) -> None:
    base = instances / "_base" / FOREIGN
    result, log = observe(instances, "touch", FOREIGN)
    assert result["uid"] == service_user.account().pw_uid
    assert result["own_attempt"] == "PermissionError"
    assert result["refusals"] == {FOREIGN: ""}
    assert base.stat().st_mtime > 1
    assert base.owner() == QEMU_USER
    assert log == ""


def test_only_the_helper_holds_the_capability(instances: Path) -> None:
    result, _ = observe(instances, "touch")
    assert result["helper_holds"] == ["CAP_FOWNER"]
    assert len(result["holdings"]) == 3  # the main thread, the one that reads replies, a later one
    assert not any(result["holdings"].values())


def test_helper_refuses_everything_else(instances: Path) -> None:
    cache = instances / "_base"
    missing, link, directory = "1" * 40, "2" * 40, "3" * 40
    (cache / link).symlink_to(cache / FOREIGN)
    (cache / directory).mkdir()
    names = ["..", "/", f"/{FOREIGN}", f"../_base/{FOREIGN}", FOREIGN[1:], FOREIGN.upper()]
    result, _ = observe(instances, "touch", *names, missing, link, directory)
    assert result["refusals"] == dict.fromkeys(names, "ValueError") | {
        missing: "FileNotFoundError",
        link: "PermissionError",
        directory: "PermissionError",
    }
    assert result["not_a_string"] == ["TypeError"] * 3
    assert (cache / FOREIGN).stat().st_mtime == 1


def test_helper_does_not_follow_a_link_to_another_cache(instances: Path) -> None:
    cache = instances / "_base"
    cache.rename(instances / "elsewhere")
    cache.symlink_to("elsewhere")
    result, _ = observe(instances, "touch", FOREIGN)
    assert result["refusals"] == {FOREIGN: "NotADirectoryError"}
    assert (cache / FOREIGN).stat().st_mtime == 1


def test_dead_helper_is_noticed_and_never_replaced_through_sudo(instances: Path) -> None:
    result, _ = observe(instances, "die")
    assert result == {
        "early": False,
        "noticed": True,
        "calls": ["ConnectionError", "ConnectionError"],
        "children": [],
    }


def test_helpers_that_are_stopped_are_gone_and_leave_nothing_to_kill(instances: Path) -> None:
    result, log = observe(instances, "stop", capability=ALL_CAPABILITIES)
    assert result == {"started": 2, "left": [], "call": "ConnectionError"}
    assert "Traceback" not in log


def test_a_helper_that_hangs_is_not_waited_for(instances: Path) -> None:
    result, _ = observe(instances, "hung")
    assert 0.2 <= result["took_s"] < AT_ONCE_S


def test_helper_survives_what_the_terminal_sends_to_the_agent(instances: Path) -> None:
    result, _ = observe(instances, "interrupted")
    assert result == {"after": "", "blocked_here": []}


def test_thread_that_kept_a_capability_stops_the_agent(instances: Path) -> None:
    result, _ = observe(instances, "early_thread")
    assert "still holds CAP_FOWNER" in result["error"]


def test_without_the_capability_the_agent_runs_and_says_what_is_missing(instances: Path) -> None:
    result, log = observe(instances, "touch", FOREIGN, capability="")
    assert result["refusals"] == {FOREIGN: "PermissionError"}
    assert result["helper_holds"] == []
    assert "WARNING agent.privileges started without CAP_FOWNER" in log


def test_each_helper_holds_what_is_its_own_and_the_agent_nothing(instances: Path) -> None:
    result, log = observe(instances, "both", capability=ALL_CAPABILITIES)
    assert result["helpers"] == [
        ["CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SYS_ADMIN"],
        ["CAP_FOWNER"],
    ]
    assert not any(result["holdings"].values())
    assert (result["touched"], result["volume_error"]) == ("", "ValueError")
    assert result["alive"] == [True, False]
    assert log == ""


def test_helper_for_volumes_does_not_start_without_its_capabilities(instances: Path) -> None:
    result, _ = observe(instances, "both")
    assert "without CAP_DAC_OVERRIDE, CAP_SYS_ADMIN" in result["error"]
    assert "docs/operations.md" in result["error"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("user = root", "set helper_command as well, or remove them"),
        ("thread_pool_size = many", "thread_pool_size"),
        ("capabilities = CAP_EVERYTHING", "capabilities"),
        ("helper_command = /bin/false", "the privileged helper did not start"),
        ("helper_command = /nonexistent", "the privileged helper did not start"),
    ],
)
def test_wrong_section_stops_the_start_with_a_sentence(
    instances: Path, section: str, message: str
) -> None:
    (instances / "bootwright.conf").write_text(f"[privsep_base_owner]\n{section}\n")
    result, _ = observe(instances, "start")
    assert message in result["error"]


def test_helper_command_starts_a_helper_that_reads_the_configuration_itself(
    instances: Path,
) -> None:
    configuration = instances / "bootwright.conf"
    command = f"/mnt/environment/bin/privsep-helper --config-file {configuration}"
    configuration.write_text(
        f"[DEFAULT]\ninstances_path = {instances}\n"
        f"[privsep_base_owner]\nhelper_command = {command}\ncapabilities =\n"
    )
    base = instances / "_base" / FOREIGN
    owner = service_user.account()
    os.chown(base, owner.pw_uid, owner.pw_gid)  # this helper can have no capability either
    result, _ = observe(instances, "start", capability="")
    assert result["touched"]
    assert base.stat().st_mtime > 1
    assert not any(result["holdings"].values())


def test_the_agent_serves_where_the_command_line_says(instances: Path) -> None:
    (instances / "bootwright.conf").write_text(
        f"[DEFAULT]\nstate_path = {instances}/state\n[libvirt]\nconnection_uri = test:///default\n"
        f"[images]\nsource = directory\ndirectory = {instances}/images\n"
        f"[api]\nsocket = {instances}/configured.sock\n"
    )
    result, _ = observe(instances, "serve", "/nonexistent/agent.sock")
    assert result["exit_code"] == 1
    assert "cannot serve on /nonexistent/agent.sock: there is no directory" in result["error"]


def test_agent_refuses_to_be_root() -> None:
    if os.getuid() != 0:
        privileges.refuse_root()
        return
    with pytest.raises(privileges.PrivilegesNotDropped, match="systemctl start bootwright"):
        privileges.start_helpers()


def test_capabilities_are_read_from_all_sets_but_the_bounding_one() -> None:
    status = (
        "Name:\tpython3\nCapInh:\t0000000000000001\nCapPrm:\t0000000000000008\n"
        "CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nCapAmb:\t8000000000000000\n"
    )
    assert privileges.held_capabilities(status) == ["CAP_CHOWN", "CAP_FOWNER", "capability 63"]
