"""The agent's side of the privilege boundary: start the helper, keep nothing.

The agent is started with the capabilities its helper needs and with no other
(``AmbientCapabilities=`` in the unit). `start_helper` passes them on by fork
and gives them up, in every thread, before the agent does anything else; then
it reads back from the kernel that they are gone.

What may be done with a capability stands in package `privsep`, not here.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from oslo_config import cfg
from oslo_privsep import capabilities
from oslo_privsep.daemon import FailedToDropPrivileges
from oslo_privsep.priv_context import Method

from privsep import base_owner

LOG = logging.getLogger(__name__)

_OWN_THREADS: Final = Path("/proc/self/task")

# CapBnd is no privilege: it limits what a set-uid program could gain, and the
# unit's NoNewPrivileges= has already made that nothing.
_CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")

_EX_OSERR: Final = 71
"""Exit status of a helper that could not start, from sysexits.h."""


class PrivilegesNotDropped(RuntimeError):
    """The agent holds a privilege it must not hold; it has to stop. Says which, and what to do."""


class HelperNotStarted(RuntimeError):
    """There is no helper, so the agent cannot start."""


def start_helper() -> None:
    """Start the helper, drop all privileges of the agent and prove it.

    Belongs at the very start of the agent: after the configuration was read
    (the helper inherits it) and before the first thread (the helper is a
    fork, and a thread started earlier would keep the capabilities).

    With ``helper_command`` in [privsep_base_owner] that command starts the
    helper, and starts it again should it die. Without it, and without the
    capabilities, the helper runs and can do no more than the agent itself.

    Raises:
        PrivilegesNotDropped: the process is root, or some thread still holds
            a capability.
        HelperNotStarted: it ended at its start, or its command failed.
        ValueError: the section is wrong.
    """
    refuse_root()
    # It reports its start in four lines and, at debug, every reply; oslo.log
    # writes the names of some of its loggers with a dot.
    for name in ("oslo_privsep", "oslo.privsep"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # All of the section is read here. What is wrong with it would otherwise
    # end the helper at its start, and oslo.privsep would wait for it for ever.
    section = dict(base_owner.conf)
    if section["helper_command"]:
        drop_all()
        with _start_reported():
            base_owner.start(Method.ROOTWRAP)
    elif (section["user"], section["group"]) != (None, None):
        raise ValueError(
            f"[{base_owner.cfg_section}] user and group are for a helper that helper_command "
            "starts: set helper_command as well, or remove them"
        )
    else:
        with _start_reported():
            _fork_helper()
        drop_all()
    verify()


def helper_alive() -> bool:
    """Whether the helper was started and its end has not been noticed."""
    return base_owner.channel is not None and bool(base_owner.channel.running)


def on_helper_exit(callback: Callable[[], None]) -> None:
    """Call `callback` once, in a thread of its own, when the forked helper is gone.

    A forked helper cannot be started again, since the agent has nothing left
    to give it: the agent should end and let systemd start both. A helper
    started by ``helper_command`` comes back with the next call; it is not
    watched.
    """
    channel = base_owner.channel
    if channel is None or base_owner.conf.helper_command:
        return

    def watch() -> None:
        channel.reader_thread.join()  # it ends at the end of file from the helper
        callback()

    threading.Thread(target=watch, name="helper-watch", daemon=True).start()


def refuse_root() -> None:
    """Raise `PrivilegesNotDropped` if any of the process's user ids is root's."""
    if 0 in os.getresuid():
        raise PrivilegesNotDropped(
            "the agent does not run as root: start it with 'systemctl start bootwright', "
            "or as its own user with 'setpriv --reuid=bootwright --regid=bootwright "
            "--init-groups --inh-caps=-all,+fowner --ambient-caps=-all,+fowner "
            "--bounding-set=-all,+fowner --no-new-privs bootwright agent'"
        )


def drop_all() -> None:
    """Give up every capability of the calling thread, and of those it starts from now on.

    The ambient set needs no call of its own: the kernel keeps it within the
    permitted and the inheritable set, capabilities(7).
    """
    capabilities.drop_all_caps_except([], [], [])


def verify() -> None:
    """Read back from the kernel that no thread of this process holds a capability.

    Raises:
        PrivilegesNotDropped: one does; names the thread and the capabilities.
    """
    for thread in _OWN_THREADS.iterdir():
        try:
            status = (thread / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since the directory was read
        if held := held_capabilities(status):
            raise PrivilegesNotDropped(
                f"thread {thread.name} of the agent still holds {', '.join(held)}: the agent "
                "must not go on; start it through its systemd unit, and report this as a bug "
                "if that is what happened"
            )


def held_capabilities(status: str) -> list[str]:
    """Names of all capabilities in `status`, the text of a /proc/…/status file."""
    fields = dict(line.split(":", 1) for line in status.splitlines())
    masks = [int(fields[name], 16) for name in _CAPABILITY_SETS]
    return _names(bit for bit in range(64) if any(mask >> bit & 1 for mask in masks))


def _names(bits: Iterable[int]) -> list[str]:
    # The kernel may know capabilities that oslo.privsep does not.
    return [capabilities.CAPS_BYVALUE.get(bit, f"capability {bit}") for bit in sorted(bits)]


def _fork_helper() -> None:
    """Start the helper by fork and leave this thread, the only one, without capabilities."""
    _lower_expectations()
    # oslo.privsep starts a thread that reads from the helper before start()
    # returns. The hook runs before that, so the thread inherits nothing.
    os.register_at_fork(after_in_parent=drop_all)
    agent = os.getpid()
    try:
        with _deaf_to_process_group():
            base_owner.start(Method.FORK)
    except BaseException:
        if os.getpid() != agent:
            # This is the helper, and above it on the stack stands the agent's
            # main(): it must not return there and be a second agent.
            LOG.exception("the privileged helper could not start")
            os._exit(_EX_OSERR)
        raise


@contextmanager
def _start_reported() -> Iterator[None]:
    """Turn what a helper that does not start leads to into one sentence."""
    try:
        yield
    except (FailedToDropPrivileges, OSError) as e:
        raise HelperNotStarted(
            f"the privileged helper did not start ({e}): see the log above, and helper_command in "
            f"[{base_owner.cfg_section}] if it is set"
        ) from e


def _lower_expectations() -> None:
    """Let the helper ask for no capability that this process cannot give; warn what it lacks."""
    permitted = set(capabilities.get_caps()[1])
    wanted = set(base_owner.conf.capabilities)
    if missing := wanted - permitted:
        LOG.warning(
            "started without %s: last use of bases that libvirt has taken over will not be "
            "recorded, and such bases are kept longer than needed; start the agent through its "
            "systemd unit",
            ", ".join(_names(missing)),
        )
        cfg.CONF.set_override(
            "capabilities", sorted(wanted & permitted), group=base_owner.cfg_section
        )


@contextmanager
def _deaf_to_process_group() -> Iterator[None]:
    """Hold back for a moment what a terminal sends to the whole process group.

    The helper inherits the mask and keeps it: it has to outlive the agent's
    drain, and ends by itself when the agent is gone and its socket closes.
    What arrives for the agent meanwhile is delivered at the end.
    """
    group_signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, group_signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
