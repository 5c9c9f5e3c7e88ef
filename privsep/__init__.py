"""The whole elevated surface of Bootwright.

Every function that runs with a capability stands in this package, takes names
and not paths, and decides for itself whether it may act: whoever calls it may
have been taken over. One context is one process with the capabilities of one task.

Nothing here starts or stops the helper (`agent.privileges` does), and nothing
here imports the agent: what the helper loads is what it can be made to run.

Arguments, results and exceptions travel as msgpack: `str`, `int`, `bool`,
`bytes`, `dict` and tuples, and exceptions of the standard library only.
"""

import os
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar, cast

from oslo_config import cfg
from oslo_privsep import capabilities
from oslo_privsep.priv_context import Method, PrivContext

from privsep import options

P = ParamSpec("P")
R = TypeVar("R")

CALL_TIMEOUT: Final = 10.0
"""Seconds until a call that does not come back (a dead network filesystem) is given up."""

VOLUME_TIMEOUT: Final = 300.0
"""The same for a call that runs a tool of LVM, which may have to wait for another's lock."""

# A directory is only a place to stand on: O_PATH asks for no read permission on it, and
# O_NOFOLLOW refuses the last component if it is a symbolic link.
OPEN_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class HelperContext(PrivContext):
    """A context that never turns to sudo unless it was told to.

    oslo.privsep answers a missing helper by running ``sudo privsep-helper``.
    On a host set up for a forked helper that is at best a password prompt
    nobody sees and at worst a helper with more power than was meant.
    """

    def start(self, method: Method = Method.ROOTWRAP) -> None:
        """Start the helper.

        Raises:
            ConnectionError: the helper would have to be started by a command
                and none is configured. Any call through the context raises
                it when the helper was never started or is dead.
        """
        if method is Method.ROOTWRAP and not self.conf.helper_command:
            raise ConnectionError(f"[{self.cfg_section}] the privileged helper is not running")
        super().start(method)

    def entrypoint(self, function: Callable[P, R]) -> Callable[P, R]:  # type: ignore[override]
        """Run `function` in the helper of this context; its signature stays visible."""
        return cast("Callable[P, R]", super().entrypoint(function))


base_owner = HelperContext(
    "privsep",
    cfg_section="privsep_base_owner",
    pypath="privsep.base_owner",
    capabilities=[capabilities.CAP_FOWNER],
    timeout=CALL_TIMEOUT,
)

# Found out by taking away: device-mapper asks for CAP_SYS_ADMIN, its nodes and LVM's
# locks are root's, and LVM reads devices with O_NOATIME, which takes CAP_FOWNER.
volumes = HelperContext(
    "privsep",
    cfg_section="privsep_volumes",
    pypath="privsep.volumes",
    capabilities=[
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_FOWNER,
        capabilities.CAP_SYS_ADMIN,
    ],
    timeout=VOLUME_TIMEOUT,
)

options.register(cfg.CONF)
