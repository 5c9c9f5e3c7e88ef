"""Logging: how lines look, what goes with them, and what may never be in them.

Under systemd a line goes to the journal with its fields; anywhere else it goes
to standard error and reads `time level [req-…] [instance: …] sentence KEY=value …`.
Files, rotation and forwarding are left to the journal, which does them better.

Any module logs through the standard library. What belongs to a line as data
goes with the call, as `extra={"fields": {"PHASE": …, "BYTES": …}}`; what belongs
to every line of a job is bound once, by `bind`, and goes along in the context.
"""

import contextlib
import contextvars
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from systemd import journal

from agent.errors import printable

_context: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "log fields", default=types.MappingProxyType({})
)

_QUIET: Final = (
    "asyncio",
    "barbicanclient",
    "castellan",
    "glanceclient",
    "httpcore",
    "httpx",
    "keystoneauth",
    "oslo.privsep",
    "oslo_privsep",
    "stevedore",
    "urllib3",
    "uvicorn",
)
"""Libraries that tell at INFO what is nobody's news on a quiet host."""

_SECRETS: Final = (
    # Headers, JSON, dictionaries, curl commands and key=value: X-Auth-Token,
    # admin_password, application_credential_secret …
    re.compile(
        r"""(?xi)
        ( [\w-]* (?:password|passwd|secret|token|authorization) [\w-]*
          (?:\\*['"])? \s*[:=]\s* )
        (?! b?['"]?\{SHA256\} )  # keystoneauth has hashed it already
        (?:
            b?(?P<quote>\\*['"]) (?: (?!(?P=quote)) (?:\\.|.) )* (?P=quote)?
          | \{ (?: [^{}] | \{[^{}]*\} )*  # {"token": {"id": …}}
          | (?:(?:bearer|basic)\s+)? [^\s'",}]+
        )"""
    ),
    # The user information of a URL, to the last @: a password may hold one.
    re.compile(r"([a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/]+(?=@)"),
)


def setup(*, debug: bool = False) -> None:
    """Send everything that is logged to the journal, or to standard error if that is no journal.

    Replaces what was set up before. `debug` also lets the libraries talk.
    """
    handler: logging.Handler
    if _stderr_is_journal():
        handler = JournalHandler(journal.send)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(ConsoleFormatter())
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if debug else logging.INFO, force=True
    )
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET if debug else logging.WARNING)


@contextlib.contextmanager
def bind(**fields: str | None) -> Iterator[None]:
    """Attach `request_id`, `job_id`, `instance_uuid`, `image_id` … to every line logged within.

    None attaches nothing. Threads started within do not inherit it, unless
    they run in a copy of the context.
    """
    given = {name.upper(): value for name, value in fields.items() if value is not None}
    token = _context.set({**_context.get(), **given})
    try:
        yield
    finally:
        _context.reset(token)


def redact(text: str) -> str:
    """Return `text` without the tokens and passwords in it."""
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


class ConsoleFormatter(logging.Formatter):
    """`time level [req-…] [instance: …] sentence KEY=value …`"""

    def format(self, record: logging.LogRecord) -> str:
        context = dict(_context.get())
        request_id = context.pop("REQUEST_ID", None)
        instance_uuid = context.pop("INSTANCE_UUID", None)
        parts = [
            f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}.{int(record.msecs):03d}",
            record.levelname,
            *([f"[{request_id}]"] if request_id else []),
            *([f"[instance: {instance_uuid}]"] if instance_uuid else []),
            record.getMessage(),
            *(f"{name}={value}" for name, value in {**context, **_fields_of(record)}.items()),
        ]
        line = " ".join(parts)
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        if record.stack_info:
            line = f"{line}\n{record.stack_info}"
        return printable(redact(line))


class JournalHandler(logging.Handler):
    """Writes to systemd's journal, each field as a field of the entry."""

    def __init__(self, send: Callable[..., None]) -> None:
        """`send(message, **fields)`: as `systemd.journal.send`."""
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.exc_info:
                formatter = self.formatter or logging.Formatter()
                message = f"{message}\n{formatter.formatException(record.exc_info)}"
            entry = {
                "PRIORITY": _priority(record.levelno),
                "SYSLOG_IDENTIFIER": "bootwright",
                "LOGGER": record.name,
                "THREAD_NAME": record.threadName,
                "CODE_FILE": record.pathname,
                "CODE_FUNC": record.funcName,
                **_context.get(),
                **_fields_of(record),
            }
            texts = {name: redact(str(value)) for name, value in entry.items()}
            # systemd-python formats this one as a number.
            self._send(redact(message), CODE_LINE=record.lineno, **texts)
        except Exception:  # noqa: BLE001 - logging must not end what it tells of
            self.handleError(record)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    given = getattr(record, "fields", None)
    return given if isinstance(given, dict) else {}


def _stderr_is_journal() -> bool:
    """Whether systemd gave us a standard error that leads to the journal, systemd.exec(5)."""
    device_and_inode = os.environ.get("JOURNAL_STREAM", "")
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return device_and_inode == f"{stat.st_dev}:{stat.st_ino}"


def _priority(level: int) -> int:
    """syslog(3)'s number for a level."""
    for floor, priority in ((50, 2), (40, 3), (30, 4), (20, 6)):
        if level >= floor:
            return priority
    return 7
