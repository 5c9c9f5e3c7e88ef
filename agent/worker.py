"""Runs accepted jobs, a few at a time, and ends each as it deserves.

It knows when a job runs and how it ended, and nothing of what a job does: that
is the `execute` it is given. A job that the agent's own stop interrupts stays
unfinished in the journal and runs again after the restart.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from agent import logs
from agent.cancellation import Cancellation
from agent.errors import AgentStopping, BootwrightError, Cancelled, InternalError
from agent.job import Action, JobRequest
from agent.journal import Job, Journal
from agent.recorder import Recorder
from agent.report import JobReport, Status

LOG = logging.getLogger(__name__)

Execute = Callable[[JobRequest, Recorder, Cancellation], None]
"""Does a job, or undoes what an earlier run made of it if it is cancelled from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    recorder: Recorder
    cancellation: Cancellation


class Worker:
    """May be shared by any number of threads."""

    def __init__(self, journal: Journal, execute: Execute, *, concurrency: int) -> None:
        self._journal = journal
        self._execute = execute
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        # Jobs that a stop or a crash interrupted, cancelled before their turn.
        self._cancelled: dict[str, Cancelled] = {}
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}")
            for number in range(concurrency)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def enqueue(self, job_id: str) -> None:
        self._queue.put(job_id)

    def running(self) -> list[JobReport]:
        """Return what the running jobs look like this very moment."""
        with self._lock:
            return [running.recorder.report for running in self._running.values()]

    def live(self, report: JobReport) -> JobReport:
        """Return the newest report of a job: the running one's if it runs."""
        with self._lock:
            running = self._running.get(report.id)
        return report if running is None else running.recorder.report

    def cancel(self, job_id: str, message: str) -> None:
        """End a job as soon as it can be ended; one that has ended stays as it is.

        Raises:
            NotFound: there is no such job.
        """
        # QUEUED alone: a job in BUILD that does not run did so before a restart,
        # and only another run of it can undo what it made.
        self._cancel(job_id, Cancelled(message), at_once=(Status.QUEUED,))

    def _cancel(self, job_id: str, reason: Cancelled, *, at_once: Collection[Status]) -> None:
        # Under the lock a job cannot begin to run between the two looks.
        with self._lock:
            running = self._running.get(job_id)
            if running is None:
                job = self._journal.get(job_id)
                if job.report.status in at_once:
                    Recorder(self._journal, job).finish(Status.CANCELLED, reason.message, reason)
                elif not job.report.status.final:
                    self._cancelled[job_id] = reason
        if running is not None:
            running.cancellation.cancel(reason)

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def settle(self, instance_uuid: str, job_id: str, cancellation: Cancellation) -> None:
        """End every other job that makes that instance, and wait until they have ended.

        Raises:
            BootwrightError: the reason of `cancellation`, which is the waiting job's.
        """
        others = [
            job.report.id
            for job in self._journal.unfinished()
            if job.request.instance is not None
            and job.request.instance.uuid == instance_uuid
            and job.request.action is not Action.DELETE
        ]
        reason = Cancelled(f"the instance is being deleted by job {job_id}")
        for other in others:
            # What an earlier run of it made goes with the instance.
            self._cancel(other, reason, at_once=(Status.QUEUED, Status.BUILD))
        for other in others:
            while self._is_running(other):
                cancellation.wait(0.1)

    def _is_running(self, job_id: str) -> bool:
        with self._lock:
            return job_id in self._running

    def drain(self, timeout_s: float) -> bool:
        """Interrupt what runs, begin nothing more, wait; return whether all of it ended."""
        with self._lock:
            self._stopping = True
            interrupted = list(self._running.values())
        for running in interrupted:
            running.cancellation.cancel(AgentStopping("the agent is stopping"))
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:  # an agent that failed to start has not started them
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job_id := self._queue.get()) is not None:
            begun = self._begin(job_id)
            if begun is None:
                continue
            job, running = begun
            try:
                self._run(job, running)
            finally:
                with self._lock:
                    del self._running[job_id]
                with self._journal.changed:
                    self._journal.changed.notify_all()

    def _begin(self, job_id: str) -> tuple[Job, _Running] | None:
        with self._lock:
            job = self._journal.get(job_id)
            if self._stopping or job.report.status.final or job_id in self._running:
                return None
            deadline = job.request.deadline_s
            if deadline is not None:
                # It counts from the acceptance, over restarts of the agent too.
                deadline = max(0.0, job.report.created_at + deadline - time.time())
            running = _Running(
                recorder=Recorder(self._journal, job), cancellation=Cancellation(deadline)
            )
            self._running[job_id] = running
            cancelled = self._cancelled.pop(job_id, None)
        if cancelled is not None:
            running.cancellation.cancel(cancelled)
        return job, running

    def _run(self, job: Job, running: _Running) -> None:
        recorder = running.recorder
        request = job.request
        with logs.bind(
            request_id=job.report.request_id,
            job_id=job.report.id,
            instance_uuid=None if request.instance is None else request.instance.uuid,
            image_id=None if request.image is None else request.image.id,
        ):
            began = time.monotonic()
            try:
                self._execute(request, recorder, running.cancellation)
            except AgentStopping:
                LOG.info("%s interrupted; it goes on after the restart", request.action)
                return
            except Cancelled as e:
                recorder.finish(Status.CANCELLED, e.message, e)
            except BootwrightError as e:
                recorder.finish(Status.ERROR, str(e), e)
            except Exception as e:
                LOG.exception("%s failed by a defect of ours", request.action)
                error = InternalError(
                    f"{request.action} failed: {e!r}", "the traceback is in the agent's log"
                )
                recorder.finish(Status.ERROR, str(error), error)
            _log_end(recorder.report, time.monotonic() - began)


def _log_end(report: JobReport, seconds: float) -> None:
    fields = {"OUTCOME": report.status.value, "ELAPSED_MS": round(seconds * 1000)}
    name = "" if report.instance is None else f" of {report.instance.name}"
    match report.status:
        case Status.ERROR if report.error is not None:
            LOG.error(
                "%s%s failed in %s: %s: %s%s",
                report.action,
                name,
                report.error.phase or "the beginning",
                report.error.code,
                report.error.message,
                f" ({report.error.hint})" if report.error.hint else "",
                extra={"fields": fields},
            )
        case status:
            LOG.info(
                "%s%s: %s after %.3f s",
                report.action,
                name,
                status,
                seconds,
                extra={"fields": fields},
            )
