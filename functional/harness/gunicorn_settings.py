"""Settings of the gunicorn that `wsgi_server` starts; read by gunicorn, not imported by tests.

They are a file because Keystone parses the command line of its process and exits at an option it
does not know.
"""

import os
from typing import Protocol

from sqlalchemy import Engine, event

wsgi_app = os.environ["WSGI_APPLICATION"]
bind = os.environ["WSGI_BIND"]
# The tests hold the port with a socket of their own.
reuse_port = True
# Several transfers at a time in one process, and uploads in chunks of any size.
worker_class = "gthread"
workers = 1
threads = 8
timeout = 120
graceful_timeout = 1
# It would be one file in the home directory for all servers.
control_socket_disable = True
accesslog = os.environ["WSGI_ACCESS_LOG"]
# `wsgi_server.AccessLog` reads this. RAW_URI, because applications rewrite PATH_INFO as they route.
access_log_format = "ended\t%(m)s\t%({raw_uri}e)s\t%(s)s\t%(B)s\t%({range}i)s"


class _Log(Protocol):
    def info(self, message: str, *args: str) -> None: ...


class _Logger(Protocol):
    access_log: _Log


class _Worker(Protocol):
    log: _Logger


class _Request(Protocol):
    method: str
    uri: str


def pre_request(worker: _Worker, request: _Request) -> None:
    """Log the request before the application sees it.

    gunicorn itself logs once the answer has ended, which may be after the client went on.
    """
    worker.log.access_log.info("begun\t%s\t%s", request.method, request.uri)


def post_fork(_server: object, _worker: object) -> None:
    """Take SQLite's write lock at the start of a transaction, not at its first write.

    oslo.db says a plain BEGIN. Two transactions that have both read by the time they write make
    SQLite answer "database is locked" at once, whatever the timeout, and Glance a 500.
    """
    event.listen(Engine, "before_cursor_execute", _begin_immediate, retval=True)


def _begin_immediate(
    _connection: object,
    _cursor: object,
    statement: str,
    parameters: object,
    _context: object,
    _many: bool,
) -> tuple[str, object]:
    return ("BEGIN IMMEDIATE" if statement == "BEGIN" else statement), parameters
