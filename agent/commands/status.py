"""`bootwright status`."""

import click

from agent.commands.command import Command, Exit, Invocation, invocation
from agent.commands.images import cache_lines
from agent.commands.output import emit, instant, pairs
from agent.views import AgentStatus


@click.command(cls=Command)
@click.option("--long", is_flag=True, help="Also the jobs, the cache and what was checked.")
@invocation
def status(call: Invocation, *, long: bool) -> None:
    """Show how the agent is; exit code 5 if it lacks something."""
    with call.client() as client:
        agent = client.status()
    document = {**agent.model_dump(mode="json"), "degraded": agent.degraded}
    emit(call, document, lambda: pairs(_lines(agent, long=long)))
    if agent.degraded:
        for check in agent.checks:
            if not check.ok:
                hint = f" ({check.hint})" if check.hint else ""
                click.echo(f"{check.name}: {check.message}{hint}", err=True)
        click.get_current_context().exit(Exit.DEGRADED)


def _lines(agent: AgentStatus, *, long: bool) -> list[tuple[str, object]]:
    state = "draining" if agent.draining else "degraded" if agent.degraded else "ok"
    short: list[tuple[str, object]] = [
        ("state", state),
        ("version", agent.version),
        ("running since", f"{instant(agent.started_at)} (pid {agent.pid})"),
        ("instances", agent.instances),
    ]
    if not long:
        return short
    return [
        *short,
        *((f"jobs {name}", count) for name, count in agent.jobs.items()),
        *cache_lines(agent.cache),
        *(
            (f"check {check.name}", f"{'ok' if check.ok else 'failed'} {check.message}".strip())
            for check in agent.checks
        ),
    ]
