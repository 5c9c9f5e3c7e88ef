"""The worker over a real journal: what it runs, how jobs end, what a restart goes on with."""

import threading
import time
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import AgentStopping, BackendError, Cancelled, NotFound
from agent.job import JobRequest
from agent.journal import Journal
from agent.recorder import Recorder
from agent.report import JobReport, Status, TaskState
from agent.worker import Worker
from tests.waiting import LIMIT_S, until
from tests.worker_kit import UUID, Host, entries, host, no_file_grows

__all__ = ["entries", "host"]


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


def test_cancel_of_a_job_that_the_stop_has_interrupted_waits_for_its_next_run(host: Host) -> None:
    host.accept("job-1")
    host.worker.start()
    host.until_begun("job-1")
    assert host.worker.drain(LIMIT_S)

    host.worker.cancel("job-1", "cancelled on request")

    assert host.journal.get("job-1").report.status is Status.BUILD
    host.go_on()
    host.worker.start()
    assert host.final("job-1").status is Status.CANCELLED
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
