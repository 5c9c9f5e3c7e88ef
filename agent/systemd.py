"""What the agent tells systemd, and what systemd asks of it: sd_notify(3).

A datagram of ``NAME=value`` lines to the socket named in the environment; no
library is needed for that. Everything here does nothing when systemd did not
start the process, and nothing here ever fails: a service manager that cannot
be told is no reason to stop serving. Any thread may call.
"""

import logging
import os
import socket
from typing import Final

LOG = logging.getLogger(__name__)

_SEND_TIMEOUT: Final = 1.0
"""Seconds to wait while systemd's queue is full; a message lost then is sent again soon enough."""


def notify(*assignments: str) -> None:
    """Send `assignments` (``"STATUS=…"``, ``"READY=1"``) in one message."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux' abstract namespace, unix(7)
        address = "\0" + address[1:]
    message = "\n".join(assignments).encode(errors="replace")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_TIMEOUT)
            sender.sendto(message, address)
    except OSError as error:
        LOG.debug("systemd was not told %s: %s", assignments, error)


def ready(text: str) -> None:
    """Start-up is over; `text` is what ``systemctl status`` shows."""
    notify("READY=1", _status(text))


def status(text: str) -> None:
    """Show `text`, one line for a person, in ``systemctl status``."""
    notify(_status(text))


def stopping() -> None:
    """The agent has begun to drain."""
    notify("STOPPING=1")


def watchdog() -> None:
    """The agent is alive; due at least every two `watchdog_interval`."""
    notify("WATCHDOG=1")


def extend_timeout(seconds: float) -> None:
    """Ask for `seconds` more, from now, for the start or stop in progress."""
    notify(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")


def watchdog_interval() -> float | None:
    """Seconds between two calls of `watchdog`, or None if nobody waits for them.

    Half of the limit, as sd_watchdog_enabled(3) recommends. The variables are
    inherited, so they count only for the process they name.
    """
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = int(os.environ.get("WATCHDOG_PID", "0"))
    except ValueError as error:
        LOG.warning("the watchdog is off, its environment variables are malformed: %s", error)
        return None
    return limit / 2_000_000 if limit > 0 and pid == os.getpid() else None


def _status(text: str) -> str:
    # A line break would start the next assignment.
    return "STATUS=" + " ".join(text.split())
