"""Trouble at one step of the agent's on the file system, brought about from outside of it.

    steps = Steps(directory, below=[agent.instances])
    agent = Agent(root, options, environment=steps.environment)
    agent.start()
    steps.arm(agent.pid, KILLED, at=17)
    ...
    taken = steps.disarm()

`steps.c` is built with gcc and loaded into the agent before libc; it says what a step is. Arming
costs no restart. Threads take their steps in whatever order they come to them, so the seventeenth
is not the same one in each run: `Taken.hit` says which it was.
"""

import enum
import mmap
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("steps.c")
# `struct control` of steps.c.
_LAYOUT: Final = struct.Struct("=QQIIIiiI472s")
_ARMED_AT: Final = 16


class Kind(enum.IntFlag):
    """What a step does; the numbers are those of steps.c."""

    CREATE = 1
    WRITE = 2
    RESIZE = 4
    SYNC = 8
    RENAME = 16
    LINK = 32
    REMOVE = 64
    MKDIR = 128
    ATTRIBUTES = 256
    COPY = 512
    ALLOCATE = 1024


ALL: Final = Kind(2047)


class Action(enum.IntEnum):
    """What becomes of the step; the numbers are those of steps.c."""

    KILL = 1  # SIGKILL just before it
    FAIL = 2  # It is not taken and the call fails.
    SHORTEN = 3  # Half of the bytes are written, and the call says so.
    TEAR = 4  # Half of the bytes are written, then SIGKILL.


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """What is to happen at a step, and to which kinds of step."""

    action: Action
    kinds: Kind = ALL
    error: int = 0
    """errno, of FAIL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What happened while it was armed."""

    count: int
    """Steps of those kinds."""
    hit: str | None
    """The step that went wrong: kind and path; None if it did not come to that."""


class Steps:
    """Counts the steps of one agent.

    Args:
        directory: where the library and the control file are made; the agent must reach it.
        below: only steps on paths that begin like one of these count.

    Attributes:
        environment: what the agent has to be started with.
    """

    def __init__(self, directory: Path, below: Sequence[Path]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        library = directory / "steps.so"
        if not library.exists():
            flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
            subprocess.run(["gcc", *flags, "-o", library, _SOURCE, "-ldl"], check=True, timeout=60)
        control = directory / "control"
        control.write_bytes(bytes(_LAYOUT.size))
        control.chmod(0o666)
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.environment = {
            "LD_PRELOAD": os.fspath(library),
            "BOOTWRIGHT_STEPS": os.fspath(control),
            "BOOTWRIGHT_STEPS_BELOW": ":".join(map(os.fspath, below)),
        }

    def arm(self, pid: int, trouble: Trouble, *, at: int = 0) -> None:
        """Count from now on; let step `at`, counted from 1, go wrong, or none if it is 0.

        `pid` is the agent's, which is killed whichever of its processes takes the step.
        """
        kinds, error = int(trouble.kinds), trouble.error
        _LAYOUT.pack_into(self._memory, 0, 0, at, 0, trouble.action, kinds, error, pid, 0, b"")
        # The rest has to be there first.
        struct.pack_into("=I", self._memory, _ARMED_AT, 1)

    @property
    def count(self) -> int:
        count: int = struct.unpack_from("=Q", self._memory)[0]
        return count

    @property
    def hit(self) -> bool:
        return bool(_LAYOUT.unpack_from(self._memory)[7])

    def disarm(self) -> Taken:
        struct.pack_into("=I", self._memory, _ARMED_AT, 0)
        values = _LAYOUT.unpack_from(self._memory)
        kind, _, path = values[8].partition(b"\0")[0].decode(errors="replace").partition(" ")
        hit = f"{Kind(int(kind)).name} {path}" if values[7] else None
        return Taken(count=values[0], hit=hit)
