"""The console of an instance, put together again from what virtlogd has cut up.

That virtlogd does it like this, and that the helper opens what is root's, is
seen in functional/test_console.py.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

import privsep
from agent import console
from agent.errors import HypervisorError
from privsep import consoles
from tests import service_user

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
MOST = 1 << 20


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A console log in an instances_path; privileged calls run in this process."""
    (tmp_path / UUID).mkdir()
    cfg.CONF.set_override("instances_path", os.fspath(tmp_path))
    privsep.base_owner.set_client_mode(False)
    yield tmp_path / UUID / "console.log"
    privsep.base_owner.set_client_mode(True)
    cfg.CONF.clear_override("instances_path")


def whole(log: Path, most: int = MOST) -> bytes:
    text = b""
    while piece := console.read(log, len(text), most).data:
        text += piece
    return text


def test_console_of_a_guest_that_never_ran_is_empty(log: Path) -> None:
    assert console.read(log, 0, MOST).data == b""


@pytest.mark.parametrize("most", [1, 3, 7, MOST])
def test_pieces_are_one_text_oldest_first(log: Path, most: int) -> None:
    for number in range(11):
        log.with_name(f"console.log.{number}").write_bytes(f"<{number}>".encode())
    log.write_bytes(b"now")
    log.with_name("console.log.old").write_bytes(b"somebody's copy")
    assert whole(log, most) == b"<10><9><8><7><6><5><4><3><2><1><0>now"


def test_moment_in_which_virtlogd_renames_loses_nothing(log: Path) -> None:
    log.with_name("console.log.2").write_bytes(b"one ")
    log.with_name("console.log.0").write_bytes(b"two")
    assert whole(log) == b"one two"


def test_beginning_has_another_name_once_the_oldest_piece_is_gone(log: Path) -> None:
    first = log.with_name("console.log.1")
    first.write_bytes(b"one")
    log.write_bytes(b"two")
    before = console.read(log, 0, MOST).begins
    log.write_bytes(b"two and more")
    assert console.read(log, 0, MOST).begins == before
    log.rename(log.with_name("console.log.0"))
    assert console.read(log, 0, MOST).begins == before
    first.unlink()
    assert console.read(log, 0, MOST).begins != before


def test_console_that_is_renamed_all_the_time_is_read_whole_or_not_at_all(log: Path) -> None:
    stop = threading.Event()
    log.with_name("console.log.0").write_bytes(b"one ")
    log.write_bytes(b"two")

    def rename() -> None:
        aside = log.with_name("console.log.1")
        while not stop.is_set():
            log.with_name("console.log.0").rename(aside)
            aside.rename(log.with_name("console.log.0"))

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        seen = set()
        for _ in range(300):
            with contextlib.suppress(HypervisorError):
                seen.add(console.read(log, 0, MOST, reveal=lambda _: None).data)
    finally:
        stop.set()
        thread.join()
    assert seen == {b"one two"}


def test_what_stays_unreadable_is_an_error_that_says_why(log: Path) -> None:
    service_user.require_root()
    log.write_bytes(b"secret")
    log.chmod(0o600)

    def refuse(_: str) -> None:
        raise OSError("Operation not supported")

    pid = os.fork()
    if pid == 0:  # as somebody whom permissions bind
        status = 1
        try:
            log.parent.chmod(0o755)
            for parent in log.parents:
                if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                    parent.chmod(0o755)
            os.setresuid(65534, 65534, 65534)
            console.read(log, 0, MOST, reveal=refuse)
        except HypervisorError as e:
            status = 0 if "Operation not supported" in e.message else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def acl(path: Path) -> list[str]:
    return os.listxattr(path)


def test_logs_of_root_are_revealed_and_nothing_else(log: Path) -> None:
    service_user.require_root()
    for path in (log, log.with_name("console.log.0"), log.with_name("disk"), log.with_name("x")):
        path.touch()
        path.chmod(0o600)
    strange = log.with_name("console.log.1")
    strange.symlink_to(log.with_name("x"))
    linked = log.with_name("console.log.2")
    linked.hardlink_to(log.with_name("x"))
    owned = log.with_name("console.log.3")
    owned.touch(mode=0o600)
    os.chown(owned, 65534, 65534)

    consoles.reveal(UUID)

    entry = ["system.posix_acl_access"]
    assert acl(log) == acl(log.with_name("console.log.0")) == entry
    assert acl(log.with_name("disk")) == acl(log.with_name("x")) == acl(owned) == []
    consoles.reveal(UUID)


@pytest.mark.parametrize("name", ["", ".", "..", "_base", UUID.upper(), f"{UUID}/", f"../{UUID}"])
def test_name_that_is_no_uuid_is_refused(log: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not the uuid"):
        consoles.reveal(name)


def test_directory_that_is_a_link_is_refused(log: Path) -> None:
    other = UUID.replace("0", "1")
    (log.parents[1] / other).symlink_to(log.parent)
    with pytest.raises(NotADirectoryError):
        consoles.reveal(other)
