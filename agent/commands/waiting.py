"""Waiting for jobs, with one live line on a terminal, and what a finished job comes to."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agent.client import AgentUnavailable, Client
from agent.commands.command import Exit, Failure
from agent.commands.output import size
from agent.report import JobReport, Status

_REFRESH_S: Final = 0.25
"""How often the live line is renewed."""

_SLICE_S: Final = 30.0
"""How long one request waits where nobody looks."""

AWAY_S: Final = 60.0
"""How long an agent may be away, being restarted, before waiting for it makes no sense."""

timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds to wait; for ever if not given.",
)


def wait(client: Client, job_ids: Sequence[str], timeout_s: float | None) -> list[JobReport]:
    """Wait until all jobs are final and return them.

    An agent that is restarted meanwhile goes on with its jobs, so it is waited for.

    Raises:
        Failure: with `Exit.TIMED_OUT` if they are not final within `timeout_s` seconds.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with _live_line() as line:
            return [_wait_for(client, job_id, end, line) for job_id in job_ids]
    except KeyboardInterrupt:
        click.echo(
            f"\nNot waiting any more; the work goes on. 'bootwright job wait {job_ids[0]}' waits "
            f"again, 'bootwright job cancel {job_ids[0]}' ends it.",
            err=True,
        )
        raise


def conclude(reports: Sequence[JobReport]) -> None:
    """Return if all jobs ended well.

    Raises:
        Failure: with the error of each that did not.
    """
    failed = [report for report in reports if report.status in (Status.ERROR, Status.CANCELLED)]
    if not failed:
        return
    sentences = []
    for report in failed:
        if report.error is None:
            sentences.append(f"job {report.id} is {report.status}")
            continue
        hint = f"\nHint: {report.error.hint}" if report.error.hint else ""
        sentences.append(f"{report.error.code}: {report.error.message}{hint}")
    invalid = all(report.error and report.error.code == "InvalidJob" for report in failed)
    raise Failure("\n".join(sentences), code=Exit.USAGE if invalid else Exit.FAILED)


class _Line:
    """The live line; shows nothing where nobody looks."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    @property
    def seen(self) -> bool:
        return self._progress is not None

    def show(self, report: JobReport) -> None:
        if self._progress is None:
            return
        progress = report.progress
        phase = (progress.phase if progress else report.task_state) or report.status
        text = f"{phase} ({progress.role})" if progress and progress.role else str(phase)
        amount = ""
        if progress and progress.bytes_done:
            total = f" of {size(progress.bytes_total)}" if progress.bytes_total else ""
            amount = f"{size(progress.bytes_done)}{total}, {size(progress.rate)}/s"
        self._update(
            text,
            amount,
            completed=progress.bytes_done if progress else 0,
            total=progress.bytes_total if progress else None,
        )

    def away(self) -> None:
        self._update("the agent is away; waiting for it", "", completed=0, total=None)

    def _update(self, text: str, amount: str, *, completed: int, total: int | None) -> None:
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task(text, amount=amount)
        self._progress.update(
            self._task, description=text, amount=amount, completed=completed, total=total
        )


@contextlib.contextmanager
def _live_line() -> Iterator[_Line]:
    if not sys.stderr.isatty():
        yield _Line(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Line(progress)


def _wait_for(client: Client, job_id: str, end: float | None, line: _Line) -> JobReport:
    away_since: float | None = None
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        piece = _REFRESH_S if line.seen else _SLICE_S
        try:
            report = client.wait(job_id, piece if left is None else min(piece, left))
        except AgentUnavailable:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > AWAY_S or left == 0.0:
                raise
            line.away()
            time.sleep(_REFRESH_S)
            continue
        away_since = None
        if report.status.final:
            return report
        line.show(report)
        if left == 0.0:
            doing = f" ({report.task_state})" if report.task_state else ""
            raise Failure(
                f"job {job_id} is still in {report.status}{doing}",
                f"it goes on; 'bootwright job wait {job_id}' waits again",
                code=Exit.TIMED_OUT,
            )
