"""`bootwright instance …`."""

import click

from agent.commands.command import Group, Invocation, invocation
from agent.commands.jobs import print_job
from agent.commands.output import emit, instant, pairs, rows, size
from agent.commands.waiting import conclude, wait
from agent.views import InstanceView


@click.group(cls=Group)
def instance() -> None:
    """Instances: the virtual machines that jobs made on this host."""


@instance.command("list")
@invocation
def list_(call: Invocation) -> None:
    """List the instances."""
    with call.client() as client:
        instances = client.instances()
    emit(
        call,
        {"instances": instances},
        lambda: rows(
            ("UUID", "NAME", "STATE", "IMAGE", "CREATED"),
            (
                (view.uuid, view.name, view.state, view.image_id, instant(view.created_at))
                for view in instances
            ),
        ),
    )


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@invocation
def show(call: Invocation, name_or_uuid: str) -> None:
    """Show one instance and its disks."""
    with call.client() as client:
        view = client.instance(name_or_uuid)
    emit(call, view, lambda: _print(view))


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@invocation
def console(call: Invocation, name_or_uuid: str) -> None:
    """Print what the serial console of an instance has shown."""
    output = bytearray()
    with call.client() as client:
        while piece := client.console(name_or_uuid, len(output)):
            output += piece
    text = output.decode(errors="replace")
    emit(call, {"console": text}, lambda: click.echo(bytes(output), nl=False))


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@click.option(
    "--wait/--no-wait", "waits", default=True, help="Wait for the end, or print the job's id."
)
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds to wait.")
@invocation
def delete(call: Invocation, name_or_uuid: str, *, waits: bool, timeout: float | None) -> None:
    """Destroy an instance and remove its disks."""
    with call.client() as client:
        report = client.delete_instance(name_or_uuid)
        if not waits:
            emit(call, report, lambda: click.echo(report.id))
            return
        (report,) = wait(client, [report.id], timeout)
    emit(call, report, lambda: print_job(report))
    conclude([report])


def _print(view: InstanceView) -> None:
    pairs(
        [
            ("uuid", view.uuid),
            ("name", view.name),
            ("state", view.state or "no domain"),
            ("image", view.image_id),
            ("job", view.job_id),
            ("created", instant(view.created_at)),
            *(
                (f"{disk.role}", f"{disk.path} {disk.format} {size(disk.virtual_size)}")
                for disk in view.disks
            ),
            *((f"metadata {key}", value) for key, value in view.metadata.items()),
        ]
    )
