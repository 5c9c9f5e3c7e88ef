"""The one door to other programs.

Each runs with an argument list (never a shell), a time limit, nothing on its
standard input, an environment of a few known names, its own session that is
killed as a whole, and its last words in the error. What reads the work of
strangers runs confined.
"""

import contextlib
import enum
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from agent.cancellation import Cancellation
from agent.confinement import Confinement, confined

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INHERITED = ("HOME", "TMPDIR")
_STDOUT_LIMIT = 16 << 20  # bytes; JSON of qemu-img is a few KiB
_STDERR_KEPT = 8 << 10  # bytes from the end: that is where programs say why

_DEBIAN_PACKAGES = {
    "cryptsetup": "cryptsetup-bin",
    "lvm": "lvm2",
    "qemu-img": "qemu-utils",
    "prlimit": "util-linux",
    "fallocate": "util-linux",
    "mkswap": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "ploop": "ploop",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use up; None is no limit. Sizes are bytes."""

    cpu_s: int | None = None
    address_space: int | None = None
    file_size: int | None = None
    """Of any one file it writes."""


NO_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    stdout: bytes
    stderr: str


class Cause(enum.StrEnum):
    """Why a program did not do what it was asked to."""

    EXIT = "exit"
    """It said so itself, or died of a signal of its own making."""
    TIMEOUT = "timeout"
    CPU = "cpu limit"
    FILE_SIZE = "file size limit"
    OUTPUT = "output limit"
    MISSING = "missing"
    START = "start"
    """The kernel would not start it, or not confine it; it has not run."""


class ProgramFailed(Exception):
    """A program was not there, was stopped, or ended with an unexpected status.

    Whoever called `run` knows what was attempted and translates it.
    """

    def __init__(
        self, argv: tuple[str, ...], cause: Cause, status: int | None = None, stderr: str = ""
    ) -> None:
        super().__init__(argv, cause, status, stderr)
        self.argv = argv
        self.cause = cause
        self.status = status
        """The exit status, or minus the signal; None if it never ran."""
        self.stderr = stderr
        """The end of what it wrote there."""

    def __str__(self) -> str:
        name = Path(self.argv[0]).name
        if self.cause is Cause.MISSING:
            package = debian_package(name)
            where = f"; on Debian it is in the package {package}" if package else ""
            return f"the program {self.argv[0]} is not installed{where}"
        match self.cause:
            case Cause.EXIT:
                how = f"{name} ended with {_status_text(self.status)}"
            case Cause.TIMEOUT:
                how = f"{name} was stopped because it took too long"
            case Cause.START:
                how = f"{name} could not be started"
            case _:
                how = f"{name} was stopped at its {self.cause}"
        return f"{how}: {self.stderr}" if self.stderr else how


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    cancellation: Cancellation | None = None,
    limits: Limits = NO_LIMITS,
    cwd: Path | None = None,
    pass_fds: Collection[int] = (),
    confinement: Confinement | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Completed:
    """Run a program to its end and return what it said.

    Args:
        argv: the program's name or absolute path, then its arguments. A file
            name that came from outside must be absolute or follow a `--`.
        timeout_s: wall-clock seconds, cut short by the cancellation's deadline.
        confinement: what it may reach; None for all that we may.
        environment: over the few names it gets in any case.

    Raises:
        ProgramFailed: see `Cause`. Whatever it started in its session is dead.
        BootwrightError: the reason of the cancellation.
    """
    if cancellation is not None:
        cancellation.check()
    words = tuple(os.fspath(word) for word in argv)
    # Popen has no rlimits and preexec_fn is not safe in a process with threads.
    # prlimit(1) costs one more exec: 1.3 ms beside the 6.5 ms of `qemu-img info`.
    program = _located(words, words[0])
    command = [*_limiting(limits), program, *words[1:]]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**_environment(limits), **environment},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            umask=0o027,
        )

    try:
        process = start() if confinement is None else confined(start, confinement, Path(program))
    except OSError as e:
        raise ProgramFailed(words, Cause.START, stderr=str(e)) from e
    with process:
        return _Run(process, words, timeout_s, cancellation).finish()


def debian_package(program: str) -> str | None:
    """Return the Debian package that has a program, if it is one of those we start."""
    return _DEBIAN_PACKAGES.get(program)


class _Run:
    """One started program, until it is reaped."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        argv: tuple[str, ...],
        timeout_s: float,
        cancellation: Cancellation | None,
    ) -> None:
        self._process = process
        self._argv = argv
        self._cancellation = cancellation
        left = None if cancellation is None else cancellation.remaining()
        self._ends = time.monotonic() + (timeout_s if left is None else min(timeout_s, left))
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._stopped: Cause | None = None
        # Between kill and reap: a process id may belong to a stranger as soon
        # as the old owner has been waited for.
        self._reaping = threading.Lock()

    def finish(self) -> Completed:
        forget = (
            self._cancellation.on_cancel(self._kill)
            if self._cancellation is not None
            else lambda: None
        )
        try:
            self._pump()
        finally:
            forget()
            # What it may have left running in its session goes with it.
            self._kill()
            with self._reaping:
                status = self._process.wait()
        if self._cancellation is not None:
            self._cancellation.check()
        stderr = bytes(self._stderr).decode(errors="replace").strip()
        if self._stopped is not None or status != 0:
            raise ProgramFailed(self._argv, self._stopped or _cause(status), status, stderr)
        return Completed(stdout=bytes(self._stdout), stderr=stderr)

    def _kill(self) -> None:
        with self._reaping:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _pump(self) -> None:
        """Read both pipes until the program has ended and they are drained."""
        exited = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for pipe, into in (
                    (self._process.stdout, self._stdout),
                    (self._process.stderr, self._stderr),
                ):
                    if pipe is not None:
                        selector.register(pipe, selectors.EVENT_READ, into)
                selector.register(exited, selectors.EVENT_READ)
                while selector.get_map():
                    ready = selector.select(self._wait_s())
                    if not ready:
                        self._stop(Cause.TIMEOUT)
                    for key, _ in ready:
                        if key.fd == exited:
                            # A child of its own may hold the pipes open.
                            self._kill()
                            selector.unregister(exited)
                        elif not self._read(key.fd, key.data):
                            selector.unregister(key.fileobj)
        finally:
            os.close(exited)

    def _wait_s(self) -> float | None:
        # Once killed it can only end, so there is nothing left to time.
        return None if self._stopped else max(0.0, self._ends - time.monotonic())

    def _read(self, fd: int, into: bytearray) -> bool:
        """Take what there is; False at the end."""
        data = os.read(fd, 1 << 16)
        into += data
        if into is self._stderr:
            del into[:-_STDERR_KEPT]
        elif len(into) > _STDOUT_LIMIT:
            into.clear()
            self._stop(Cause.OUTPUT)
        return bool(data)

    def _stop(self, cause: Cause) -> None:
        self._stopped = self._stopped or cause
        self._kill()


