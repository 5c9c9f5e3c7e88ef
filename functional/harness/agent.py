"""The agent as it is installed, run as its unit runs it, and its command line.

The console script of the environment under test is started as user `bootwright`
with `CAP_FOWNER` and nothing else, which is what etc/bootwright.service asks
systemd for; setpriv takes systemd's place.
"""

import hashlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from agent.client import Client
from functional.harness.launcher import Launcher, Started

PROGRAM: Final = Path(sys.prefix, "bin/bootwright")
USER: Final = "bootwright"
CHECKOUT: Final = Path(__file__).parents[2]

_START_LIMIT_S: Final = 60.0
_STOP_LIMIT_S: Final = 90.0

Options = Mapping[str, Mapping[str, object]]
"""Sections of the configuration: name to options."""


def as_service(*capabilities: str) -> list[str]:
    """Return what a command line begins with that runs as the unit's user with so much power."""
    sets = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return [
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--no-new-privs"),
        *(f"--inh-caps={sets}", f"--ambient-caps={sets}", f"--bounding-set={sets}"),
    ]


class AgentError(Exception):
    """The agent or its command line did something no test expects."""


def make_user() -> pwd.struct_passwd:
    """Return the service user, made as the package makes it if it is missing."""
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        sysusers = CHECKOUT / "etc/bootwright.sysusers"
        subprocess.run(["systemd-sysusers", sysusers], check=True, stdin=subprocess.DEVNULL)
        return pwd.getpwnam(USER)


class Agent:
    """One agent with everything it owns below `root`; a context manager that starts and stops it.

    `root` is made, and has to be where the service user and QEMU's can go.
    `capabilities`: what it is started with. `launcher`: starts it in place of its console script.
    """

    def __init__(
        self,
        root: Path,
        options: Options,
        *,
        capabilities: Sequence[str] = ("fowner",),
        launcher: Launcher | None = None,
    ) -> None:
        self.root = root
        self._capabilities = capabilities
        self._launcher = launcher
        self.instances = root / "instances"
        self.bases = self.instances / "_base"
        self.socket = root / "bootwright.sock"
        self.log_path = root / "agent.log"
        self._config = root / "bootwright.conf"
        self._options: Options = {}
        self._process: subprocess.Popen[bytes] | Started | None = None
        account = make_user()
        for directory in (root, self.instances):
            directory.mkdir(mode=0o711, exist_ok=True)
            directory.chmod(0o711)
            os.chown(directory, account.pw_uid, account.pw_gid)
        self.configure(options)

    def configure(self, options: Options) -> None:
        """Write the configuration; it counts from the next start."""
        self._options = options
        merged: dict[str, dict[str, object]] = {
            "DEFAULT": {"instances_path": self.instances, "state_path": self.root},
            "api": {"socket": self.socket},
            # A slow Glance is how a test holds a fetch, and the requests are what it looks at.
            "glance": {"max_connections_per_image": 1},
        }
        for section, values in options.items():
            merged.setdefault(section, {}).update(values)
        lines = []
        for section, values in merged.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
        self._config.write_text("\n".join(lines) + "\n")

    def configure_more(self, options: Options) -> None:
        """Write the configuration it has, with some options changed."""
        merged = {section: dict(values) for section, values in self._options.items()}
        for section, values in options.items():
            merged.setdefault(section, {}).update(values)
        self.configure(merged)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise AgentError("the agent does not run")
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def base(self, image_id: str) -> Path:
        return self.bases / hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()

    def partial(self, image_id: str) -> Path:
        return self.bases / ".partial" / self.base(image_id).name

    def start(self) -> None:
        """Return when it serves."""
        with self.log_path.open("ab") as log:
            self._process = self._launched(log)
        deadline = time.monotonic() + _START_LIMIT_S
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AgentError(f"the agent did not start:\n{self.log[-4000:]}")
            time.sleep(0.02)

    def _launched(self, log: IO[bytes]) -> subprocess.Popen[bytes] | Started:
        if self._launcher is not None:
            return self._launcher.start(self.command("agent"), log)
        return subprocess.Popen(
            [*as_service(*self._capabilities), *self.command("agent")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
        )

    def _serves(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(os.fspath(self.socket))
            except OSError:
                return False
        return True

    def stop(self) -> int:
        """Ask it to end, as systemd does; return its exit status. Done already is 0."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AgentError(f"the agent did not stop:\n{self.log[-4000:]}") from None
        self._process = None
        return status

    def wait_end(self, limit_s: float) -> int:
        """Wait until it has ended by itself; return its exit status."""
        if self._process is None:
            raise AgentError("the agent does not run")
        status = self._process.wait(limit_s)
        self._process = None
        return status

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def close(self) -> None:
        """End it, and delete its instances: the next test shall find an empty libvirt."""
        try:
            if self._process is not None and self._process.poll() is None and self._serves():
                # Not through the command line, which would take a second for each.
                with Client(self.socket) as client:
                    for instance in client.instances():
                        client.wait(client.delete_instance(instance.uuid).id, _STOP_LIMIT_S)
        finally:
            self.stop()

    # The command line

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the argument vector of `bootwright …` for this agent."""
        return [os.fspath(a) for a in (PROGRAM, "--config-file", self._config, *arguments)]

    def run(
        self, *arguments: str | Path, stdin: str | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run `bootwright …` to its end, whatever that is."""
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **given,
        )

    def json(self, *arguments: str | Path, status: int = 0, stdin: str | None = None) -> Any:
        """Run `bootwright --format json …`, insist on its exit status, return what it printed."""
        done = self.run("--format", "json", *arguments, stdin=stdin)
        if done.returncode != status:
            raise AgentError(
                f"bootwright {' '.join(map(str, arguments))} ended with {done.returncode}:\n"
                f"{done.stdout}{done.stderr}\n{self.log[-3000:]}"
            )
        return json.loads(done.stdout) if done.stdout.strip() else None

    def boot(self, job: Mapping[str, object], *, status: int = 0) -> Any:
        """Submit a job document by `boot -f -`, wait for it, return the result."""
        return self.json("boot", "-f", "-", status=status, stdin=json.dumps(job))

    def submit(self, job: Mapping[str, object]) -> str:
        """Submit a job document without waiting; return the job's id."""
        report = self.json("boot", "--no-wait", "-f", "-", stdin=json.dumps(job))
        return str(report["id"])

    def wait(self, job_id: str, *, status: int = 0) -> Any:
        return self.json("job", "wait", job_id, status=status)

    def wait_log(self, text: str, *, timeout_s: float = 60.0) -> None:
        """Return when the agent has logged `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            if time.monotonic() > deadline:
                raise AgentError(f"the agent did not log {text!r}:\n{self.log[-4000:]}")
            time.sleep(0.02)
