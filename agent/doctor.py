"""The doctor: looks at everything the agent needs of its host, and needs no agent for it.

It looks with the eyes of the agent's user, since root may do what that user may not. To have
it look at something more is to write a check (see `agent.checks`) and add it to `CHECKS`.
"""

import os
import pwd
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent.checks import error, filesystem, host, ok, outside, warning
from agent.config import ConfigError, Configuration
from agent.settings import Settings
from agent.views import Finding

Check = Callable[[Settings], Iterable[Finding]]

CHECKS: Final[tuple[Check, ...]] = (
    host.groups,
    host.unit,
    host.capabilities,
    filesystem.directories,
    filesystem.space,
    filesystem.features,
    filesystem.records,
    filesystem.hosts,
    outside.libvirt,
    outside.network,
    host.virtualization,
    host.programs,
    host.kernel,
    outside.images,
    outside.ceph,
    host.clock,
    outside.agent,
)

_LIMIT_S: Final = 60.0
"""For all checks together, which run at the same time: a share that hangs keeps none of the
others from being told."""


class Stranger(PermissionError):
    """Somebody asks who can see nothing of what the agent's user sees."""


def become(user: str) -> Finding:
    """Let this process, if it is root's, be the agent's user from now on.

    Raises:
        Stranger: it is neither root's nor that user's.
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return error(
            "user",
            f"there is no user {user}",
            "systemd-sysusers bootwright.conf makes it, see docs/operations.md",
        )
    if os.geteuid() == 0:
        os.initgroups(user, account.pw_gid)
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    if os.geteuid() != account.pw_uid:
        # What is shut to others would look like a defect, and the hints would open it.
        raise Stranger(
            f"the doctor looks at what {user} may do: run it as root, or as {user} itself; "
            "'bootwright status' is for whoever may use the socket"
        )
    return ok("user", f"all below is what {user} sees")


def examine(
    read: Callable[[], Configuration],
    *,
    socket: Path | None = None,
    checks: Sequence[Check] = CHECKS,
    limit_s: float = _LIMIT_S,
) -> list[Finding]:
    """Return what there is to say about this host; without usable settings, about them only.

    `socket` is where the agent is, if not where the configuration says.
    """
    name = "configuration"
    hint = "'bootwright config check' tells the same, docs/configuration.md what may stand there"
    try:
        configuration = read()
        settings = configuration.settings()
        if socket is not None:
            settings = replace(settings, api=replace(settings.api, socket=socket))
    except ConfigError as e:
        return [error(name, problem, hint) for problem in e.problems]
    warnings = [warning(name, text, hint) for text in configuration.warnings()]
    found = warnings or [ok(name, "the agent can start with it")]
    examinations = [_Examination(check, settings) for check in checks]
    deadline = time.monotonic() + limit_s
    for examination in examinations:
        found += examination.findings(max(0.0, deadline - time.monotonic()), limit_s)
    return found


class _Examination:
    """One check in a thread of its own, that nobody waits for too long."""

    def __init__(self, check: Check, settings: Settings) -> None:
        self._name = check.__name__.lstrip("_").replace("_", " ")
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, args=(check, settings), daemon=True)
        self._thread.start()

    def _run(self, check: Check, settings: Settings) -> None:
        try:
            for finding in check(settings):
                self._found.append(finding)
        except OSError as e:
            self._found.append(error(self._name, str(e), "see the kernel's log"))
        except Exception as e:  # noqa: BLE001 - one check more or less, the others count
            hint = "a defect of the doctor: please report it"
            self._found.append(warning(self._name, f"could not be looked at: {e!r}", hint))

    def findings(self, timeout_s: float, limit_s: float) -> list[Finding]:
        self._thread.join(timeout_s)
        found = list(self._found)
        if self._thread.is_alive():
            hint = "something it asked hangs: a network file system, libvirt, a name server?"
            found.append(error(self._name, f"no answer within {limit_s:g} s", hint))
        return found
