"""Where the API is served: a Unix socket, and a TCP port for metrics if wanted.

A thread of its own runs the HTTP server; `stop` ends it. Who may connect to
the Unix socket is decided by its mode and group alone: whoever may, may do
everything.
"""

import errno
import grp
import logging
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Final, Self

import uvicorn
from fastapi import FastAPI

LOG = logging.getLogger(__name__)

_BACKLOG: Final = 1024

_START_TIMEOUT_S: Final = 10.0

_STOP_TIMEOUT_S: Final = 5
"""How long answers under way may take when the listener stops."""


class ListenError(Exception):
    """The API cannot be served there; the message says why and what to do."""


class _Server:
    """Serves `app` on a socket that is bound already, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self._stopping = threading.Event()
        app.state.stopping = self._stopping
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_STOP_TIMEOUT_S,
            )
        )
        self._thread: threading.Thread | None = None

    def _serve(self, sock: socket.socket, name: str) -> None:
        thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [sock]}, name=name, daemon=True
        )
        self._thread = thread
        thread.start()
        waited = 0.0
        while not self._server.started:
            thread.join(0.01)
            waited += 0.01
            if not thread.is_alive() or waited > _START_TIMEOUT_S:
                raise ListenError(f"the HTTP server on {name} did not start; see the log")

    def _end(self) -> None:
        self._stopping.set()
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()


class Listener(_Server):
    """The API on a Unix socket."""

    def __init__(self, app: FastAPI, socket_path: Path, *, group: str | None = None) -> None:
        super().__init__(app)
        self._path = socket_path
        self._group = group
        self._inode: int | None = None

    def start(self) -> None:
        """Serve; returns when callers can connect.

        The socket of an agent that is dead is replaced.

        Raises:
            ListenError: another agent serves there, or the socket cannot be made.
        """
        sock = self._bind()
        self._inode = self._path.stat().st_ino
        self._serve(sock, f"api {self._path}")

    def stop(self) -> None:
        """Answer what is under way, refuse what comes, remove the socket."""
        self._end()
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            pass

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _bind(self) -> socket.socket:
        if _answers(self._path):
            raise ListenError(
                f"another agent serves on {self._path}: stop it first, or set another socket in "
                "[api] of the configuration"
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Made aside and moved over when its permissions are right and it takes
        # connections: nobody ever sees it open to the world, or refusing.
        aside = self._path.with_name(f".{secrets.token_hex(4)}")
        try:
            sock.bind(os.fspath(aside))
            aside.chmod(0o660)
            if self._group is not None:
                os.chown(aside, -1, grp.getgrnam(self._group).gr_gid)
            sock.listen(_BACKLOG)
            aside.rename(self._path)
        except KeyError as e:
            sock.close()
            aside.unlink()
            raise ListenError(
                f"there is no group {self._group}: make it, or correct socket_group in [api]"
            ) from e
        except OSError as e:
            sock.close()
            aside.unlink(missing_ok=True)
            raise ListenError(f"cannot serve on {self._path}: {_advice(e, self._path)}") from e
        return sock


class MetricsListener(_Server):
    """A few harmless requests on a TCP port."""

    def __init__(self, app: FastAPI, address: tuple[str, int]) -> None:
        """`address`: an IP address and a port; port 0 lets the kernel pick one."""
        super().__init__(app)
        self._address = address

    def start(self) -> tuple[str, int]:
        """Serve; returns the address when callers can connect.

        Raises:
            ListenError: the address is taken or not ours.
        """
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        try:
            sock = socket.create_server(self._address, family=family, backlog=_BACKLOG)
        except OSError as e:
            host, port = self._address
            raise ListenError(
                f"cannot serve metrics on {host} port {port}: {e.strerror}; correct metrics_listen "
                "in [api]"
            ) from e
        host, port = sock.getsockname()[:2]
        self._serve(sock, f"metrics {host} port {port}")
        return host, port

    def stop(self) -> None:
        """Answer what is under way and refuse what comes."""
        self._end()


def _answers(path: Path) -> bool:
    """Whether a living process listens on the socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as e:
            # A full queue of connections is a sign of life.
            return e.errno in (errno.EAGAIN, errno.ETIMEDOUT) or isinstance(e, TimeoutError)
    return True


def _advice(error: OSError, path: Path) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"there is no directory {path.parent}; systemd makes it (RuntimeDirectory=)"
        case errno.EACCES | errno.EPERM:
            return f"the agent's user may not write to {path.parent} or not use the group"
        case _:
            return error.strerror or str(error)
