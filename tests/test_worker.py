"""The worker over a real journal: what it runs, how jobs end, what a restart goes on with."""

import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from agent import logs
from agent.cancellation import Cancellation
from agent.errors import AgentStopping, BackendError, BootwrightError, Cancelled, NotFound
from agent.job import JobRequest, parse
from agent.journal import Job, Journal, digest_of
from agent.recorder import Recorder
from agent.report import JobReport, Status, TaskState
from agent.worker import Worker

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
LIMIT_S = 20.0

T = TypeVar("T")


class Work:
    """An `execute` that waits at its gate and then does what the job's name says."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.lock = threading.Lock()
        self.begun: list[str] = []
        self.interrupted: list[BootwrightError] = []
        self.at_once = 0
        self.most_at_once = 0

    def __call__(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        assert request.instance is not None
        with self.lock:
            self.begun.append(recorder.report.id)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            recorder.phase(TaskState.SPAWNING)
            cancellation.check()
            while not self.gate.is_set():
                cancellation.wait(0.01)
            match request.instance.name:
                case "refused":
                    raise BackendError("no such disk", "make one")
                case "defect":
                    raise ZeroDivisionError
                case _:
                    recorder.finish(Status.ACTIVE, "the domain is running")
        except BootwrightError as e:
            self.interrupted.append(e)
            raise
        finally:
            with self.lock:
                self.at_once -= 1


class Host:
    """A journal and, one after the other, the workers of an agent that is restarted."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.work = Work()
        self.worker = Worker(self.journal, self.work, concurrency=2, untouched=lambda _: True)

    def accept(self, job_id: str, name: str = "web-1", **fields: object) -> None:
        self._accept(
            job_id,
            {
                "instance": {"name": name, "uuid": UUID},
                "image": {"id": "img-1"},
                "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
                **fields,
            },
        )

    def accept_delete(self, job_id: str, uuid: str = UUID) -> None:
        instance = {"name": "web-1", "uuid": uuid}
        self._accept(job_id, {"action": "delete", "instance": instance})

    def _accept(self, job_id: str, document: dict[str, object]) -> None:
        request = parse(document)
        now = time.time()
        report = JobReport(
            id=job_id,
            action=request.action,
            status=Status.QUEUED,
            request_id="req-1",
            created_at=now,
            updated_at=now,
        )
        self.journal.accept(request, report, body_digest=digest_of(request))
        self.worker.enqueue(job_id)

    def restart(self) -> None:
        """Stop, and have another worker for what is unfinished; it does not run yet."""
        assert self.worker.drain(LIMIT_S)
        self.go_on()

    def go_on(self) -> None:
        """Have the worker of the agent that comes after this one."""
        self.work = Work()
        self.worker = Worker(self.journal, self.work, concurrency=2, untouched=lambda _: True)
        for job in self.journal.unfinished():
            self.worker.enqueue(job.report.id)

    def interrupt(self, job_id: str, name: str = "web-1") -> None:
        """Have a job begin and the agent stop."""
        self.accept(job_id, name)
        self.worker.start()
        self.until_begun(job_id)
        self.restart()
        assert self.journal.get(job_id).report.status is Status.BUILD

    def until_begun(self, job_id: str) -> None:
        until(lambda: job_id in self.work.begun)

    def final(self, job_id: str) -> JobReport:
        return until(
            lambda: report if (report := self.journal.get(job_id).report).status.final else None
        )


def until(condition: Callable[[], T | None]) -> T:
    ends = time.monotonic() + LIMIT_S
    while not (said := condition()):
        assert time.monotonic() < ends
        time.sleep(0.005)
    return said


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "journal.db")
    yield host
    assert host.worker.drain(LIMIT_S)
    host.journal.close()


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("web-1", Status.ACTIVE, None),
        ("refused", Status.ERROR, "BackendError"),
        ("defect", Status.ERROR, "InternalError"),
    ],
)
def test_job_ends_as_it_deserves(host: Host, name: str, status: Status, code: str | None) -> None:
    host.work.gate.set()
    host.worker.start()
    host.accept("job-1", name)
    report = host.final("job-1")
    assert (report.status, report.error and report.error.code) == (status, code)
    assert host.worker.alive()


