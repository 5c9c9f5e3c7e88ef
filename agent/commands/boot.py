"""`bootwright boot`."""

from typing import IO, Final

import click

from agent.commands import job_file
from agent.commands.command import Command, Exit, Failure, Invocation, invocation
from agent.commands.flavor import Flavor
from agent.commands.submission import finish, waiting

_COMMANDS: Final = {
    "fetch": "image fetch",
    "delete": "instance delete",
    "resize": "instance resize",
    "rescue": "instance rescue",
    "unrescue": "instance unrescue",
    "rebuild": "instance rebuild",
}
"""What does the other actions."""


@click.command(cls=Command)
@click.option(
    "-f", "--file", "file", type=click.File("rb"), metavar="JOB.yaml", help="The job; - reads it."
)
@click.option("--image", "image_id", metavar="ID", help="Image of the root disk.")
@click.option("--flavor", type=Flavor(), help="For example 2x2048x20.")
@click.option("--name", metavar="NAME", help="Name of the instance.")
@click.option("--kernel", "kernel_id", metavar="ID", help="Image of the kernel.")
@click.option("--ramdisk", "ramdisk_id", metavar="ID", help="Image of the ramdisk.")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    help="Sent twice with the same key, the job is done once.",
)
@waiting
@invocation
def boot(
    call: Invocation,
    *,
    file: IO[bytes] | None,
    image_id: str | None,
    flavor: dict[str, int] | None,
    name: str | None,
    kernel_id: str | None,
    ramdisk_id: str | None,
    idempotency_key: str | None,
    waits: bool,
    timeout: float | None,
) -> None:
    """Boot an instance, from a job file or from flags."""
    if file is not None:
        if image_id or flavor or name or kernel_id or ramdisk_id:
            raise click.UsageError("give either -f or the flags of an instance, not both")
        document = _from_file(file)
    else:
        if image_id is None or flavor is None or name is None:
            raise click.UsageError(
                "give -f JOB.yaml, or all of --image, --flavor and --name: for example "
                "--image 0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1 --flavor 1x512x1 --name web-1"
            )
        images = {"id": image_id, "kernel_id": kernel_id, "ramdisk_id": ramdisk_id}
        document = {
            "version": 1,
            "action": "boot",
            "instance": {"name": name},
            "flavor": flavor,
            "image": {key: value for key, value in images.items() if value is not None},
        }
    if idempotency_key is not None:
        document["idempotency_key"] = idempotency_key
    with call.client() as client:
        finish(call, client, client.submit(document), waits=waits, timeout=timeout)


def _from_file(file: IO[bytes]) -> dict[str, object]:
    document = job_file.load(file)
    # A slip of the finger must not delete what was to be booted.
    if document.get("action") in _COMMANDS:
        command = _COMMANDS[str(document["action"])]
        raise Failure(
            f"{job_file.name_of(file)} holds a job of action {document['action']}",
            f"that is what 'bootwright {command}' does",
            code=Exit.USAGE,
        )
    return document
