"""The door to other programs, with real programs."""

import threading
import time
from pathlib import Path

import pytest

from agent import process
from agent.cancellation import Cancellation
from agent.errors import Cancelled, DeadlineExceeded
from agent.process import Cause, Limits, ProgramFailed
from tests.waiting import AT_ONCE_S, until

SH = "/bin/sh"


def shell(script: str, **options: object) -> process.Completed:
    return process.run([SH, "-c", script], **{"timeout_s": 20.0, **options})  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """Whether a killed process has died; the kernel takes its time."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_output_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_PASSWORD", "secret")
    completed = shell("env; cat; echo warned >&2")
    assert completed.stderr == "warned"
    assert b"LC_ALL=C.UTF-8" in completed.stdout
    assert b"OS_PASSWORD" not in completed.stdout


def test_a_failure_tells_program_status_and_last_words() -> None:
    with pytest.raises(ProgramFailed) as caught:
        shell("seq 100000 >&2; echo the reason >&2; exit 7")
    assert caught.value.cause is Cause.EXIT
    assert caught.value.status == 7
    assert len(caught.value.stderr) <= 8192
    assert "sh ended with status 7" in str(caught.value)
    assert str(caught.value).endswith("the reason")


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(ProgramFailed, match="not installed") as caught:
        process.run(["no-such-program"], timeout_s=1)
    assert caught.value.cause is Cause.MISSING
    assert "qemu-utils" in str(ProgramFailed(("qemu-img",), Cause.MISSING))


def test_a_time_out_kills_the_children_too(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProgramFailed) as caught:
        shell(f"sleep 60 & echo $! > {tmp_path}/pid; wait", timeout_s=0.3)
    assert caught.value.cause is Cause.TIMEOUT
    assert time.monotonic() - began < AT_ONCE_S
    until(lambda: gone(int((tmp_path / "pid").read_text())))


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    began = time.monotonic()
    shell(f"sleep 60 & echo $! > {tmp_path}/pid")
    assert time.monotonic() - began < AT_ONCE_S
    until(lambda: gone(int((tmp_path / "pid").read_text())))


def test_a_cancel_ends_the_program_with_its_reason() -> None:
    cancellation = Cancellation()
    threading.Timer(0.2, cancellation.cancel, [Cancelled("enough")]).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        shell("sleep 60", cancellation=cancellation)
    assert time.monotonic() - began < AT_ONCE_S


def test_a_deadline_ends_the_program() -> None:
    with pytest.raises(DeadlineExceeded):
        shell("sleep 60", cancellation=Cancellation(0.2))


def test_nothing_starts_once_cancelled(tmp_path: Path) -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        shell(f"touch {tmp_path}/started", cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []


def test_the_cpu_limit_is_named() -> None:
    with pytest.raises(ProgramFailed, match="cpu limit") as caught:
        shell("while :; do :; done", limits=Limits(cpu_s=1))
    assert caught.value.cause is Cause.CPU


def test_the_file_size_limit_is_named(tmp_path: Path) -> None:
    script = f"exec dd if=/dev/zero of={tmp_path}/file bs=4096 count=100"
    with pytest.raises(ProgramFailed, match="file size limit") as caught:
        shell(script, limits=Limits(file_size=8192))
    assert caught.value.cause is Cause.FILE_SIZE
    assert (tmp_path / "file").stat().st_size == 8192


def test_the_address_space_limit_holds() -> None:
    with pytest.raises(ProgramFailed):
        process.run(
            ["python3", "-c", "bytearray(1 << 30)"],
            timeout_s=20,
            limits=Limits(address_space=512 << 20),
        )


def test_endless_output_is_cut_off() -> None:
    with pytest.raises(ProgramFailed, match="output limit") as caught:
        process.run(["cat", "/dev/zero"], timeout_s=20)
    assert caught.value.cause is Cause.OUTPUT


def test_files_it_makes_are_not_for_everybody(tmp_path: Path) -> None:
    shell("echo x > file", cwd=tmp_path)
    assert (tmp_path / "file").stat().st_mode & 0o007 == 0