def test_no_more_jobs_run_at_once_than_allowed(host: Host) -> None:
    host.worker.start()
    for number in range(6):
        host.accept(f"job-{number}")
    until(lambda: host.work.at_once == 2)
    assert len(host.worker.running()) == 2
    host.work.gate.set()
    assert [host.final(f"job-{number}").status for number in range(6)] == [Status.ACTIVE] * 6
    assert host.work.most_at_once == 2


def test_running_job_shows_what_the_journal_does_not_know_yet(host: Host) -> None:
    host.worker.start()
    host.accept("job-1")
    host.until_begun("job-1")
    queued = host.journal.get("job-1").report.model_copy(update={"status": Status.QUEUED})
    until(lambda: host.worker.live(queued).task_state is TaskState.SPAWNING)
    host.work.gate.set()
    ended = host.final("job-1")
    until(lambda: not host.worker.running())
    assert host.worker.live(ended) == ended


def test_cancelled_job_is_told_and_ends(host: Host) -> None:
    host.worker.start()
    host.accept("job-1")
    host.until_begun("job-1")
    host.worker.cancel("job-1", "cancelled on request")
    report = host.final("job-1")
    assert report.status is Status.CANCELLED
    assert report.error is not None
    assert (report.error.code, report.error.message) == ("Cancelled", "cancelled on request")


def test_job_cancelled_before_its_turn_never_begins(host: Host) -> None:
    host.accept("job-1")
    host.worker.cancel("job-1", "cancelled on request")
    assert host.journal.get("job-1").report.status is Status.CANCELLED
    host.work.gate.set()
    host.worker.start()
    host.accept("job-2")
    host.final("job-2")
    assert host.work.begun == ["job-2"]


def test_cancel_of_what_has_ended_or_never_was(host: Host) -> None:
    host.work.gate.set()
    host.worker.start()
    host.accept("job-1")
    ended = host.final("job-1")
    until(lambda: not host.worker.running())
    host.worker.cancel("job-1", "too late")
    assert host.journal.get("job-1").report == ended
    with pytest.raises(NotFound):
        host.worker.cancel("job-9", "cancelled on request")


def test_success_that_the_journal_cannot_take_down_is_no_failure(host: Host) -> None:
    runs: list[None] = []

    def execute(_request: JobRequest, recorder: Recorder, _cancellation: Cancellation) -> None:
        recorder.phase(TaskState.SPAWNING)
        runs.append(None)
        with no_file_grows():
            recorder.finish(Status.ACTIVE, "the domain is running")

    host.worker = Worker(
        host.journal, execute, concurrency=1, untouched=lambda _: True, again_s=0.01
    )
    host.worker.start()
    host.accept("job-1")

    assert host.final("job-1").status is Status.ACTIVE
    # Another run might fail, and undo what this one has made.
    assert len(runs) == 1
    assert host.worker.running() == []


