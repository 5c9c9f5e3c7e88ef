"""Runs accepted jobs, a few at a time, and ends each as it deserves.

It knows when a job runs and how it ended, and nothing of what a job does: that
is the `execute` it is given. A job that the agent's own stop interrupts stays
unfinished in the journal and runs again after the restart.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from agent import logs
from agent.cancellation import Cancellation
from agent.errors import AgentStopping, BootwrightError, Cancelled, InternalError
from agent.job import Action, JobRequest
from agent.journal import Job, Journal
from agent.recorder import EndNotRecorded, Recorder
from agent.report import JobReport, Status

LOG = logging.getLogger(__name__)

# Until a journal that could not be written is tried again.
AGAIN_S = 10.0

Execute = Callable[[JobRequest, Recorder, Cancellation], None]
"""Does a job, or undoes what an earlier run made of it if it is cancelled from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    recorder: Recorder
    cancellation: Cancellation
    began: float
    """By the monotonic clock."""


class Worker:
    """May be shared by any number of threads."""

    def __init__(
        self,
        journal: Journal,
        execute: Execute,
        *,
        concurrency: int,
        untouched: Callable[[Job], bool],
        again_s: float = AGAIN_S,
    ) -> None:
        """`untouched`: whether no run of a job can have left anything that has to be undone."""
        self._journal = journal
        self._execute = execute
        self._untouched = untouched
        self._again_s = again_s
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        # Jobs that came to their turn before another of their instance that goes first,
        # until they begin or end; each with its deadline.
        self._waiting: dict[str, Cancellation] = {}
        # Those of them that are not in the queue again.
        self._held: set[str] = set()
        self._holds = threading.Condition(self._lock)
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}")
            for number in range(concurrency)
        ]
        self._threads.append(threading.Thread(target=self._watch, name="worker-deadlines"))

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
        """Have a job end as soon as it can; one that has ended stays as it is.

        Durable: a job that is not at its end when this returns comes to it after
        a restart of the agent too.

        Raises:
            NotFound: there is no such job.
        """
        self._cancel(job_id, Cancelled(message), at_once=self._never_begun)

    def _never_begun(self, job: Job) -> bool:
        # QUEUED alone: a job in BUILD that does not run did so before a restart,
        # and only another run of it can undo what it made. After a crash even
        # one that is QUEUED may have made something.
        return job.report.status is Status.QUEUED and self._untouched(job)

    def _cancel(self, job_id: str, reason: Cancelled, *, at_once: Callable[[Job], bool]) -> None:
        # Under the lock a job cannot begin to run between the two looks.
        with self._lock:
            running = self._running.get(job_id)
            job = self._journal.get(job_id)
            if job.report.status.final:
                pass
            elif running is None and at_once(job):
                try:
                    Recorder(self._journal, job).finish(Status.CANCELLED, reason.message, reason)
                except EndNotRecorded as e:
                    raise e.reason from e
                self._let_go(job_id)
            else:
                self._journal.cancel(job_id, reason.message)
        if running is not None:
            running.cancellation.cancel(reason)

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def settle(self, instance_uuid: str, job_id: str, cancellation: Cancellation) -> None:
        """End every job that makes that instance, of those accepted before delete `job_id`.

        Returns when they have ended. What was accepted later waits for the delete.

        Raises:
            BootwrightError: the reason of `cancellation`, which is the waiting job's.
        """
        others = [
            job.report.id
            for job in self._journal.unfinished_before(job_id, instance_uuid=instance_uuid)
        ]
        reason = Cancelled(f"the instance is being deleted by job {job_id}")
        for other in others:
            # What an earlier run of it made goes with the instance.
            self._cancel(other, reason, at_once=lambda _: True)
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
            self._holds.notify_all()
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
            with _named(job):
                try:
                    self._run(job.request, running)
                except EndNotRecorded as e:
                    self._record_later(job, running, e)
                else:
                    self._ended(job_id)

    def _ended(self, job_id: str) -> None:
        with self._lock:
            del self._running[job_id]
            self._let_go(job_id)
        with self._journal.changed:
            self._journal.changed.notify_all()

    def _record_later(self, job: Job, running: _Running, reason: EndNotRecorded) -> None:
        """Have the end of a job recorded when the journal can be written again.

        Until then it counts as running. It does not run again, which might fail for whatever
        has changed since, and undo what it has made.
        """
        LOG.error(
            "the end of job %s is not recorded: %s; that is tried again in %g s",
            job.report.id,
            reason,
            self._again_s,
        )
        again = threading.Timer(self._again_s, self._record_again, [job, running])
        again.daemon = True
        again.start()

    def _record_again(self, job: Job, running: _Running) -> None:
        if self._stopping:
            return
        with _named(job):
            try:
                running.recorder.record_end()
            except EndNotRecorded as e:
                self._record_later(job, running, e)
            else:
                _log_end(running.recorder.report, time.monotonic() - running.began)
                self._ended(job.report.id)

    def _begin(self, job_id: str) -> tuple[Job, _Running] | None:
        with self._lock:
            job = self._journal.get(job_id)
            if self._stopping or job.report.status.final or job_id in self._running:
                return None
            # It counts from the acceptance, over restarts of the agent too.
            cancellation = Cancellation(
                job.request.deadline_s, elapsed_s=time.time() - job.report.created_at
            )
            if self._must_wait(job):
                self._waiting[job_id] = cancellation
                self._held.add(job_id)
                self._holds.notify_all()
                return None
            self._waiting.pop(job_id, None)
            running = _Running(
                recorder=Recorder(self._journal, job),
                cancellation=cancellation,
                began=time.monotonic(),
            )
            self._running[job_id] = running
        if job.cancelled is not None:
            running.cancellation.cancel(Cancelled(job.cancelled))
        return job, running

    def _must_wait(self, job: Job) -> bool:
        """Whether an unfinished job of the same instance that was accepted before goes first.

        A delete does, before all. What changes an instance waits for all before it: two boots
        of one instance exclude each other, and the second is told so at once.
        """
        action, instance = job.request.action, job.request.instance
        if instance is None or instance.uuid is None:
            return False
        changes = action.of_existing and action is not Action.DELETE
        earlier = self._journal.unfinished_before(job.report.id, instance_uuid=instance.uuid)
        return any(changes or other.request.action is Action.DELETE for other in earlier)

    def _let_go(self, ended: str) -> None:
        """A job has ended: let those that were held look again; under the lock.

        They keep their deadlines: others may be in the queue before them.
        """
        self._waiting.pop(ended, None)
        self._held.discard(ended)
        for job_id in self._waiting:  # in their order
            if job_id in self._held:
                self._queue.put(job_id)
        self._held.clear()

    def _watch(self) -> None:
        """End those that wait as their deadlines pass, though no worker may be free."""
        with self._holds:
            while not self._stopping:
                limits = {job_id: limit.remaining() for job_id, limit in self._waiting.items()}
                expired = next((job_id for job_id, left in limits.items() if left == 0), None)
                if expired is not None:
                    self._expire(expired)
                else:
                    known = [left for left in limits.values() if left is not None]
                    self._holds.wait(min(known, default=None))

    def _expire(self, job_id: str) -> None:
        """End a waiting job whose deadline has passed; under the lock."""
        job = self._journal.get(job_id)
        if not self._never_begun(job):
            # An earlier run of it is to be undone, and that has to wait for its turn.
            self._waiting[job_id] = Cancellation()
            return
        recorder = Recorder(self._journal, job)
        with _named(job):
            try:
                self._waiting[job_id].check()
            except BootwrightError as e:
                try:
                    recorder.finish(Status.ERROR, str(e), e)
                except EndNotRecorded as not_recorded:
                    LOG.error("%s; once more in %g s", not_recorded, self._again_s)
                    self._holds.wait(self._again_s)
                    return
                _log_end(recorder.report, time.time() - job.report.created_at)
                self._let_go(job_id)

    def _run(self, request: JobRequest, running: _Running) -> None:
        recorder = running.recorder
        try:
            self._execute(request, recorder, running.cancellation)
        except AgentStopping:
            LOG.info("%s interrupted; it goes on after the restart", request.action)
            return
        except Cancelled as e:
            recorder.finish(Status.CANCELLED, e.message, e)
        except BootwrightError as e:
            recorder.finish(Status.ERROR, str(e), e)
        except EndNotRecorded:
            raise
        except Exception as e:
            LOG.exception("%s failed by a defect of ours", request.action)
            error = InternalError(
                f"{request.action} failed: {e!r}", "the traceback is in the agent's log"
            )
            recorder.finish(Status.ERROR, str(error), error)
        _log_end(recorder.report, time.monotonic() - running.began)


def _named(job: Job) -> AbstractContextManager[None]:
    """Have every line logged within say which job it is about."""
    request = job.request
    return logs.bind(
        request_id=job.report.request_id,
        job_id=job.report.id,
        instance_uuid=None if request.instance is None else request.instance.uuid,
        image_id=None if request.image is None else request.image.id,
    )


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
