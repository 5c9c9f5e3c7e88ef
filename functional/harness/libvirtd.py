"""A private libvirtd and virtlogd, apart from the libvirt of the host.

Both run in mount namespaces of their own in which directories below `root` stand where libvirt
keeps its configuration, state, logs and caches, so no domain, network or file of the host's
libvirt is seen or touched. All else is the host's: disks may lie anywhere, and with Debian's DAC
driver files really become `libvirt-qemu`'s. Propagation is `slave`: mounts made later show up if
they are made on a shared mount, which systemd makes of / but a bare container does not.

Needs root and Debian's libvirt-daemon-system, libvirt-clients and qemu-system-x86; no systemd, no
cgroups, no D-Bus, no polkit.

What it does not do: isolate the network (it defines none) or limit domains. Domains are of type
`qemu`: KVM is hidden, so that tests run the same way on every host.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

# Answering takes 0.2 s; the rest is for a busy host.
_START_LIMIT_S: Final = 60.0
_END_LIMIT_S: Final = 15.0
_POLL_S: Final = 0.1

# sun_path holds 108 bytes with the final zero.
_SOCKET_PATH_LIMIT: Final = 107

_LIBVIRTD_CONF: Final = """\
unix_sock_group = "libvirt"
unix_sock_ro_perms = "0770"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:stderr"
"""

# "none" leaves DAC, which a privileged libvirtd always has, and takes away AppArmor, whose profiles
# know nothing of our directories. A /dev of each domain's own cannot be made over our hidden
# /dev/kvm. The user, dynamic_ownership and stdio_handler are Debian's own.
_QEMU_CONF: Final = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
"""

# Run inside the new mount namespace: what hides KVM, then source and target in turn, then `--` and
# the daemon. Libvirt installed but never started has no /run/libvirt yet, so an empty one is made.
_MOUNT_AND_EXEC: Final = """\
set -e
[ ! -e /dev/kvm ] || mount --bind "$1" /dev/kvm
shift
while [ "$1" != -- ]; do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
shift
exec "$@"
"""

_UNSHARE: Final = (
    *("unshare", "--mount", "--propagation", "slave", "--"),
    *("sh", "-c", _MOUNT_AND_EXEC, "sh"),
)


