"""`bootwright instance …`."""

import uuid
from collections.abc import Mapping

import click

from agent.client import Client
from agent.commands.command import Group, Invocation, invocation
from agent.commands.flavor import Flavor
from agent.commands.output import emit, instant, pairs, rows, size
from agent.commands.submission import finish, waiting
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
    with call.client() as client:
        output, complete = _console(client, name_or_uuid)
    if not complete:
        click.echo(
            "bootwright: the beginning is gone: virtlogd keeps max_size bytes max_backups + 1 "
            "times (/etc/libvirt/virtlogd.conf)",
            err=True,
        )
    document = {"console": output.decode(errors="replace"), "complete": complete}
    emit(call, document, lambda: click.echo(output, nl=False))


def _console(client: Client, name_or_uuid: str) -> tuple[bytes, bool]:
    """Return all that is kept of a console, and whether that is all there was."""
    output = bytearray()
    begins = None
    while True:
        piece = client.console(name_or_uuid, len(output))
        if begins is not None and piece.begins != begins:
            # What was the first byte is gone, and everything has moved.
            output.clear()
            begins = None
            continue
        begins = piece.begins
        output += piece.data
        if not piece.data:
            return bytes(output), piece.complete


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@waiting
@invocation
def delete(call: Invocation, name_or_uuid: str, *, waits: bool, timeout: float | None) -> None:
    """Destroy an instance and remove its disks."""
    with call.client() as client:
        report = client.delete_instance(name_or_uuid)
        finish(call, client, report, waits=waits, timeout=timeout)


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@click.option(
    "--flavor",
    required=True,
    type=Flavor(),
    help="What it shall have, for example 2x2048x20; a disk of 0 stays as it is.",
)
@waiting
@invocation
def resize(
    call: Invocation,
    name_or_uuid: str,
    *,
    flavor: dict[str, int],
    waits: bool,
    timeout: float | None,
) -> None:
    """Grow an instance: its root disk now, processors and memory at its next start."""
    document = {"action": "resize", "flavor": flavor}
    _submit(call, name_or_uuid, document, waits=waits, timeout=timeout)


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@click.option(
    "--image", "image_id", metavar="ID", help="What to boot; the instance's own if absent."
)
@waiting
@invocation
def rescue(
    call: Invocation,
    name_or_uuid: str,
    *,
    image_id: str | None,
    waits: bool,
    timeout: float | None,
) -> None:
    """Boot another image with the disks of an instance attached."""
    image = {} if image_id is None else {"image": {"id": image_id}}
    _submit(call, name_or_uuid, {"action": "rescue", **image}, waits=waits, timeout=timeout)


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@waiting
@invocation
def unrescue(call: Invocation, name_or_uuid: str, *, waits: bool, timeout: float | None) -> None:
    """End a rescue: the instance is as it was before."""
    _submit(call, name_or_uuid, {"action": "unrescue"}, waits=waits, timeout=timeout)


@instance.command()
@click.argument("name_or_uuid", metavar="NAME_OR_UUID")
@click.option("--image", "image_id", required=True, metavar="ID", help="Of the new root disk.")
@waiting
@invocation
def rebuild(
    call: Invocation, name_or_uuid: str, *, image_id: str, waits: bool, timeout: float | None
) -> None:
    """Replace the root disk of an instance by one of an image; what it held is lost."""
    document = {"action": "rebuild", "image": {"id": image_id}}
    _submit(call, name_or_uuid, document, waits=waits, timeout=timeout)


def _submit(
    call: Invocation,
    name_or_uuid: str,
    document: Mapping[str, object],
    *,
    waits: bool,
    timeout: float | None,
) -> None:
    """Submit a job about an instance that is there."""
    try:
        instance = {"uuid": str(uuid.UUID(name_or_uuid))}
    except ValueError:
        instance = {"name": name_or_uuid}
    with call.client() as client:
        report = client.submit({**document, "instance": instance})
        finish(call, client, report, waits=waits, timeout=timeout)


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
