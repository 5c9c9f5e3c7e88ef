"""Starts agents quickly, for a test that starts thousands.

Four fifths of the agent's start are Python's imports. A process that has done them forks for each
agent; from the first line of the agent's own `main` on, that is the same as any other start.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

_CHILD: Final = Path(__file__).with_name("launcher_child.py")
_LIMIT_S: Final = 60.0


class Started:
    """A process that is no child of ours; like `subprocess.Popen`, as far as `Agent` needs it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._signal = 0
        self._ended = False

    def poll(self) -> int | None:
        """Return None while it runs, then minus the signal it was sent: its status is not ours."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait(_LIMIT_S if timeout is None else timeout)
        if status is None:
            raise subprocess.TimeoutExpired("the agent", timeout or _LIMIT_S)
        return status

    def send_signal(self, number: int) -> None:
        if not self._ended:
            self._signal = number
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, seconds: float) -> int | None:
        if not self._ended:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            self._ended = True
            os.close(self._descriptor)
        return -self._signal


class Launcher:
    """One process that starts agents; a context manager that ends it.

    Args:
        prefix: what its command line begins with: the user and the capabilities of the agents.
        environment: theirs.
    """

    def __init__(self, prefix: Sequence[str], environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_LIMIT_S)
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-c", _CHILD.read_text()],
                stdin=theirs.fileno(),
                cwd="/",
                env=dict(environment),
            )
        if self._socket.recv(16) != b"ready":
            raise RuntimeError(f"the launcher ended with {self._process.wait(_LIMIT_S)}")

    def start(self, command: Sequence[str], output: IO[bytes]) -> Started:
        """Start `bootwright …`, with its output, in a process of its own."""
        message = json.dumps(list(command)).encode()
        socket.send_fds(self._socket, [message], [output.fileno()])
        return Started(int(self._socket.recv(32)))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(_LIMIT_S)
