"""A throw-away systemd: this machine's own files, another pid 1, gone after the test.

The root directory is an overlay over the host's with everything written held
in memory, so nothing is installed or unpacked and nothing is left behind. All
mounts live in a mount namespace of their own, which ends with the process,
however that ends. Only what ``sysinit.target`` wants is started: the journal,
users, temporary files; a boot takes about half a second.

Needs root and the package systemd-container; no systemd on the host.
"""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

BOOT_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0

POWER_OFF: Final = signal.SIGRTMIN + 4
"""What systemd as pid 1 takes for ``poweroff``, systemd(1)."""

# $1 an empty directory; the rest goes to systemd-nspawn.
_BOOT: Final = """
set -e
scratch=$1; shift
mount -t tmpfs -o mode=0755 tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay "$scratch/root" \
    -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work"
exec systemd-nspawn --quiet --register=no --keep-unit --link-journal=no --private-network \
    --system-call-filter="landlock_create_ruleset landlock_add_rule landlock_restrict_self" \
    --console=pipe --directory="$scratch/root" "$@" --boot systemd.unit=sysinit.target
"""


class Machine:
    """A running systemd; `leader` is the process id of its pid 1 on the host."""

    def __init__(self, process: subprocess.Popen[bytes], leader: int) -> None:
        self._process = process
        self.leader = leader

    def path(self, inside: str | Path) -> Path:
        """Where the host finds the machine's file `inside`, for reading, writing, connecting."""
        return Path(f"/proc/{self.leader}/root") / Path(inside).relative_to("/")

    def run(
        self, argv: Sequence[str | Path], *, timeout_s: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside as root.

        Raises:
            AssertionError: it failed, unless `check` is false; shows what it said.
            subprocess.TimeoutExpired: it was killed after `timeout_s` seconds.
        """
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")
        finished = subprocess.run(
            ["nsenter", f"--target={self.leader}", *namespaces, "--", *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and finished.returncode != 0:
            raise AssertionError(f"{finished.args}: {finished.stdout}{finished.stderr}")
        return finished

    def stop(self) -> None:
        """Power off; kill what does not go by itself. Doing it twice does no harm."""
        if self._process.poll() is not None:
            return
        try:
            os.kill(self.leader, POWER_OFF)
            self._process.wait(STOP_TIMEOUT_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            _kill(self._process)


@contextmanager
def booted(*, visible: Iterable[Path] = ()) -> Iterator[Machine]:
    """Boot a machine and stop it at the end.

    `visible` names directories to show inside, read-only, under their own
    path: what lies below /tmp or on another filesystem is not there otherwise.

    Raises:
        TimeoutError: it did not come up in `BOOT_TIMEOUT_S`.
        RuntimeError: systemd-nspawn ended; a note holds what it said.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bootwright-nspawn-") as scratch,
        tempfile.TemporaryFile() as console,
    ):
        binds = [f"--bind-ro={path}" for path in visible]
        process = subprocess.Popen(
            [
                # systemd-nspawn takes SIGTERM for "halt": the machine does not
                # outlive a test run that was killed.
                *("setpriv", "--pdeathsig", "TERM"),
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOT, "boot"),
                *(scratch, f"--machine=bootwright-{secrets.token_hex(4)}", *binds),
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        try:
            machine = _wait_until_up(process)
            yield machine
            machine.stop()
        except (RuntimeError, TimeoutError) as error:
            console.seek(0)
            error.add_note(console.read().decode(errors="replace"))
            raise
        finally:
            if process.poll() is None:
                _kill(process)


def _wait_until_up(process: subprocess.Popen[bytes]) -> Machine:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"systemd-nspawn ended with status {process.returncode}")
        # systemd-nspawn has other children for a moment; only this one has an
        # init's socket.
        for child in _children(process):
            machine = Machine(process, child)
            if machine.path("/run/systemd/private").exists():
                state = machine.run(["systemctl", "is-system-running"], check=False).stdout.strip()
                if state in {"running", "degraded"}:
                    return machine
        time.sleep(0.05)
    raise TimeoutError(f"no systemd after {BOOT_TIMEOUT_S:.0f} s")


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the machine, then systemd-nspawn: killed first, it would leave the machine behind."""
    for child in _children(process):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()
