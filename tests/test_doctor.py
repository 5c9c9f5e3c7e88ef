"""The doctor: what it finds on a host that is well, and on one that is not."""

import dataclasses
import json
import os
import pwd
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from oslo_config import cfg

from agent import claims, doctor
from agent.checks import filesystem, host, ok, outside
from agent.cli import main
from agent.commands import doctor as doctor_command
from agent.config import Configuration
from agent.directory import DirectorySource
from agent.disk import DiskType, Link
from agent.files import write_durably
from agent.job import ImagesType
from agent.listener import Listener
from agent.settings import Settings, VolumeSettings
from agent.views import Check, Finding, Result
from tests.api_server import listener, service, socket_path
from tests.cache_kit import CacheKit, Source, random_bytes
from tests.fake_glance import FakeGlance, Fault, fake_glance
from tests.fake_service import FakeService
from tests.waiting import AT_ONCE_S, LIMIT_S

__all__ = ["listener", "service", "socket_path"]


@pytest.fixture
def glance() -> Iterator[FakeGlance]:
    with fake_glance() as glance:
        yield glance


Configure = Callable[..., Configuration]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Return a function that writes and reads a configuration of a host in `tmp_path`."""
    for name in ("instances", "state", "run", "images"):
        (tmp_path / name).mkdir(mode=0o755)

    def configure(text: str = "[images]\nsource = directory\n") -> Configuration:
        path = tmp_path / "bootwright.conf"
        path.write_text(
            f"[DEFAULT]\ninstances_path = {tmp_path}/instances\nstate_path = {tmp_path}/state\n"
            f"[api]\nsocket = {tmp_path}/run/s\n[images]\ndirectory = {tmp_path}/images\n{text}"
        )
        return Configuration([str(path)], conf=cfg.ConfigOpts())

    return configure


@pytest.fixture
def settings(configure: Configure) -> Settings:
    return configure().settings()


def results(found: Iterable[Finding]) -> list[tuple[str, Result]]:
    return [(finding.name, finding.result) for finding in found]


def only(found: Iterable[Finding], result: Result) -> Finding:
    """The one finding with that result; it has a hint if it is no good news."""
    (finding,) = [finding for finding in found if finding.result is result]
    assert bool(finding.hint) is (result is not Result.OK)
    return finding


# The doctor


def test_a_check_that_hangs_fails_or_is_broken_keeps_no_other_from_being_told(
    configure: Configure,
) -> None:
    stop = threading.Event()

    def hangs(_: Settings) -> Iterator[Finding]:
        yield ok("first", "told before it hangs")
        stop.wait(LIMIT_S)

    def refused(_: Settings) -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/x")

    def broken(_: Settings) -> list[Finding]:
        raise KeyError("x")

    def well(_: Settings) -> Iterator[Finding]:
        yield ok("well", "")

    began = time.monotonic()
    found = doctor.examine(configure, checks=(hangs, refused, broken, well), limit_s=0.3)
    stop.set()

    assert time.monotonic() - began < AT_ONCE_S
    assert results(found) == [
        ("configuration", Result.OK),
        ("first", Result.OK),
        ("hangs", Result.ERROR),
        ("refused", Result.ERROR),
        ("broken", Result.WARNING),
        ("well", Result.OK),
    ]


def test_a_configuration_that_cannot_be_used_is_all_that_is_told(configure: Configure) -> None:
    found = doctor.examine(
        lambda: configure("[image_cache]\nmax_size = -1\nhigh_watermark = 0\n[api]\nsocket = x\n")
    )
    assert results(found) == [("configuration", Result.ERROR)] * 3
    assert "max_size = -1" in found[0].message + found[1].message + found[2].message


def test_an_unknown_option_is_a_warning(configure: Configure) -> None:
    found = doctor.examine(
        lambda: configure("[images]\nsource = directory\nsorce = x\n"), checks=()
    )
    assert "did you mean source?" in only(found, Result.WARNING).message


def test_a_user_that_does_not_exist_is_an_error() -> None:
    assert doctor.become("nobody-of-that-name").result is Result.ERROR


def test_a_stranger_is_sent_away_and_not_told_to_open_what_is_shut() -> None:
    own = os.geteuid()
    if own == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        result = CliRunner().invoke(doctor_command.doctor, ["--user", "root"])
    finally:
        os.seteuid(own)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "run it as root" in result.stderr


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["doctor", *arguments])
    return result.exit_code, result.stdout


def test_json_and_yaml_say_the_same_and_an_error_is_exit_5(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.conf")
    arguments = ("--config-file", missing, "--user", "nobody-of-that-name")
    code, text = run(*arguments, "--format", "json")
    document = json.loads(text)
    assert code == 5
    assert document["degraded"] is True
    assert [check["name"] for check in document["checks"]] == ["user", "configuration"]
    assert all(set(check) == {"name", "result", "message", "hint"} for check in document["checks"])
    assert yaml.safe_load(run(*arguments, "--format", "yaml")[1]) == document
    code, table = run(*arguments)
    assert code == 5
    assert "no such configuration file" in table


# The host


UNIT = """\
User=bootwright
LoadState=loaded
ActiveState=active
AmbientCapabilities=cap_fowner
ProtectSystem=strict
ReadWritePaths=
"""


def test_a_unit_that_lets_the_agent_do_its_work_is_well(settings: Settings) -> None:
    shipped = dataclasses.replace(
        settings,
        instances_path=Path("/var/lib/bootwright/instances"),
        state_path=Path("/var/lib/bootwright"),
        api=dataclasses.replace(settings.api, socket=Path("/run/bootwright/bootwright.sock")),
    )
    only(host.judge_unit(UNIT, shipped), Result.OK)
    elsewhere = dataclasses.replace(shipped, instances_path=Path("/srv/vms/instances"))
    found = only(host.judge_unit(UNIT, elsewhere), Result.ERROR)
    assert "ReadWritePaths=/srv/vms/instances" in found.hint
    more = UNIT.replace("ReadWritePaths=\n", "ReadWritePaths=-/srv/vms /x\n")
    assert results(host.judge_unit(more, elsewhere)) == [("unit", Result.OK)]
    ended = UNIT.replace("ActiveState=active", "ActiveState=failed")
    assert "is failed" in only(host.judge_unit(ended, shipped), Result.WARNING).message
    powerless = UNIT.replace("cap_fowner", "")
    assert "CAP_FOWNER" in only(host.judge_unit(powerless, shipped), Result.WARNING).message
    missing = UNIT.replace("LoadState=loaded", "LoadState=not-found")
    assert results(host.judge_unit(missing, shipped)) == [("unit", Result.WARNING)]


def test_a_unit_that_cannot_do_logical_volumes_is_told_of(settings: Settings) -> None:
    group = VolumeSettings(group="vg", thin=False, clear="zero", clear_size=None)
    with_volumes = dataclasses.replace(settings, volumes=group)
    unprotected = UNIT.replace("ProtectSystem=strict\n", "")
    found = only(host.judge_unit(unprotected, with_volumes), Result.ERROR)
    assert "bootwright-lvm.conf" in found.hint
    more = unprotected.replace("cap_fowner", "cap_dac_override cap_fowner cap_sys_admin")
    assert results(host.judge_unit(more, with_volumes)) == [("unit", Result.OK)]


@pytest.mark.parametrize("check", [host.capabilities, host.kernel, host.clock, host.programs])
def test_what_is_read_from_this_host_can_be_read(check: doctor.Check, settings: Settings) -> None:
    found = list(check(settings))
    assert found
    assert all(finding.message for finding in found)


# Directories


def test_directories_of_ours_are_well(settings: Settings, tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 1)
    found = list(filesystem.directories(settings))
    assert {finding.result for finding in found} == {Result.OK}
    assert {finding.name for finding in found} >= {"instances_path", "image cache", "images"}


def test_a_closed_directory_above_the_disks_is_found(settings: Settings) -> None:
    settings.instances_path.chmod(0o700)
    found = [f for f in filesystem.directories(settings) if f.name == "way to the disks"]
    assert f"chmod o+x {settings.instances_path}" == only(found, Result.ERROR).hint


@pytest.mark.parametrize("how", ["link", "file", "for everybody", "missing"])
def test_a_directory_that_is_none_of_ours_is_found(
    how: str, settings: Settings, tmp_path: Path
) -> None:
    path = settings.state_path
    if how == "for everybody":
        path.chmod(0o777)
    else:
        path.rmdir()
    if how == "link":
        path.symlink_to(tmp_path)
    elif how == "file":
        path.touch()
    state = [f for f in filesystem.directories(settings) if f.name == "state_path"]
    only(state, Result.OK if how == "missing" else Result.ERROR)


def test_space_is_judged_by_what_the_cache_leaves_free(settings: Settings) -> None:
    def judged(high_watermark: int, reserved: int = 0) -> list[tuple[str, Result]]:
        cache = dataclasses.replace(
            settings.image_cache, high_watermark=high_watermark, reserved_free_space=reserved
        )
        return results(filesystem.space(dataclasses.replace(settings, image_cache=cache)))

    assert judged(100) == [("cache space", Result.OK), ("state space", Result.OK)]
    assert judged(0)[0] == ("cache space", Result.WARNING)
    assert judged(100, reserved=1 << 60)[0] == ("cache space", Result.ERROR)


def test_a_file_system_is_tried_and_nothing_is_left(settings: Settings) -> None:
    found = list(filesystem.features(settings))
    kind = filesystem.file_system_of(settings.instances_path)
    assert found[0].message.startswith(f"{kind}: ")
    assert list(settings.instances_path.iterdir()) == []


def test_procfs_is_told_apart_from_the_root() -> None:
    assert filesystem.file_system_of(Path("/proc")) == "proc"


def test_full_copies_are_a_warning_only_where_they_are_made(settings: Settings) -> None:
    raw = dataclasses.replace(
        settings,
        libvirt=dataclasses.replace(
            settings.libvirt,
            images_type=ImagesType.RAW,
            cache_modes=dict.fromkeys(DiskType, "writeback"),
        ),
    )
    shares = "no reflinks" not in next(iter(filesystem.features(raw))).message
    copies = [f for f in filesystem.features(raw) if "full copy" in f.message]
    assert bool(copies) is not shares
    assert not [f for f in filesystem.features(settings) if "full copy" in f.message]


def test_a_record_that_keeps_every_base_is_found(settings: Settings) -> None:
    only(filesystem.records(settings), Result.OK)
    directory = settings.instances_path / "7e0f2b7c-6a35-4a55-9f3e-6f0b8f0d1a11"
    directory.mkdir()
    (directory / "instance.json").write_text("{")
    found = only(filesystem.records(settings), Result.ERROR)
    assert str(directory) in found.message


def test_a_disk_whose_base_is_gone_is_found(settings: Settings, tmp_path: Path) -> None:
    kit = CacheKit(directory=settings.instances_path, source=Source())
    base = kit.fetch(kit.source.add(random_bytes(1)))
    record = kit.add_instance(base)
    [disk] = record.disks
    link = Link(path=base.path, format="raw")
    kit.instances.write(
        dataclasses.replace(record, disks=(dataclasses.replace(disk, backing_chain=(link,)),))
    )
    only(filesystem.records(settings), Result.OK)
    base.path.unlink()
    found = only(filesystem.records(settings), Result.ERROR)
    assert f"{base.path}, on which instance web-1 stands, is not there" in found.message
    assert f"bootwright image fetch {base.image.id}" in found.hint


def test_a_cloned_host_id_and_a_broken_claim_are_found(settings: Settings) -> None:
    directory = settings.image_cache.directory / ".hosts"
    directory.mkdir(parents=True)
    mine = claims.HostClaims(
        host_id=settings.image_cache.host_id,
        hostname=os.uname().nodename,
        written_at=0.0,
        bases=frozenset(),
    )
    path = directory / f"{mine.host_id}.json"
    write_durably(path, mine.model_dump_json().encode())
    assert os.uname().nodename in only(filesystem.hosts(settings), Result.OK).message
    clone = mine.model_copy(update={"hostname": "the-other"})
    write_durably(path, clone.model_dump_json().encode())
    assert "the-other" in only(filesystem.hosts(settings), Result.WARNING).message
    (directory / "third.json").write_text("{")
    assert "third" in only(filesystem.hosts(settings), Result.ERROR).message


# Outside


def at(glance: FakeGlance, configure: Configure, *more: str) -> Settings:
    urls = ",".join((glance.url, *more))
    return configure(
        f"[glance]\nauth_type = none\nendpoint_override = {urls}\ntimeout = 5\n"
    ).settings()


def test_a_glance_that_answers_is_well(glance: FakeGlance, configure: Configure) -> None:
    only(outside.images(at(glance, configure)), Result.OK)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=401), "401"),
        (Fault(status=404), "there is no image API"),
        (Fault(status=503), "503"),
        (Fault(status=200), "not one of Glance's image API"),
        (Fault(status=200, body=b"{}", content_type="application/json"), "not one of Glance's"),
        (Fault(refuse=True), "reset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_glance_that_does_not_serve_us_is_an_error(
    glance: FakeGlance, configure: Configure, fault: Fault, words: str
) -> None:
    glance.list_fault = fault
    assert words in only(outside.images(at(glance, configure)), Result.ERROR).message


def test_one_endpoint_of_two_is_enough_to_work_with(
    glance: FakeGlance, configure: Configure
) -> None:
    found = list(outside.images(at(glance, configure, "http://127.0.0.1:1")))
    only(found, Result.OK)
    assert "127.0.0.1:1" in only(found, Result.WARNING).message


def test_a_clock_that_is_not_glances_is_told(glance: FakeGlance, configure: Configure) -> None:
    glance.ahead_s = 600
    found = only(outside.images(at(glance, configure)), Result.WARNING)
    assert "s ahead of this host" in found.message


def test_the_local_images_are_counted(settings: Settings) -> None:
    empty = only(outside.images(settings), Result.OK)
    assert empty.message.endswith("is empty; 'bootwright image add' puts images there")
    DirectorySource(settings.images.directory).add([b"x"], disk_format="raw", name="x")
    assert only(outside.images(settings), Result.OK).message.endswith(": 1")
    shutil.rmtree(settings.images.directory)
    only(outside.images(settings), Result.WARNING)


def test_libvirt_that_is_away_is_an_error(settings: Settings) -> None:
    away = dataclasses.replace(
        settings.libvirt, connection_uri="qemu:///system?socket=/nonexistent"
    )
    found = list(outside.libvirt(dataclasses.replace(settings, libvirt=away)))
    assert results(found) == [("libvirt", Result.ERROR)]


def test_the_network_of_jobs_that_name_none_is_looked_for(
    settings: Settings, tmp_path: Path
) -> None:
    def at(uri: str) -> list[Finding]:
        there = dataclasses.replace(settings.libvirt, connection_uri=uri)
        return list(outside.network(dataclasses.replace(settings, libvirt=there)))

    bare = tmp_path / "node.xml"
    bare.write_text("<node/>")
    assert only(at("test:///default"), Result.OK).name == "network"
    assert only(at(f"test://{bare}"), Result.WARNING).message == (
        "libvirt's network default is not active; jobs without networks get no card"
    )
    assert at("qemu:///system?socket=/nonexistent") == []


def test_the_agent_is_asked_if_it_runs(
    settings: Settings, listener: Listener, service: FakeService, socket_path: Path
) -> None:
    only(outside.agent(settings), Result.WARNING)
    running = dataclasses.replace(
        settings, api=dataclasses.replace(settings.api, socket=socket_path)
    )
    only(outside.agent(running), Result.OK)
    service.checks = (Check(name="libvirt", ok=False, message="away", hint="start it"),)
    assert only(outside.agent(running), Result.ERROR).name == "agent: libvirt"
