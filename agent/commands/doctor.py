"""`bootwright doctor`."""

import logging
from pathlib import Path

import click

from agent.commands.command import Command, Exit, Failure, Invocation, invocation
from agent.commands.output import emit, rows
from agent.views import Finding, Result


@click.command(cls=Command)
@click.option(
    "--user",
    default="bootwright",
    show_default=True,
    metavar="NAME",
    help="The agent's user; called by root, the doctor sees what that user sees.",
)
@invocation
def doctor(call: Invocation, *, user: str) -> None:
    """Look at all the agent needs; exit code 5 if something is wrong.

    Needs no running agent and changes nothing. A warning alone is exit code 0.
    """
    # libvirt, Glance and the configuration: slow, and no other command here needs all of it.
    from agent import doctor as examination  # noqa: PLC0415
    from agent.config import Configuration  # noqa: PLC0415

    try:
        found = [examination.become(user)]
    except examination.Stranger as e:
        raise Failure(str(e)) from e
    # What a part has to log is what a check has to tell.
    logging.disable(logging.CRITICAL)
    try:
        found += examination.examine(
            lambda: Configuration(call.config_file, call.config_dir),
            socket=None if call.socket is None else Path(call.socket).absolute(),
        )
    finally:
        logging.disable(logging.NOTSET)
    degraded = any(finding.result is Result.ERROR for finding in found)
    emit(call, {"degraded": degraded, "checks": found}, lambda: _print(found))
    if degraded:
        click.get_current_context().exit(Exit.DEGRADED)


def _print(found: list[Finding]) -> None:
    rows(
        ("CHECK", "RESULT", "MESSAGE"),
        ((finding.name, finding.result, _text(finding)) for finding in found),
    )


def _text(finding: Finding) -> str:
    return f"{finding.message}\n→ {finding.hint}" if finding.hint else finding.message