def test_lines_about_an_end_that_is_recorded_later_are_the_jobs(
    host: Host, tmp_path: Path, entries: list[dict[str, str]]
) -> None:
    may_record = threading.Event()

    class Full(Journal):
        def record(self, report: JobReport, message: str) -> None:
            if report.status.final and not may_record.is_set():
                raise BackendError("no space", "make some")
            super().record(report, message)

    host.journal.close()
    host.journal = Full(tmp_path / "journal.db")
    host.work.gate.set()
    host.worker = Worker(
        host.journal, host.work, concurrency=1, untouched=lambda _: True, again_s=0.01
    )
    host.accept("job-1")
    # What it has waited for its turn is no part of its run.
    until(lambda: time.time() > host.journal.get("job-1").report.created_at + 1)
    began = time.monotonic()
    host.worker.start()
    # The first is told by the thread that ran it, the others by those that try again.
    until(lambda: len(entries) >= 2)
    may_record.set()
    host.final("job-1")
    until(lambda: not host.worker.running())

    *errors, end = entries
    assert {error["MESSAGE"] for error in errors} == {
        "the end of job job-1 is not recorded: no space (make some); that is tried again in 0.01 s"
    }
    for entry in entries:
        assert (entry["JOB_ID"], entry["REQUEST_ID"]) == ("job-1", "req-1")
        assert (entry["INSTANCE_UUID"], entry["IMAGE_ID"]) == (UUID, "img-1")
    assert end["OUTCOME"] == "ACTIVE"
    assert 10 <= int(end["ELAPSED_MS"]) <= (time.monotonic() - began) * 1000 + 1


