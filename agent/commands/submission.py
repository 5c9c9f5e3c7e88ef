"""What all commands do that submit one job: wait for it or not, and print what has become of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from agent.client import Client
from agent.commands.command import Invocation
from agent.commands.jobs import print_job
from agent.commands.output import emit
from agent.commands.waiting import conclude, timeout_option, wait
from agent.report import JobReport

Function = TypeVar("Function", bound=Callable[..., Any])


def waiting(function: Function) -> Function:
    """Add the options `--wait/--no-wait` and `--timeout` to a command."""
    waits = click.option(
        "--wait/--no-wait",
        "waits",
        default=True,
        help="Wait for the end (the default), or print the job's id.",
    )
    return waits(timeout_option(function))


def finish(
    call: Invocation, client: Client, report: JobReport, *, waits: bool, timeout: float | None
) -> None:
    """Print the job's id, or wait for its end and print what it came to.

    Raises:
        Failure: it failed, or is not at its end within `timeout` seconds.
    """
    if not waits:
        emit(call, report, lambda: click.echo(report.id))
        return
    (ended,) = wait(client, [report.id], timeout)
    emit(call, ended, lambda: print_job(ended, with_error=False))
    conclude([ended])
