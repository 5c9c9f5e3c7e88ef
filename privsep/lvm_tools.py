"""How the helper runs the tools of LVM and cryptsetup, which have to be given its capabilities."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from typing import Final

from oslo_privsep import capabilities

LIMIT_S: Final = 240.0

_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2  # prctl(2)

_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "LVM_SUPPRESS_FD_WARNINGS": "1",
}

# An unprivileged user may not do either: give LVM a priority of its own, start dmeventd.
# Pools are watched by root's lvm2-monitor.service, which this leaves as it is.
_CONFIGURATION: Final = ("--config", "activation{process_priority=0 monitoring=0}")


def lvm(command: str, *words: str) -> str:
    """Run one command of lvm(8); return what it printed.

    Raises:
        RuntimeError: it failed, took too long or is not installed; says how.
    """
    return run("lvm", command, *_CONFIGURATION, *words)


def run(*argv: str, given: bytes = b"", accept: Sequence[int] = (0,)) -> str:
    """Run a tool with the capabilities of this process; return what it printed. Raises as `lvm`."""
    _hand_on()
    try:
        done = subprocess.run(
            argv,
            input=given,
            capture_output=True,
            env=_ENVIRONMENT,
            cwd="/",
            timeout=LIMIT_S,
            check=False,
        )
    except FileNotFoundError as e:
        package = "cryptsetup-bin" if argv[0] == "cryptsetup" else "lvm2"
        raise RuntimeError(
            f"the program {argv[0]} is not installed; on Debian it is in the package {package}"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"{' '.join(argv[:2])} took more than {LIMIT_S:g} s") from e
    if done.returncode not in accept:
        said = done.stderr.decode(errors="replace").splitlines()
        why = "; ".join(line.strip() for line in said if "WARNING" not in line)
        raise RuntimeError(f"{' '.join(argv[:2])} ended with status {done.returncode}: {why}")
    return done.stdout.decode()


def _hand_on() -> None:
    """Let what this thread starts have the capabilities of the thread.

    They would end at exec(2): the helper is not root and is not meant to be.
    """
    _, permitted, _ = capabilities.get_caps()
    capabilities.drop_all_caps_except(permitted, permitted, permitted)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in permitted:
        if prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
