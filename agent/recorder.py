"""The running record of one job: its phases, its result, how it ended.

A phase is journaled when it begins if it may last and has a progress to show, or if
nothing but the journal tells of what it begins; else it is only announced: after a
crash the job runs again from its first step, whatever phase it was in. What is
learned within a phase goes with the next entry. Progress itself is not journaled: it
is true for a moment only.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from agent.errors import BootwrightError
from agent.journal import Job, Journal
from agent.report import ErrorReport, JobReport, PhaseReport, Progress, Status, TaskState


class EndNotRecorded(Exception):
    """The journal could not take down how a job ended.

    No failure of the job: what it made stays, for nobody knows whether the journal
    will say after a crash that it ended well. Hence no `BootwrightError`, which
    would have it undone.
    """

    def __init__(self, reason: BootwrightError) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.reason)


class Recorder:
    """Written by the thread that runs the job, read by any."""

    def __init__(
        self,
        journal: Journal,
        job: Job,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._now = now
        self._clock = clock
        self._lock = threading.Lock()
        self._report = job.report
        # What is to be set in it: made into a new report when somebody looks.
        self._noted: dict[str, Any] = {}
        self._phase = job.report.task_state
        self._phases = {phase.phase: phase for phase in job.report.timeline}
        self._began = clock()
        self._last_message = ""

    @property
    def report(self) -> JobReport:
        with self._lock:
            if self._noted:
                self._report = self._report.model_copy(update=self._noted)
                self._noted = {}
            return self._report

    def note(self, **fields: Any) -> None:
        """Set fields of the report; durable with the next phase or the end."""
        with self._lock:
            self._noted.update(fields)

    def progress(self, progress: Progress) -> None:
        """Show how far it is; a phase that has not been recorded yet begins."""
        if progress.phase is not self._phase:
            report, message = self._begin(progress.phase)
            of = "" if progress.role is None else f" ({progress.role})"
            self._journal.record(report, f"{message}{of}")
        self.note(progress=progress)

    def count(self, *, received: int, resumed: int) -> None:
        """Add to the bytes of the phase in which they came."""
        if not received and not resumed:
            return
        phase = TaskState.IMAGE_DOWNLOADING
        known = self._phases.get(phase) or PhaseReport(phase=phase, seconds=0)
        self._phases[phase] = known.model_copy(
            update={"bytes": known.bytes + received, "resumed": known.resumed + resumed}
        )

    def phase(self, phase: TaskState, *, lasts: bool = False) -> None:
        """Begin `phase`. One that was there before goes on.

        `lasts`: it is durable at once. That is for a change of which nothing else tells: a cancel
        that comes after a crash would take the job for one that has never begun.

        Raises:
            InsufficientFreeSpace, BackendError: it `lasts`, and cannot be made durable.
        """
        tell = self._journal.record if lasts else self._journal.announce
        tell(*self._begin(phase))

    def _begin(self, phase: TaskState) -> tuple[JobReport, str]:
        """Return the report, and what to tell of it."""
        self._close_phase()
        self._phase = phase
        self.note(status=Status.BUILD, task_state=phase, updated_at=self._now())
        return self.report, phase.value.replace("_", " ")

    def finish(self, status: Status, message: str, error: BootwrightError | None = None) -> None:
        """Record how the job ended, durably.

        Raises:
            EndNotRecorded: that may be so after a crash, and until then is not.
        """
        self._close_phase()
        ended_in, self._phase = self._phase, None
        self.note(
            status=status,
            task_state=None,
            error=None
            if error is None
            else ErrorReport(
                code=error.code,
                message=error.message,
                hint=error.hint,
                retriable=error.retriable,
                phase=ended_in,
            ),
        )
        self._last_message = message
        self.record_end()

    def record_end(self) -> None:
        """Record the end that `finish` could not; raises as it does."""
        self.note(updated_at=self._now())
        try:
            self._journal.record(self.report, self._last_message)
        except BootwrightError as e:
            raise EndNotRecorded(e) from e

    def _close_phase(self) -> None:
        now = self._clock()
        if self._phase is not None:
            known = self._phases.get(self._phase) or PhaseReport(phase=self._phase, seconds=0)
            seconds = round(known.seconds + now - self._began, 6)
            self._phases[self._phase] = known.model_copy(update={"seconds": seconds})
        self._began = now
        self.note(timeline=tuple(self._phases.values()), progress=None)
