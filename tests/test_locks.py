"""File locks, between threads and between processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import BackendError, Cancelled, DeadlineExceeded, InsufficientFreeSpace
from agent.locks import FileLock, held
from tests.small_file_system import mounted_file_system

full_file_system = mounted_file_system("tmpfs")


def test_one_holder_at_a_time_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path)
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()
    second.release()
    assert path.exists()


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with held(tmp_path / "lock", Cancellation()):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_waiter_leaves_when_cancelled_and_at_its_deadline(tmp_path: Path) -> None:
    with held(tmp_path / "lock", Cancellation()):
        cancellation = Cancellation()
        threading.Timer(0.1, cancellation.cancel, [Cancelled("enough")]).start()
        with pytest.raises(Cancelled):
            FileLock(tmp_path / "lock").acquire(cancellation)
        with pytest.raises(DeadlineExceeded):
            FileLock(tmp_path / "lock").acquire(Cancellation(0.1))


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from agent.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); lock.try_acquire(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        lock = FileLock(tmp_path / "lock")
        assert not lock.try_acquire()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert lock.try_acquire()
        lock.release()


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="lock file"):
        FileLock(tmp_path / "lock").try_acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_full_disk_is_said_to_be_full(full_file_system: Path) -> None:
    known = full_file_system / "known"
    known.touch()
    # For the directory and the one file in it.
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", full_file_system], check=True)
    with pytest.raises(InsufficientFreeSpace, match="making the lock file"):
        FileLock(full_file_system / "another").try_acquire()
    lock = FileLock(known)
    assert lock.try_acquire()
    lock.release()