class PrivateLibvirtd:
    """One private libvirt below `root`; a context manager that starts it and ends it whole.

    Use `stop` and `start` for a libvirtd that goes away while its domains live on.

    Args:
        root: made if missing. Everybody may enter it, for whoever shall connect must reach the
            socket; its parents must allow that too (pytest's `tmp_path` does not). Its path must
            be short: the socket's is limited to 107 bytes.
        cache: stands for /var/cache/libvirt, if it shall outlive `root`: the capabilities of the
            emulators kept there save 1.5 s of every first domain.
        log_size: bytes after which virtlogd begins another file; None for its own 2 MiB.

    Attributes:
        uri: for `libvirt.open` or `virsh --connect`, by root and by members of group `libvirt`.
    """

    def __init__(
        self, root: Path, *, cache: Path | None = None, log_size: int | None = None
    ) -> None:
        self._root = root.absolute()
        self._log_size = log_size
        self._run = self._root / "run"
        self._mounts = {
            Path("/etc/libvirt"): self._root / "etc",
            Path("/run/libvirt"): self._run,
            Path("/var/lib/libvirt"): self._root / "lib",
            Path("/var/log/libvirt"): self._root / "log",
            Path("/var/cache/libvirt"): cache or self._root / "cache",
        }
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # only to reap what we started
        socket = self._run / "libvirt-sock"
        if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT:
            raise ValueError(f"{socket} is longer than a socket's path may be")
        self.uri = f"qemu:///system?socket={socket}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the daemons that are not running; returns when libvirtd answers.

        Raises:
            RuntimeError: a daemon ended; its log says why.
            TimeoutError: libvirtd did not answer in time.
        """
        self._write_configuration()
        for name in ("virtlogd", "libvirtd"):
            if not self._is_running(name):
                self._spawn(name)
        self._wait_until_it_answers()

    def stop(self) -> None:
        """End libvirtd alone, as on a host where it is restarted: domains and virtlogd live on."""
        self._end_daemon("libvirtd")

    def close(self) -> None:
        """Destroy every domain, then end both daemons; the files stay. May be called twice.

        Works on what an earlier process left running below the same `root` too.
        """
        # Through libvirt first, so that it gives back the disks; what it could not end, by pid.
        try:
            self._destroy_domains()
        finally:
            self._end_daemon("libvirtd")
            for pid_file in (self._run / "qemu").glob("*.pid"):
                _end_process(pid_file, f"guest={pid_file.stem},")
            self._end_daemon("virtlogd")

    def _write_configuration(self) -> None:
        for directory in (self._root, *self._mounts.values()):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)
        # Where /dev/kvm is root's alone (no udev), libvirt probes each emulator again for every
        # call, 4 s each: it sees KVM while probing, with CAP_DAC_OVERRIDE, and none afterwards.
        (self._root / "no-kvm").touch(mode=0)
        etc = self._mounts[Path("/etc/libvirt")]
        (etc / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
        (etc / "qemu.conf").write_text(_QEMU_CONF)
        limit = "" if self._log_size is None else f"max_size = {self._log_size}\n"
        (etc / "virtlogd.conf").write_text(limit)

    def _spawn(self, name: str) -> None:
        mounts = [os.fspath(path) for pair in self._mounts.items() for path in reversed(pair)]
        no_kvm = os.fspath(self._root / "no-kvm")
        with self._log(name).open("ab") as log:
            child = subprocess.Popen(
                [*_UNSHARE, no_kvm, *mounts, "--", name, "--pid-file", self._marker(name)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests; they end the daemons in order
            )
        self._children[name] = child
        # unshare and sh replace themselves, so this is the daemon's pid, known at once.
        self._pid_file(name).write_text(str(child.pid))

    def _pid_file(self, name: str) -> Path:
        return self._root / f"{name}.pid"

    def _marker(self, name: str) -> str:
        """What only our daemon has on its command line: its own pid file."""
        return os.fspath(self._run / f"{name}.pid")

    def _is_running(self, name: str) -> bool:
        process = _open_process(self._pid_file(name), self._marker(name))
        if process is not None:
            os.close(process)
        return process is not None

    def _log(self, name: str) -> Path:
        return self._root / f"{name}.log"

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        virtlogd_socket = self._run / "virtlogd-sock"
        while not virtlogd_socket.exists() or self._virsh("uri").returncode != 0:
            for name, child in self._children.items():
                if child.poll() is not None:
                    log = self._log(name).read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{name} ended with status {child.returncode}: {log}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"libvirtd at {self.uri} does not answer")
            time.sleep(_POLL_S)

    def domains(self) -> dict[str, str]:
        """Every domain that is defined or runs: uuid to libvirt's word for its state."""
        uuids = self._virsh("list", "--all", "--uuid").stdout.split()
        states = {uuid: self._virsh("domstate", uuid).stdout.strip() for uuid in uuids}
        return {uuid: state for uuid, state in states.items() if state}

    def is_starting(self, name: str) -> bool:
        """Whether libvirtd has taken up the start of a domain; it holds its lock meanwhile."""
        return any((self._mounts[Path("/var/lib/libvirt")] / "qemu").glob(f"domain-*-{name}"))

    def qemu_pid(self, name: str) -> int:
        """The process of a domain that runs."""
        return int((self._run / "qemu" / f"{name}.pid").read_text())

    @contextmanager
    def frozen(self, daemon: str = "libvirtd") -> Iterator[None]:
        """Stop a daemon in its tracks for the time of the block: it answers nobody.

        With `virtlogd` frozen, domains can be defined, and not one of them comes to its start.
        """
        process = _open_process(self._pid_file(daemon), self._marker(daemon))
        if process is None:
            raise RuntimeError(f"{daemon} does not run")
        try:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            yield
        finally:
            signal.pidfd_send_signal(process, signal.SIGCONT)
            os.close(process)

    def virsh(self, *arguments: str) -> str:
        """Do what somebody with a shell does; return what virsh prints. Raises if it fails."""
        done = self._virsh(*arguments)
        if done.returncode != 0:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def kept(self) -> list[Path]:
        """What there is of firmware variables and TPMs, of whichever domain."""
        directories = ("lib/qemu/nvram", "lib/swtpm")
        return [path for name in directories for path in (self._root / name).glob("*")]

    def _destroy_domains(self) -> None:
        for domain in self._virsh("list", "--uuid").stdout.split():
            self._virsh("destroy", domain)

    def _virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_LIMIT_S,
        )

    def _end_daemon(self, name: str) -> None:
        _end_process(self._pid_file(name), self._marker(name))
        if child := self._children.pop(name, None):
            child.wait(_END_LIMIT_S)


def _open_process(pid_file: Path, marker: str) -> int | None:
    """A pidfd of the process a pid file names, None if it is gone.

    A pid is given to another process some day, so its command line must contain `marker`.
    """
    try:
        pid = int(pid_file.read_text())
        process = os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    try:
        # Read with the pidfd held: if it is the right process now, the pidfd is its.
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        command = ""
    if marker in command:
        return process
    os.close(process)
    return None


def _end_process(pid_file: Path, marker: str) -> None:
    """SIGTERM, and SIGKILL for what does not end in time; returns when the process is gone."""
    process = _open_process(pid_file, marker)
    if process is None:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], _END_LIMIT_S)[0]:
                return
    finally:
        os.close(process)
