"""The life of the agent, from the first system call to the last."""

import enum
import gc
import logging
import queue
import signal
from collections.abc import Callable
from types import FrameType

from agent import privileges, systemd
from agent.parts import CLOSING_S, Parts
from agent.settings import Settings
from privsep import HelperContext, base_owner, volumes

LOG = logging.getLogger(__name__)

# How often systemd is told how things are when it does not ask to be told.
STATUS_S = 15.0


class Wish(enum.Enum):
    """What may wake the main thread."""

    STOP = enum.auto()
    RELOAD = enum.auto()
    HELPER_GONE = enum.auto()


def run(settings: Settings, reload: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    `reload` reads the configuration again, at SIGHUP.

    Raises:
        PrivilegesNotDropped: the process has powers it must not have.
        ListenError, JournalUnusable, OSError: it cannot serve or write where it should.
    """
    # First of all: a helper is a fork, and the agent goes on without a power.
    privileges.start_helpers(_helpers(settings))
    wishes = _listen_for_wishes()
    parts = Parts(settings)
    try:
        parts.start()
        # Only now do all threads exist that might have kept something.
        privileges.verify()
        # What is there by now stays: no collection has to look at it again.
        gc.collect()
        gc.freeze()
        systemd.ready(parts.summary())
        LOG.info("ready, serving on %s", settings.api.socket)
        return _attend(parts, wishes, reload)
    finally:
        systemd.stopping()
        systemd.extend_timeout(settings.drain_timeout_s + CLOSING_S)
        parts.stop(settings.drain_timeout_s)
        privileges.stop_helpers()


def _listen_for_wishes() -> "queue.SimpleQueue[Wish]":
    wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()

    def wish_for(wish: Wish) -> Callable[[int, FrameType | None], None]:
        # SimpleQueue.put is reentrant, so a signal handler may call it.
        return lambda _number, _frame: wishes.put(wish)

    signal.signal(signal.SIGTERM, wish_for(Wish.STOP))
    signal.signal(signal.SIGINT, wish_for(Wish.STOP))
    signal.signal(signal.SIGHUP, wish_for(Wish.RELOAD))
    privileges.on_helper_exit(lambda: wishes.put(Wish.HELPER_GONE))
    return wishes


def _attend(parts: Parts, wishes: "queue.SimpleQueue[Wish]", reload: Callable[[], None]) -> int:
    """Keep the watchdog quiet until somebody wishes the end; wait for nothing else."""
    interval = min(systemd.watchdog_interval() or STATUS_S, STATUS_S)
    while True:
        try:
            match wishes.get(timeout=interval):
                case Wish.STOP:
                    LOG.info("stopping: no new jobs; what is running goes on after the next start")
                    return 0
                case Wish.HELPER_GONE:
                    LOG.error("a privileged helper has ended, so the agent does; start it again")
                    return 1
                case Wish.RELOAD:
                    reload()
        except queue.Empty:
            pass
        if parts.agent.live():
            systemd.watchdog()
        systemd.status(parts.summary())


def _helpers(settings: Settings) -> list[HelperContext]:
    return [base_owner] if settings.volumes is None else [base_owner, volumes]