def _environment(limits: Limits) -> dict[str, str]:
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    if limits.address_space is not None:
        # glibc reserves 64 MiB of addresses for each thread's arena. With them
        # qemu-img convert failed now and then even at 512 MiB, depending on
        # how many threads it happened to have; with one arena never, at 256.
        environment["MALLOC_ARENA_MAX"] = "1"
    return environment


def _located(argv: tuple[str, ...], program: str) -> str:
    found = shutil.which(program, path=PATH)
    if found is None:
        raise ProgramFailed(argv, Cause.MISSING)
    return found


def _limiting(limits: Limits) -> list[str]:
    if limits == NO_LIMITS:
        return []
    # A hostile image that makes a program crash must not also fill the disk
    # with its core.
    options = ["--core=0"]
    if limits.cpu_s is not None:
        # At the soft limit the kernel sends SIGXCPU, which says what happened;
        # at the hard one SIGKILL, which does not.
        options.append(f"--cpu={limits.cpu_s}:{limits.cpu_s + 5}")
    if limits.address_space is not None:
        options.append(f"--as={limits.address_space}")
    if limits.file_size is not None:
        options.append(f"--fsize={limits.file_size}")
    return [_located(("prlimit",), "prlimit"), *options, "--"]


def _cause(status: int) -> Cause:
    if status == -signal.SIGXCPU:
        return Cause.CPU
    if status == -signal.SIGXFSZ:
        return Cause.FILE_SIZE
    return Cause.EXIT


def _status_text(status: int | None) -> str:
    if status is not None and status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"status {status}"
