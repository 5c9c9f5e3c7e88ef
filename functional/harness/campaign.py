"""One round of the campaign: bring trouble to an agent, start it again, see that all is well.

A `Scenario` is something an agent does. `Field` does it undisturbed first, to see how the disks
have to look and how many steps it takes; then, in rounds, with trouble at one step or at some
instant. A round ends with the agent restarted, its jobs as they should be, every base verified,
the disks as after the undisturbed run, and nothing more; then all is deleted again, and what is
left must be what there was before the first round.
"""

import errno
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.client import AgentUnavailable, Client, Refused
from agent.files import free_bytes
from agent.report import JobReport, Status
from agent.views import Soundness
from functional.harness.agent import Agent, Options, as_service
from functional.harness.disk_tree import Tree, differences, tree_of
from functional.harness.launcher import Launcher
from functional.harness.steps import Action, Steps, Taken, Trouble

LIMIT_S: Final = 60.0
# What a job that met an error of the file system gets before the agent is restarted.
_PATIENCE_S: Final = 3.0
# Said of a job that waits to write to its journal again, for longer than that.
_WAITS: Final = "the job runs again in"
_LOG_TAIL: Final = 3000

Document = Mapping[str, Any]

# How a job may end that the file system failed; ENOSPC has to be called by its name.
_REFUSALS: Final = {"InsufficientFreeSpace", "BackendError"}
# What bears times or inode numbers. A file system is looked at by its own tools, and a manifest
# by verification.
_VARYING: Final = re.compile(r".*\.json|.*/disk\.(eph\d+|config)|.*/console\.log")
_REBUILT: Final = ".rebuilt"
COUNT: Final = Trouble(action=Action.KILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is done to an agent that has nothing.

    Attributes:
        before: jobs that are done before, undisturbed.
        jobs: what is asked for, in order, without waiting for one another.
        call: what is asked for then that is no job, and may be asked for again.
        ends: the status its jobs end with.
        guest_writes: a guest runs, so that its root is no longer what was made.
    """

    name: str
    jobs: tuple[Document, ...] = ()
    before: tuple[Document, ...] = ()
    call: Callable[[Client], object] | None = None
    ends: Status = Status.DONE
    guest_writes: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """An undisturbed run."""

    tree: Tree
    varying: frozenset[str]
    """Paths whose content may be another in each run."""
    config_drives: Tree


class Field:
    """The ground for scenarios, one after the other: an agent with its steps counted.

    Args:
        root: a directory for all of it.
        options: the agent's.

    Attributes:
        scenario: the one that is on.
    """

    def __init__(self, root: Path, options: Options) -> None:
        self._root = root
        self._options = options
        self.scenario = Scenario(name="nothing")
        self._references: dict[str, Reference] = {}
        self._keys = 0
        self._failed = 0
        self._log_seen = 0
        self._drives_seen: Tree = {}
        root.mkdir(exist_ok=True)
        root.chmod(0o711)
        # The same at each restart: paths are part of what the agent writes.
        self._home = root / "agent"
        below = [self._home / "instances", self._home / "journal.db"]
        self.steps = Steps(root / "steps", below)
        environment = {**os.environ, **self.steps.environment}
        self._launcher = Launcher(as_service("fowner"), environment)
        self._open()

    def _open(self) -> None:
        """Begin with an agent that has nothing."""
        self.agent = Agent(self._home, self._options, launcher=self._launcher)
        # Not with the rest, which may be on a disk that is full.
        self.agent.log_path = self._root / "agent.log"
        self.agent.log_path.touch()
        self._log_seen = self.agent.log_path.stat().st_size
        self.agent.start()
        self._blank = set(tree_of(self.agent.instances))

    def _begin_anew(self) -> None:
        """Put away what a failed round has left, for people to look at."""
        with suppress(Exception):
            self.agent.close()
        self.agent.kill()
        self._failed += 1
        self._home.rename(self._root / f"failed-{self._failed}")
        self._open()

    def close(self) -> None:
        self.steps.disarm()
        try:
            self.agent.close()
        finally:
            self._launcher.close()

    # Undisturbed

    def reference(self, scenario: Scenario) -> Reference:
        """Have a scenario on. Do it twice: what differs may differ in any round."""
        self.scenario = scenario
        if scenario.name in self._references:
            return self._references[scenario.name]
        try:
            first, second = self._undisturbed(), self._undisturbed()
        except BaseException:
            self._begin_anew()
            raise
        varying = {path for path in first if _VARYING.fullmatch(path)}
        unequal = differences(first, second)
        assert unequal <= varying or self.scenario.guest_writes, f"{unequal - varying} differ"
        self._references[scenario.name] = Reference(
            tree=second, varying=frozenset(varying | unequal), config_drives=self._drives_seen
        )
        return self._references[scenario.name]

    def _undisturbed(self) -> Tree:
        self._bring(self.scenario.before)
        for report in self._submit_and_wait(self.scenario.jobs, self._key("jobs")):
            _assert_ended(report, self.scenario.ends)
        self._call()
        self._maintain()
        tree = self._tree()
        self._drives_seen = self._config_drives()
        self._clear()
        return tree

    def count(self, trouble: Trouble) -> int:
        """Return how many steps it takes that this trouble can come to."""
        self._bring(self.scenario.before)
        self.steps.arm(self.agent.pid, trouble)
        self._submit_and_wait(self.scenario.jobs, self._key("jobs"))
        self._call()
        taken = self.steps.disarm()
        self._maintain()
        self._clear()
        return taken.count

    # Rounds

    def round(self, reference: Reference, trouble: Trouble, at: int) -> tuple[Taken, str | None]:
        """Return what happened, and what was wrong in the end, if anything was."""
        return self._guarded(lambda: self._stepped(reference, trouble, at))

    def round_at(self, reference: Reference, seconds: float) -> tuple[Taken, str | None]:
        """SIGKILL so many seconds after the jobs were submitted."""
        return self._guarded(lambda: self._timed(reference, seconds))

    def _guarded(self, run: Callable[[], Taken]) -> tuple[Taken, str | None]:
        try:
            return run(), None
        except Exception as e:  # noqa: BLE001 - whatever it is, the next round shall be
            taken = self.steps.disarm()
            problem = f"{type(e).__name__}: {e}\n{self._log()[-_LOG_TAIL:]}"
            self._begin_anew()
            return taken, problem

    def _stepped(self, reference: Reference, trouble: Trouble, at: int) -> Taken:
        self._bring(self.scenario.before)
        key = self._key("jobs")
        self.steps.arm(self.agent.pid, trouble, at=at)
        accepted = self._submit(self.scenario.jobs, key)
        called = self._tried_call()
        if trouble.action in (Action.KILL, Action.TEAR):
            self._wait_killed_or_final(accepted)
        else:
            self._wait_final(accepted, _PATIENCE_S)
        taken = self.steps.disarm()
        self._restart()
        self._settle(accepted, key, failed=trouble.error, called=called)
        self._judge(reference)
        return taken

    def _timed(self, reference: Reference, seconds: float) -> Taken:
        self._bring(self.scenario.before)
        key = self._key("jobs")
        self.steps.arm(self.agent.pid, COUNT)
        accepted = self._submit(self.scenario.jobs, key)
        time.sleep(seconds)
        self._restart()
        taken = self.steps.disarm()
        self._settle(accepted, key, failed=0, called=False)
        self._judge(reference)
        return taken

    def round_with(self, reference: Reference, free: int) -> JobReport | None:
        """Have no more than so many bytes free on the file system, really, until the restart.

        Returns how the first job ended; None if it did not, or was not accepted.
        """
        self._bring(self.scenario.before)
        key = self._key("jobs")
        ballast = self._home / "ballast"
        # The list of blocks takes some, too: it may come to a little less.
        with ballast.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, free_bytes(self._home) - free))
        accepted = self._submit(self.scenario.jobs, key)
        self._wait_final(accepted, _PATIENCE_S)
        first = None if accepted[0] is None else self._report(accepted[0])
        ballast.unlink()
        self._restart()
        self._settle(accepted, key, failed=errno.ENOSPC, called=False)
        self._judge(reference)
        return first

    def _report(self, job_id: str) -> JobReport | None:
        with Client(self.agent.socket) as client:
            report = client.job(job_id)
        return report if report.status.final else None

    def _restart(self) -> None:
        self.agent.kill()
        self.agent.start()

    def _settle(
        self, accepted: Sequence[str | None], key: str, *, failed: int, called: bool
    ) -> None:
        """See each job end as it should, and have done what an error kept from being done."""
        jobs = self.scenario.jobs
        # With the same key: what was acknowledged is the same job, what was not may be.
        again = [
            self._submit_one(document, f"{key}-{number}") for number, document in enumerate(jobs)
        ]
        for before, after in zip(accepted, again, strict=True):
            assert before in (None, after), "an acknowledged job is gone"
        for document, report in zip(jobs, self._wait_all(again), strict=True):
            if failed and report.status is Status.ERROR:
                self._assert_refused(report, failed)
                self._do_again(document)
            else:
                _assert_ended(report, self.scenario.ends)
        if not called:
            self._call()

    def _do_again(self, document: Document) -> None:
        try:
            [report] = self._submit_and_wait([document], self._key("again"))
        except Refused as e:
            # It was deleted, but nobody knows whether a power cut would bring it back.
            if document["action"] != "delete" or e.error.code != "NotFound":
                raise
        else:
            _assert_ended(report, self.scenario.ends)

    def _assert_refused(self, report: JobReport, failed: int) -> None:
        assert report.error is not None
        allowed = {"InsufficientFreeSpace"} if failed == errno.ENOSPC else _REFUSALS
        assert report.error.code in allowed, report.error
        if report.action.value in ("prepare", "boot") and report.instance is not None:
            left = self.agent.instances / report.instance.uuid
            assert not left.exists(), f"the failed job left {sorted(left.iterdir())}"

    def _judge(self, reference: Reference) -> None:
        """All is as after an undisturbed run; delete it, and nothing is left."""
        self._maintain()
        now = self._tree()
        missing, surplus = reference.tree.keys() - now.keys(), now.keys() - reference.tree.keys()
        assert not missing, f"lost: {sorted(missing)}"
        assert not surplus, f"left behind: {sorted(surplus)}"
        wrong = differences(reference.tree, now) - reference.varying
        assert not wrong, f"not as undisturbed: {[(p, reference.tree[p], now[p]) for p in wrong]}"
        for path in sorted(self.agent.instances.glob("*/disk.eph*")):
            _tool("e2fsck", "-fn", path)
        assert self._config_drives() == reference.config_drives
        self._clear()

    def _tree(self) -> Tree:
        """What there is, with a root disk under one name, for each rebuild changes it."""
        tree = tree_of(self.agent.instances)
        for path in [path for path in tree if path.endswith(_REBUILT)]:
            usual = path.removesuffix(_REBUILT)
            assert usual not in tree, f"both {usual} and {path}"
            tree[usual] = tree.pop(path)
        return tree

    def _config_drives(self) -> Tree:
        """What is in them: the dates in them are those of their making."""
        found: Tree = {}
        for path in self.agent.instances.glob("*/disk.config"):
            with tempfile.TemporaryDirectory() as into:
                _tool("xorriso", "-osirrox", "on", "-indev", f"stdio:{path}", "-extract", "/", into)
                found |= {
                    f"{path.parent.name}/{name}": it for name, it in tree_of(Path(into)).items()
                }
        return found

    def _maintain(self) -> None:
        """Make one maintenance pass, and verify every base."""
        with Client(self.agent.socket) as client:
            client.gc(dry_run=False)
            for entry in client.images():
                soundness = client.verify_image(entry.id).soundness
                # The bytes of a decoded image have no hash before they are read again: they are
                # held against those of the undisturbed run, with the rest of the tree.
                assert soundness in (Soundness.INTACT, Soundness.RECORDED), (
                    f"{entry.id} is {soundness}"
                )

    def _clear(self) -> None:
        with Client(self.agent.socket) as client:
            for instance in client.instances():
                report = client.wait(client.delete_instance(instance.uuid).id, LIMIT_S)
                _assert_ended(report, Status.DONE)
            for entry in client.images():
                client.remove_image(entry.id)
        left = set(tree_of(self.agent.instances)) - self._blank
        assert not left, f"left behind when all was deleted: {sorted(left)}"
        assert "Traceback (most recent call last)" not in self._log(), "a defect of ours"
        self._log_seen = self.agent.log_path.stat().st_size

    def _log(self) -> str:
        """Return what the agent has logged in this round."""
        with self.agent.log_path.open("rb") as file:
            file.seek(self._log_seen)
            return file.read().decode(errors="replace")

    # Asking

    def _key(self, word: str) -> str:
        self._keys += 1
        return f"{self.scenario.name}-{word}-{self._keys}"

    def _bring(self, documents: Sequence[Document]) -> None:
        """Have jobs done one after the other, with nothing in their way."""
        for document in documents:
            [report] = self._submit_and_wait([document], self._key("job"))
            _assert_ended(report, Status.DONE)

    def _submit(self, documents: Sequence[Document], key: str) -> list[str | None]:
        """Return the ids of the jobs, None for one that was not acknowledged."""
        accepted: list[str | None] = []
        for number, document in enumerate(documents):
            try:
                accepted.append(self._submit_one(document, f"{key}-{number}"))
            except AgentUnavailable:
                accepted.append(None)
            except Refused as e:
                _check_refusal(e)
                accepted.append(None)
        return accepted

    def _submit_one(self, document: Document, key: str) -> str:
        with Client(self.agent.socket) as client:
            return client.submit({**document, "idempotency_key": key}).id

    def _submit_and_wait(self, documents: Sequence[Document], key: str) -> list[JobReport]:
        return self._wait_all(
            [self._submit_one(document, f"{key}-{n}") for n, document in enumerate(documents)]
        )

    def _wait_all(self, ids: Sequence[str]) -> list[JobReport]:
        with Client(self.agent.socket) as client:
            reports = [client.wait(job_id, LIMIT_S) for job_id in ids]
        for report in reports:
            assert report.status.final, f"it does not end: {report}"
        return reports

    def _call(self) -> None:
        if self.scenario.call is not None:
            with Client(self.agent.socket) as client:
                self.scenario.call(client)

    def _tried_call(self) -> bool:
        """Return whether what is no job was done."""
        try:
            self._call()
        except AgentUnavailable:
            return False
        except Refused as e:
            _check_refusal(e)
            return False
        return True

    def _wait_final(self, accepted: Sequence[str | None], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        with Client(self.agent.socket) as client, suppress(AgentUnavailable):
            for job_id in filter(None, accepted):
                while not client.job(job_id).status.final and time.monotonic() < deadline:
                    if _WAITS in self._log():
                        return
                    time.sleep(0.02)

    def _wait_killed_or_final(self, accepted: Sequence[str | None]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.agent.runs and not self.steps.hit:
            assert time.monotonic() < deadline, "it neither ended nor was killed"
            with suppress(AgentUnavailable), Client(self.agent.socket) as client:
                reports = [client.job(job_id) for job_id in filter(None, accepted)]
                if all(report.status.final for report in reports):
                    return
            time.sleep(0.02)


def _tool(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def _assert_ended(report: JobReport, status: Status) -> None:
    assert report.status is status, f"{report.action} ended with {report.status}: {report.error}"


def _check_refusal(refused: Refused) -> None:
    assert refused.error.code in _REFUSALS, refused
