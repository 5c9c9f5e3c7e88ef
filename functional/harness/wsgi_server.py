"""One WSGI application under gunicorn on loopback, a process that tests start and break.

It knows nothing of what it serves: `glance` and `keystone` write the configuration, hand over the
name of the application and talk to it.

The port is the kernel's choice and is held for the server's whole life by a socket that is bound
but never listens. So no other program can take it, a stopped server refuses connections as a
dead one should, and it comes back on the same port.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import requests

_SETTINGS = Path(__file__).with_name("gunicorn_settings.py")
_START_LIMIT = 60.0
_STOP_LIMIT = 10.0
_POLL = 0.05


class ServerError(Exception):
    """A server is not running, or does not answer.

    Attributes:
        application: what was to be served.
        log: the end of what the server wrote.
    """

    def __init__(self, application: str, log: str) -> None:
        super().__init__(application, log)
        self.application = application
        self.log = log

    def __str__(self) -> str:
        return f"{self.application} does not answer; its log ends with:\n{self.log}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A request that has been answered, as the access log tells it."""

    method: str
    path: str
    """As the client sent it, with the query."""
    status: int
    sent: int
    """Body bytes handed to the socket; the client may have read fewer."""
    range: str | None
    """The Range header of the request."""


class AccessLog:
    """What a server was asked, oldest first, over all its restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begun(self, path: str) -> int:
        """Count the GET requests for exactly `path`, answered or not.

        A request is logged before the application sees it: a client that has received anything
        finds its own request counted.
        """
        return sum(line == ["begun", "GET", path] for line in self._lines())

    def answered(self, path: str, settle: float = 5.0) -> list[Answered]:
        """Return the GET requests for exactly `path` that have ended, in whatever way.

        The line about an answer is written after the client has the last byte. So this waits up
        to `settle` seconds until every request that has begun has ended; the requests of a killed
        worker never do.
        """
        deadline = time.monotonic() + settle
        while True:
            begun = self.begun(path)
            found = [
                Answered(
                    method=line[1],
                    path=line[2],
                    status=int(line[3]),
                    sent=int(line[4]),
                    range=None if line[5] == "-" else line[5],
                )
                for line in self._lines()
                if line[0] == "ended" and line[1:3] == ["GET", path]
            ]
            if len(found) >= begun or time.monotonic() > deadline:
                return found
            time.sleep(_POLL)

    def _lines(self) -> list[list[str]]:
        if not self._path.exists():
            return []
        # The last piece is empty, or a line that is being written.
        lines = self._path.read_text("utf-8", "replace").split("\n")[:-1]
        return [line.split("\t") for line in lines]


class WsgiServer:
    """A gunicorn with one worker process of eight threads.

    Args:
        venv: the virtualenv with gunicorn and the application.
        application: module and callable, like `glance.wsgi.api:application`.
        root: an existing directory for the logs; also the home directory of the process.
        environment: variables for the application, on top of a bare minimum.
        health_path: is answered with a status below 400 once the application is ready.
    """

    def __init__(
        self,
        *,
        venv: Path,
        application: str,
        root: Path,
        environment: Mapping[str, str],
        health_path: str,
    ) -> None:
        self._venv = venv
        self._application = application
        self._root = root
        self._environment = environment
        self._health_path = health_path
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.port: int = self._reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = root / "server.log"
        self.access_log = AccessLog(root / "access.log")

    def start(self) -> None:
        """Start and wait until the application answers.

        Raises:
            ServerError: it ended, or does not answer within a minute.
        """
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                # No options: an application may take the command line for its own.
                [self._venv / "bin/gunicorn"],
                cwd=self._root,
                env={
                    "PATH": f"{self._venv}/bin:/usr/bin:/bin",
                    "HOME": os.fspath(self._root),
                    "LC_ALL": "C.UTF-8",
                    "GUNICORN_CMD_ARGS": shlex.join(["--config", os.fspath(_SETTINGS)]),
                    "WSGI_APPLICATION": self._application,
                    "WSGI_BIND": f"127.0.0.1:{self.port}",
                    "WSGI_ACCESS_LOG": os.fspath(self._root / "access.log"),
                    **self._environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C at the terminal is for the tests, which then stop the server.
                start_new_session=True,
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the application answers, for example after `kill_worker`.

        Raises:
            ServerError: it ended, or does not answer within a minute.
        """
        deadline = time.monotonic() + _START_LIMIT
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            # A worker that cannot load the application leaves a socket that accepts and never
            # answers, hence the timeout.
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}{self._health_path}", timeout=5).ok:
                    return
            time.sleep(_POLL)
        raise ServerError(self._application, self.log_path.read_text("utf-8", "replace")[-4000:])

    def stop(self) -> None:
        """End the server and cut whatever it is sending; harmless when it is stopped already."""
        if self._process is None:
            return
        process, self._process = self._process, None
        # SIGQUIT is gunicorn's quick end; SIGTERM lets running answers finish.
        process.send_signal(signal.SIGQUIT)
        try:
            process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The server leads its own process group, so a stuck worker goes as well.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        """Stop and start on the same port with the same data."""
        self.stop()
        self.start()

    def kill_worker(self) -> None:
        """SIGKILL the worker, which cuts every answer; gunicorn replaces it in about a second."""
        if self._process is None:
            raise ServerError(self._application, "it is not running")
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split():
            os.kill(int(child), signal.SIGKILL)

    def close(self) -> None:
        """Stop for good and give the port back."""
        self.stop()
        self._reservation.close()


class WsgiService:
    """What talks to the application of one server; a context manager that starts and stops it."""

    def __init__(self, server: WsgiServer) -> None:
        self._server = server

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException:
            self._server.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _begin(self) -> None:
        self._server.start()

    @property
    def access_log(self) -> AccessLog:
        """All the requests it has had."""
        return self._server.access_log

    def stop(self) -> None:
        """Stop and cut running answers; the port stays reserved and refuses connections."""
        self._server.stop()

    def restart(self) -> None:
        """Stop and start on the same port with the same data."""
        self._server.restart()

    def kill_worker(self) -> None:
        """SIGKILL the process that answers; wait with `wait_ready` for the next one."""
        self._server.kill_worker()

    def wait_ready(self) -> None:
        """Wait until requests are answered again."""
        self._server.wait_ready()
