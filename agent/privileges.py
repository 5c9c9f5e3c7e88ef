"""The agent's side of the privilege boundary: start the helpers, keep nothing.

The agent is started with the capabilities its helpers need and with no other
(``AmbientCapabilities=`` in the unit). `start_helpers` passes them on by fork
and gives them up, in every thread, before the agent does anything else; then
it reads back from the kernel that they are gone.

What may be done with a capability stands in package `privsep`, not here.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from oslo_config import cfg
from oslo_privsep import capabilities
from oslo_privsep.daemon import FailedToDropPrivileges
from oslo_privsep.priv_context import Method

from privsep import HelperContext, base_owner

LOG = logging.getLogger(__name__)

_OWN_THREADS: Final = Path("/proc/self/task")

# CapBnd is no privilege: it limits what a set-uid program could gain, and the
# unit's NoNewPrivileges= has already made that nothing.
_CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")

_END_LIMIT_S: Final = 2.0
_POLL_S: Final = 0.01

_EX_OSERR: Final = 71
"""Exit status of a helper that could not start, from sysexits.h."""


class PrivilegesNotDropped(RuntimeError):
    """The agent holds a privilege it must not hold; it has to stop. Says which, and what to do."""


class HelperNotStarted(RuntimeError):
    """There is no helper, so the agent cannot start."""


_started: Final[list[HelperContext]] = []


def start_helpers(contexts: Sequence[HelperContext] = (base_owner,)) -> None:
    """Start one helper for each context, drop all privileges of the agent and prove it.

    Belongs at the very start of the agent: after the configuration was read
    (the helpers inherit it) and before the first thread (a helper is a fork,
    and a thread started earlier would keep the capabilities).

    With ``helper_command`` in a context's section that command starts the
    helper, and starts it again should it die. Without it, and without the
    capability, the helper of `base_owner` runs and can do no more than the
    agent itself; any other is no use then.

    Raises:
        PrivilegesNotDropped: the process is root, or some thread still holds
            a capability.
        HelperNotStarted: it ended at its start, or its command failed, or
            there are no capabilities for it.
        ValueError: a section is wrong.
    """
    refuse_root()
    # They report their start in four lines and, at debug, every reply; oslo.log
    # writes the names of some of its loggers with a dot.
    for name in ("oslo_privsep", "oslo.privsep"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # All of the sections is read here. What is wrong with one would otherwise
    # end the helper at its start, and oslo.privsep would wait for it for ever.
    sections = {context: dict(context.conf) for context in contexts}
    commanded = [context for context in contexts if sections[context]["helper_command"]]
    forked = [context for context in contexts if context not in commanded]
    for context in forked:
        if (sections[context]["user"], sections[context]["group"]) != (None, None):
            raise ValueError(
                f"[{context.cfg_section}] user and group are for a helper that helper_command "
                "starts: set helper_command as well, or remove them"
            )
        _lower_expectations(context)
    os.register_at_fork(after_in_parent=drop_all)
    for context in forked:
        with _start_reported(context):
            _fork_helper(context)
    drop_all()
    for context in commanded:
        with _start_reported(context):
            context.start(Method.ROOTWRAP)
    _started.extend(contexts)
    verify()


def helpers_alive() -> bool:
    """Whether all helpers were started and no end of one has been noticed."""
    return bool(_started) and all(
        context.channel is not None and bool(context.channel.running) for context in _started
    )


def on_helper_exit(callback: Callable[[], None]) -> None:
    """Call `callback`, in a thread of its own, when a forked helper is gone.

    A forked helper cannot be started again, since the agent has nothing left
    to give it: the agent should end and let systemd start all. A helper
    started by ``helper_command`` comes back with the next call; it is not
    watched.
    """
    for context in _started:
        if context.channel is not None and not context.conf.helper_command:
            threading.Thread(
                target=_watch,
                args=(context.channel.reader_thread, callback),
                name=f"{context.cfg_section}-watch",
                daemon=True,
            ).start()


def stop_helpers(limit_s: float = _END_LIMIT_S) -> None:
    """Let the forked helpers end, and wait for it: systemd kills what is left, and says so.

    Belongs at the very end of the agent, when all else that it started has
    ended. A helper that hangs, as it can on a network file system, is left
    behind after `limit_s` seconds.
    """
    deadline = time.monotonic() + limit_s
    for context in _started:
        if not context.conf.helper_command:
            closing = threading.Thread(target=_close, args=(context,), daemon=True)
            closing.start()
            closing.join(max(0.0, deadline - time.monotonic()))
    # A process closes its socket before it has ended.
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_POLL_S)


def _close(context: HelperContext) -> None:
    with suppress(OSError):  # it is gone
        context.stop()


def _watch(reader: threading.Thread, callback: Callable[[], None]) -> None:
    reader.join()  # it ends at the end of file from the helper
    callback()


def refuse_root() -> None:
    """Raise `PrivilegesNotDropped` if any of the process's user ids is root's."""
    if 0 in os.getresuid():
        raise PrivilegesNotDropped(
            "the agent must not run as root: start it with 'systemctl start bootwright', "
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


def _fork_helper(context: HelperContext) -> None:
    """Start a helper by fork; what this starts in the agent has no capability."""
    # oslo.privsep starts a thread that reads from the helper before start()
    # returns, and it inherits what the thread has that starts it. So each fork is
    # made by a thread that has dropped all, in the hook, when it goes on; the
    # main thread keeps what the next helper needs.
    agent = os.getpid()
    failures: list[BaseException] = []

    def fork() -> None:
        try:
            context.start(Method.FORK)
        except BaseException as e:  # noqa: BLE001 - raised again, or it ends the helper
            if os.getpid() != agent:
                # This is the helper: it must not go on and be a second agent. It
                # logs through the agent, so without one that fails as well.
                try:
                    if not isinstance(e, ConnectionError):  # an agent that was killed
                        LOG.exception("the privileged helper could not start")
                finally:
                    os._exit(_EX_OSERR)
            failures.append(e)

    with _deaf_to_process_group():
        thread = threading.Thread(target=fork, name="fork")
        thread.start()
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def _start_reported(context: HelperContext) -> Iterator[None]:
    """Turn what a helper that does not start leads to into one sentence."""
    try:
        yield
    except (FailedToDropPrivileges, OSError) as e:
        raise HelperNotStarted(
            f"the privileged helper did not start ({e}): see the log above, and helper_command in "
            f"[{context.cfg_section}] if it is set"
        ) from e


def _lower_expectations(context: HelperContext) -> None:
    """Let a helper ask for no capability that this process cannot give; say what it lacks."""
    permitted = set(capabilities.get_caps()[1])
    wanted = set(context.conf.capabilities)
    missing = _names(wanted - permitted)
    if not missing:
        return
    if context is not base_owner:
        raise HelperNotStarted(
            f"started without {', '.join(missing)}, which [{context.cfg_section}] needs: "
            f"images_volume_group is set in [libvirt], so let the unit give them "
            f"(docs/operations.md, LVM), or unset it"
        )
    LOG.warning(
        "started without %s: last use of bases that libvirt has taken over will not be "
        "recorded, and such bases are kept longer than needed; start the agent through its "
        "systemd unit",
        ", ".join(missing),
    )
    cfg.CONF.set_override("capabilities", sorted(wanted & permitted), group=context.cfg_section)


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