@pytest.fixture
def entries() -> Iterator[list[dict[str, str]]]:
    """What the worker writes to systemd's journal."""
    sent: list[dict[str, str]] = []

    def send(message: str, **fields: str) -> None:
        sent.append({"MESSAGE": message, **fields})

    handler = logs.JournalHandler(send)
    logger = logging.getLogger("agent.worker")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield sent
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@contextmanager
def no_file_grows() -> Iterator[None]:
    """Have every write to a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_deadline_ends_a_job_and_counts_from_its_acceptance(host: Host) -> None:
    host.accept("job-1", deadline_s=0.05)
    until(lambda: time.time() > host.journal.get("job-1").report.created_at + 0.1)
    host.worker.start()
    report = host.final("job-1")
    assert report.error is not None
    assert report.error.code == "DeadlineExceeded"
    assert "deadline of 0.05 s" in report.error.message
    # It has been asked all the same: an earlier run may have made what is to be undone.
    assert host.work.begun == ["job-1"]


def test_stop_leaves_a_running_job_unfinished_and_a_restart_goes_on(host: Host) -> None:
    host.accept("job-1")
    host.worker.start()
    host.until_begun("job-1")
    stopped = host.work

    host.restart()

    assert [type(error) for error in stopped.interrupted] == [AgentStopping]
    assert host.journal.get("job-1").report.status is Status.BUILD
    host.work.gate.set()
    host.worker.start()
    assert host.final("job-1").status is Status.ACTIVE
    assert host.work.begun == ["job-1"]


def test_stopped_worker_begins_nothing_more(host: Host) -> None:
    host.worker.start()
    assert host.worker.drain(LIMIT_S)
    host.accept("job-1")
    assert host.journal.get("job-1").report.status is Status.QUEUED
    assert host.work.begun == []
    assert not host.worker.alive()


def test_job_interrupted_by_a_restart_is_undone_by_the_cancel_that_finds_it_waiting(
    host: Host,
) -> None:
    host.interrupt("job-1")
    host.worker.cancel("job-1", "cancelled on request")
    assert not host.journal.get("job-1").report.status.final

    host.worker.start()

    assert host.final("job-1").status is Status.CANCELLED
    # It ran, cancelled from the start, so that it could undo what it had made.
    assert host.work.begun == ["job-1"]
    assert [type(error) for error in host.work.interrupted] == [Cancelled]


def test_acknowledged_cancel_is_kept_over_a_crash(host: Host) -> None:
    host.interrupt("job-1")
    host.worker.cancel("job-1", "cancelled on request")
    # The worker that was asked is never heard of again.
    host.go_on()
    host.work.gate.set()
    host.worker.start()
    report = host.final("job-1")
    assert report.status is Status.CANCELLED
    assert report.error is not None
    assert report.error.message == "cancelled on request"


def test_cancel_of_a_running_job_is_durable_before_it_is_acknowledged(host: Host) -> None:
    stubborn = threading.Event()

    def work(_request: JobRequest, recorder: Recorder, _cancellation: Cancellation) -> None:
        recorder.phase(TaskState.SPAWNING)
        stubborn.wait(LIMIT_S)
        recorder.finish(Status.ACTIVE, "the domain is running")

    host.worker = Worker(host.journal, work, concurrency=1, untouched=lambda _: True)
    host.accept("job-1")
    host.worker.start()
    until(lambda: [report.status for report in host.worker.running()] == [Status.BUILD])
    host.worker.cancel("job-1", "cancelled on request")
    assert host.journal.get("job-1").cancelled == "cancelled on request"
    stubborn.set()
    host.final("job-1")


def test_job_accepted_after_a_delete_waits_for_it_and_is_not_cancelled(host: Host) -> None:
    host.accept_delete("delete")
    host.accept("boot")
    host.accept_delete("again")
    host.worker.start()
    host.until_begun("delete")

    host.worker.settle(UUID, "delete", Cancellation(LIMIT_S))
    host.work.gate.set()

    assert host.final("boot").status is Status.ACTIVE
    host.final("again")
    assert host.work.begun == ["delete", "boot", "again"]


def test_job_that_changes_an_instance_waits_for_those_accepted_before_it(host: Host) -> None:
    host.accept("boot")
    host.accept("rescue", action="rescue")
    host.accept("unrescue", action="unrescue")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")
    assert set(host.work.begun) == {"boot", "other"}
    host.work.gate.set()
    host.final("unrescue")
    assert [job for job in host.work.begun if job != "other"] == ["boot", "rescue", "unrescue"]


def test_job_that_waits_for_a_delete_holds_up_nobody(host: Host) -> None:
    host.accept_delete("delete")
    for number in range(4):
        host.accept(f"boot-{number}")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")
    assert set(host.work.begun) == {"delete", "other"}
    host.work.gate.set()
    assert [host.final(f"boot-{number}").status for number in range(4)] == [Status.ACTIVE] * 4


def test_job_waits_no_longer_for_a_delete_that_was_cancelled(host: Host) -> None:
    host.accept_delete("delete")
    host.accept("boot")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")

    host.worker.cancel("delete", "cancelled on request")

    host.until_begun("boot")
    host.work.gate.set()
    assert host.final("boot").status is Status.ACTIVE


def test_job_that_waits_for_another_ends_at_its_deadline_though_nobody_is_free(host: Host) -> None:
    host.accept("boot")
    other = "11111111-2222-4333-8444-555555555555"
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=0.3)
    host.accept("unrescue", action="unrescue")
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.until_begun("other")

    report = host.final("rescue")

    assert report.error is not None
    assert (report.status, report.error.code) == (Status.ERROR, "DeadlineExceeded")
    assert {running.id for running in host.worker.running()} == {"boot", "other"}
    host.work.gate.set()
    host.final("unrescue")
    assert "rescue" not in host.work.begun


def test_job_that_waits_for_another_keeps_its_deadline_whatever_ends(host: Host) -> None:
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=1)
    for number in range(2):
        host.accept(
            f"other-{number}",
            instance={"name": "web-2", "uuid": f"{number}1111111-2222-4333-8444-555555555555"},
        )
    host.until_begun("other-0")

    # The worker that gets free has another job to do before it looks at the rescue again.
    host.worker.cancel("other-0", "cancelled on request")
    host.until_begun("other-1")

    report = host.final("rescue")
    assert report.error is not None
    assert (report.status, report.error.code) == (Status.ERROR, "DeadlineExceeded")
    assert {running.id for running in host.worker.running()} == {"boot", "other-1"}
    assert "rescue" not in host.work.begun


def test_job_that_waits_for_another_is_in_the_queue_once(host: Host, tmp_path: Path) -> None:
    looks: list[str] = []

    class Watched(Journal):
        def unfinished_before(self, job_id: str, *, instance_uuid: str) -> list[Job]:
            looks.append(job_id)
            return super().unfinished_before(job_id, instance_uuid=instance_uuid)

    host.journal.close()
    host.journal = Watched(tmp_path / "journal.db")
    host.go_on()
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue")
    others = [f"other-{number}" for number in range(4)]
    for number, other in enumerate(others):
        host.accept(
            other,
            instance={"name": "web-2", "uuid": f"{number}1111111-2222-4333-8444-555555555555"},
        )
    for other in others:
        host.until_begun(other)
        host.worker.cancel(other, "cancelled on request")
        host.final(other)
    last = "a1111111-2222-4333-8444-555555555555"
    host.accept("last", instance={"name": "web-3", "uuid": last})
    host.until_begun("last")

    # At its turn, and once more after all that were in the queue by the time the first one ended.
    assert looks.count("rescue") == 2
    host.work.gate.set()
    assert host.final("rescue").status is Status.ACTIVE
    assert host.work.begun.count("rescue") == 1


def test_job_that_waits_for_another_ends_as_soon_as_it_is_cancelled(host: Host) -> None:
    host.accept("boot")
    host.accept("rescue", action="rescue", deadline_s=3600)
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")

    host.worker.cancel("rescue", "cancelled on request")

    assert host.journal.get("rescue").report.status is Status.CANCELLED
    host.work.gate.set()
    host.final("boot")
    assert "rescue" not in host.work.begun


def test_what_an_earlier_run_made_is_undone_in_its_turn_though_the_deadline_has_passed(
    host: Host,
) -> None:
    touched: list[str] = []

    def untouched(job: Job) -> bool:
        touched.append(job.report.id)
        return False

    host.worker = Worker(host.journal, host.work, concurrency=2, untouched=untouched)
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=0.05)

    until(lambda: touched)

    assert host.work.begun == ["boot"]
    host.work.gate.set()
    report = host.final("rescue")
    assert report.error is not None
    assert report.error.code == "DeadlineExceeded"
    assert host.work.begun == ["boot", "rescue"]


def test_deadline_of_a_job_that_waits_is_recorded_as_soon_as_the_journal_can(
    host: Host, entries: list[dict[str, str]]
) -> None:
    host.worker = Worker(
        host.journal, host.work, concurrency=2, untouched=lambda _: True, again_s=0.01
    )
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=1)
    with no_file_grows():
        until(lambda: entries)
        assert host.journal.get("rescue").report.status is Status.QUEUED
    assert host.final("rescue").status is Status.ERROR
    assert host.worker.alive()
    assert "once more in 0.01 s" in entries[0]["MESSAGE"]
    assert {entry.get("JOB_ID") for entry in entries} == {"rescue"}


def test_delete_settles_the_job_that_runs(host: Host) -> None:
    host.worker.start()
    host.accept("job-1")
    host.until_begun("job-1")
    host.accept_delete("job-2")
    host.worker.settle(UUID, "job-2", Cancellation(LIMIT_S))
    assert host.journal.get("job-1").report.status is Status.CANCELLED
    assert "job-1" not in {report.id for report in host.worker.running()}


def test_delete_ends_for_good_a_job_that_a_restart_would_go_on_with(host: Host) -> None:
    host.interrupt("job-1")
    host.accept_delete("job-2")
    host.worker.settle(UUID, "job-2", Cancellation(LIMIT_S))
    report = host.journal.get("job-1").report
    assert report.status is Status.CANCELLED
    assert report.error is not None
    assert "job-2" in report.error.message
    assert [job.report.id for job in host.journal.unfinished()] == ["job-2"]


def test_delete_leaves_the_jobs_of_other_instances_alone(host: Host) -> None:
    host.accept("job-1")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept_delete("job-2", other)
    host.worker.settle(other, "job-2", Cancellation(LIMIT_S))
    assert host.journal.get("job-1").report.status is Status.QUEUED
