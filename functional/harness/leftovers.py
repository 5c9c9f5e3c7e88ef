"""What an agent has on disk and in libvirt, so that a test can see that nothing was left."""

import time

from functional.harness.agent import Agent
from functional.harness.libvirtd import PrivateLibvirtd

_SETTLE_S = 10.0
_TRACEBACK = "Traceback (most recent call last)"


class Leftovers:
    """What is there now is what was there before; `assert_none` looks for more."""

    def __init__(self, agent: Agent, libvirtd: PrivateLibvirtd) -> None:
        self._agent = agent
        self._libvirtd = libvirtd
        self._before = self._all()

    def assert_none(self) -> None:
        """No file, partial or domain has come, and no defect is in the agent's log.

        A fetch that nobody waits for any more removes its partial in its own
        time, so what is there may take a moment to go.
        """
        deadline = time.monotonic() + _SETTLE_S
        while (left := self._all() - self._before) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left behind: {sorted(left)}"
        assert _TRACEBACK not in self._agent.log

    def _all(self) -> frozenset[str]:
        # Lock files stay by design: one that is unlinked locks nothing.
        locks = self._agent.bases / ".locks"
        files = {
            str(path)
            for path in self._agent.instances.rglob("*")
            if path != locks and locks not in path.parents
        }
        return frozenset(files | {f"domain {uuid}" for uuid in self._libvirtd.domains()})
