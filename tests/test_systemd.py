"""The messages systemd gets, read from a real datagram socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The receiving end, as systemd would name it in the environment."""
    if request.param == "path":
        variable = address = os.fspath(tmp_path / "notify")
    else:
        name = f"bootwright-test-{os.getpid()}"
        variable, address = f"@{name}", f"\0{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", variable)
        yield receiver


def received(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_ready_carries_a_status(manager: socket.socket) -> None:
    systemd.ready("3 jobs taken up again")
    assert received(manager) == ["READY=1", "STATUS=3 jobs taken up again"]


def test_status_is_one_line(manager: socket.socket) -> None:
    systemd.status("first\nMAINPID=1\n")
    assert received(manager) == ["STATUS=first MAINPID=1"]


def test_life_of_a_service(manager: socket.socket) -> None:
    systemd.watchdog()
    systemd.extend_timeout(1.5)
    systemd.stopping()
    assert [received(manager) for _ in range(3)] == [
        ["WATCHDOG=1"],
        ["EXTEND_TIMEOUT_USEC=1500000"],
        ["STOPPING=1"],
    ]


@pytest.mark.parametrize("address", [None, "", "/nonexistent/notify", "@nobody-listens", "x" * 200])
def test_absent_systemd_is_no_error(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.ready("up")
    systemd.watchdog()


def test_unprintable_status_is_no_error(manager: socket.socket) -> None:
    systemd.status("disk \udcff")
    assert received(manager) == ["STATUS=disk ?"]


@pytest.mark.parametrize(
    ("limit", "pid", "interval"),
    [
        ("60000000", str(os.getpid()), 30.0),
        ("60000000", str(os.getpid() + 1), None),
        ("60000000", None, None),
        (None, str(os.getpid()), None),
        ("0", str(os.getpid()), None),
        ("a minute", str(os.getpid()), None),
    ],
    ids=["ours", "of another", "no process", "no limit", "none", "no number"],
)
def test_watchdog_interval_is_half_the_limit_of_this_process(
    limit: str | None, pid: str | None, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", limit), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval() == interval
