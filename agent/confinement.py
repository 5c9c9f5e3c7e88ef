"""What a program may reach: the files it is given, the system's own, and no network.

A program that reads what strangers made can be made to do what strangers want.
Landlock takes the files away from it, seccomp the sockets. Both need no
privilege, bind the thread that asks and all that it starts, and can never be
taken back; so a thread is made that asks, starts the program and ends.

That adds 0.3 ms to a run (of 7 ms in all, for `qemu-img info`). Bubblewrap was
not to be had: the unit forbids the namespaces it is made of. A launcher of our
own costs 20 ms for its interpreter, and a transient unit a question to systemd
that the service user may not ask.

Limits on time and memory are the business of `process`.
"""

import ctypes
import errno
import functools
import logging
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# Where programs and libraries are; no secrets lie there.
_SYSTEM = tuple(
    path
    for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"))
    if path.exists()
)
_NULL = Path("/dev/null")

# linux/landlock.h. The numbers of the calls are the same on every machine that
# qemu runs guests on with KVM (asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULESET = struct.Struct("=QQQ")  # files, TCP ports, scopes
_PATH_BENEATH = struct.Struct("=Qi")
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _, _REMOVE_FILE, _, _MAKE_DIR, _MAKE_FILE = (
    1 << bit for bit in range(9)
)
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
# How many kinds of access to files an ABI knows, from ABI 1 on.
_FILE_RIGHTS = (13, 14, 15, 15, 16)
_TCP_SINCE, _TCP = 4, 0b11  # bind, connect
_SCOPES_SINCE, _SCOPES = 6, 0b11  # abstract UNIX sockets, signals

_SET_SECCOMP, _SET_NO_NEW_PRIVS = 22, 38  # prctl(2)
_MODE_FILTER = 2
# linux/audit.h's name of the machine, and its number of socket(2).
_SOCKET_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_IO_URING_SETUP = 425  # with it sockets can be had without socket(2)
_OTHER_CALLS = 0x40000000  # from here on x86 numbers all calls once more, for x32

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """What a program may reach, beside programs and libraries. All of it must exist."""

    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    """Files and block devices; they may be read, written and cut, but neither made nor removed.

    `/proc/self/fd/N` is the file behind a descriptor.
    """
    workplaces: tuple[Path, ...] = ()
    """Directories in which files may also be made and removed."""


def confined(start: Callable[[], T], confinement: Confinement, program: Path) -> T:
    """Return what `start` returns; any process it starts is confined, we are not.

    It is called in a thread of its own, which reaches no more than the process
    will. `program` is the executable, wherever it lies.

    Raises:
        OSError: the confinement cannot be had; `start` has not been called.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _confine_this_thread(confinement, program)
            outcome.append(start())
        except BaseException as e:  # noqa: BLE001 - it goes on in the caller's thread
            errors.append(e)

    thread = threading.Thread(target=run, name="confined")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]


def _confine_this_thread(confinement: Confinement, program: Path) -> None:
    abi = landlock_abi()
    _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    if abi:
        ruleset = _ruleset(confinement, program, abi)
        try:
            _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
        finally:
            os.close(ruleset)
    _forbid_sockets()


@functools.cache
def landlock_abi() -> int:
    """Return how much of Landlock the kernel has; 0 is none of it."""
    abi: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if abi >= 1:
        return abi
    LOG.warning(
        "programs that read images can reach every file that this user can, because the kernel "
        "refuses Landlock: %s (it needs Linux 5.13, 'landlock' among its lsm=, and the landlock_* "
        "calls in the unit's SystemCallFilter=)",
        errno.errorcode.get(ctypes.get_errno(), "?"),
    )
    return 0


def _ruleset(confinement: Confinement, program: Path, abi: int) -> int:
    """Return a file descriptor of what is allowed; everything else is not."""
    handled = (1 << _FILE_RIGHTS[min(abi, len(_FILE_RIGHTS)) - 1]) - 1
    attributes = _RULESET.pack(
        handled,
        _TCP if abi >= _TCP_SINCE else 0,
        _SCOPES if abi >= _SCOPES_SINCE else 0,
    )
    # Older kernels know a shorter one, and accept this if the rest is zeros.
    ruleset = _check(
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    read_and_write = (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & handled
    try:
        for path in (*_SYSTEM, program):
            _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
        for path in confinement.readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in (_NULL, *confinement.writable):
            _allow(ruleset, path, read_and_write)
        inside = _READ_DIR | _MAKE_DIR | _MAKE_FILE | _REMOVE_FILE
        for path in confinement.workplaces:
            _allow(ruleset, path, read_and_write | inside)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: Path, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            access &= ~_READ_DIR
        if not stat.S_ISBLK(mode):
            access &= ~_IOCTL_DEV  # whoever formats a disk asks it for its size
        rule = _PATH_BENEATH.pack(access, fd)
        _check(_libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0), f"a rule for {path}")
    finally:
        os.close(fd)


class _Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _forbid_sockets() -> None:
    """Have socket(2) fail with EACCES: no network, and no way to the host's daemons."""
    filter_ = _socket_filter()
    if filter_ is None:
        return
    program = _Program(len(filter_) // 8, filter_)
    done = _libc.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0)
    _check(done, "PR_SET_SECCOMP")


@functools.cache
def _socket_filter() -> bytes | None:
    """Return the filter in classic BPF; None on a machine whose numbers are not known here."""
    numbers = _SOCKET_CALLS.get(os.uname().machine)
    if numbers is None or sys.maxsize < 1 << 32:  # 32-bit programs have other numbers
        return None
    machine, socket_call = numbers
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000
    # Operation, how many to skip if so, if not so, operand.
    return b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (load, 0, 0, 4),  # seccomp_data.arch
            (equal, 1, 0, machine),
            (answer, 0, 0, kill),
            (load, 0, 0, 0),  # seccomp_data.nr
            (equal, 3, 0, socket_call),
            (equal, 2, 0, _IO_URING_SETUP),
            (at_least, 1, 0, _OTHER_CALLS),
            (answer, 0, 0, allow),
            (answer, 0, 0, deny),
        )
    )


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} ({what})")
    return result
