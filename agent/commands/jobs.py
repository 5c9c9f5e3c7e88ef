"""`bootwright job …`."""

import time
from collections.abc import Iterator
from typing import IO, Final

import click

from agent import job as job_schema
from agent.client import AgentUnavailable, Client
from agent.commands import job_file
from agent.commands.command import Exit, Failure, Group, Invocation, invocation
from agent.commands.output import emit, instant, pairs, rows, size
from agent.commands.waiting import AWAY_S, conclude, timeout_option, wait
from agent.errors import InvalidJob
from agent.report import JobReport, Status
from agent.views import Event

_RECONNECT_S: Final = 1.0


@click.group(cls=Group)
def job() -> None:
    """Jobs: what was asked of the agent, and what came of it."""


@job.command("list")
@click.option(
    "--status", type=click.Choice(Status, case_sensitive=False), help="Only jobs of this status."
)
@invocation
def list_(call: Invocation, status: Status | None) -> None:
    """List the jobs."""
    with call.client() as client:
        jobs = client.jobs(status)
    emit(
        call,
        {"jobs": jobs},
        lambda: rows(
            ("ID", "ACTION", "STATUS", "TASK", "INSTANCE", "UPDATED"),
            (
                (
                    report.id,
                    report.action,
                    report.status,
                    report.task_state,
                    report.instance.name if report.instance else "",
                    instant(report.updated_at),
                )
                for report in jobs
            ),
        ),
    )


@job.command()
@click.argument("job_id", metavar="ID")
@invocation
def show(call: Invocation, job_id: str) -> None:
    """Show one job."""
    with call.client() as client:
        report = client.job(job_id)
    emit(call, report, lambda: print_job(report))


@job.command("wait")
@click.argument("job_id", metavar="ID")
@timeout_option
@invocation
def wait_(call: Invocation, job_id: str, timeout: float | None) -> None:
    """Wait for the end of a job and show it."""
    with call.client() as client:
        (report,) = wait(client, [job_id], timeout)
    emit(call, report, lambda: print_job(report, with_error=False))
    conclude([report])


@job.command()
@click.argument("job_id", metavar="ID")
@invocation
def cancel(call: Invocation, job_id: str) -> None:
    """Ask for a job to end; what it made is removed."""
    with call.client() as client:
        report = client.cancel(job_id)
    emit(call, report, lambda: click.echo(f"{report.id} {report.status}"))


@job.command()
@click.argument("job_id", metavar="[ID]", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option(
    "--since",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    help="Only events after this one.",
)
@invocation
def events(call: Invocation, job_id: str | None, follow: bool, since: int) -> None:
    """Show what has happened, to one job or to all.

    With --follow, JSON is one document for each line and event.
    """
    with call.client() as client:
        if not follow:
            past = list(client.events(since, job_id, follow=False))
            emit(
                call,
                {"events": past},
                lambda: rows(
                    ("SEQ", "TIME", "JOB", "STATUS", "TASK", "MESSAGE"),
                    (
                        (e.seq, instant(e.time), e.job_id, e.status, e.task_state, e.message)
                        for e in past
                    ),
                ),
            )
            return
        for event in _following(client, since, job_id):
            words = (instant(event.time), event.job_id, event.status, event.task_state or "-")
            line = " ".join((*map(str, words), event.message)).rstrip()
            if call.format == "table":
                click.echo(line)
            else:
                click.echo(event.model_dump_json())


@job.command()
@click.argument("file", type=click.File("rb"))
@invocation
def validate(call: Invocation, file: IO[bytes]) -> None:
    """Check a job file; needs no agent."""
    name = job_file.name_of(file)
    try:
        request = job_schema.parse(job_file.load(file))
    except InvalidJob as e:
        # Not its hint, which is to use this command.
        message = f"{name}: {e.code}: {e.message}"
        raise Failure(message, "the fields are in docs/job.md", code=Exit.USAGE) from e
    emit(call, request, lambda: click.echo(f"{name} is a valid job of action {request.action}"))


def _following(client: Client, since: int, job_id: str | None) -> Iterator[Event]:
    """Yield events for ever; an agent that is restarted loses none."""
    away_since = None
    while True:
        try:
            for event in client.events(since, job_id, follow=True):
                since = event.seq
                away_since = None
                yield event
        except AgentUnavailable:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > AWAY_S:
                raise
        time.sleep(_RECONNECT_S)


def print_job(report: JobReport, *, with_error: bool = True) -> None:
    """Print a job for people; its error is left out where `conclude` tells it."""
    error = report.error if with_error else None
    pairs(
        [
            ("id", report.id),
            ("action", report.action),
            ("status", report.status),
            ("task state", report.task_state),
            ("request id", report.request_id),
            ("created", instant(report.created_at)),
            ("updated", instant(report.updated_at)),
            *_products(report),
            *(
                (
                    f"phase {phase.phase}",
                    f"{phase.seconds:.3f} s"
                    + (f", {size(phase.bytes)} received" if phase.bytes else "")
                    + (f", {size(phase.resumed)} resumed" if phase.resumed else ""),
                )
                for phase in report.timeline
            ),
            ("error", f"{error.code}: {error.message}" if error else None),
            ("hint", error.hint if error else None),
        ]
    )


def _products(report: JobReport) -> list[tuple[str, object]]:
    lines: list[tuple[str, object]] = []
    if report.instance:
        lines.append(("instance", f"{report.instance.name} {report.instance.uuid}"))
    if report.image:
        source = f" (from {report.image.source})" if report.image.source else ""
        lines.append(("image", f"{report.image.id}{source}"))
    lines += [
        (
            f"{disk.role}",
            f"{disk.path} {disk.format} {size(disk.virtual_size)}"
            + (f" {disk.device_name}" if disk.device_name else ""),
        )
        for disk in report.disks
    ]
    if report.domain:
        lines.append(("domain", report.domain.state))
    return lines
