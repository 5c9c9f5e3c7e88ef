"""`bootwright image …` and `bootwright cache …`."""

from typing import BinaryIO

import click

from agent.client import AgentUnavailable, Refused
from agent.commands.command import Exit, Group, Invocation, invocation
from agent.commands.duration import Duration
from agent.commands.output import emit, instant, pairs, rows, size
from agent.commands.waiting import conclude, timeout_option, wait
from agent.report import JobReport
from agent.views import (
    CacheStatus,
    Decision,
    Fetch,
    GcReport,
    ImageEntry,
    ImageState,
    Soundness,
)


@click.group(cls=Group)
def image() -> None:
    """Images, and the cache of them on this host."""


@image.command()
@click.argument("image_ids", metavar="ID...", nargs=-1, required=True)
@click.option(
    "--wait/--no-wait",
    "waits",
    default=True,
    help="Wait for the end (the default), or print the jobs' ids.",
)
@timeout_option
@invocation
def fetch(
    call: Invocation, image_ids: tuple[str, ...], *, waits: bool, timeout: float | None
) -> None:
    """Fetch images into the cache before they are needed."""
    with call.client() as client:
        reports: list[JobReport] = []
        try:
            reports.extend(client.fetch_image(image_id) for image_id in image_ids)
        except (AgentUnavailable, Refused):
            # Those before it are under way, whatever is wrong with this one.
            if reports:
                emit(call, {"jobs": reports}, lambda: _print_fetches(reports))
            raise
        if waits:
            reports = wait(client, [report.id for report in reports], timeout)
    emit(call, {"jobs": reports}, lambda: _print_fetches(reports))
    if waits:
        conclude(reports)


@image.command("list")
@invocation
def list_(call: Invocation) -> None:
    """List the images this host knows."""
    with call.client() as client:
        images = client.images()
    emit(
        call,
        {"images": images},
        lambda: rows(
            ("ID", "NAME", "STATE", "VIRTUAL SIZE", "ON DISK", "INSTANCES", "LAST USED"),
            (
                (
                    entry.id,
                    entry.name,
                    entry.state,
                    size(entry.virtual_size),
                    size(entry.disk_usage),
                    len(entry.instances) or "",
                    instant(entry.last_used_at),
                )
                for entry in images
            ),
        ),
    )


@image.command()
@click.argument("image_id", metavar="ID")
@invocation
def show(call: Invocation, image_id: str) -> None:
    """Show one image."""
    with call.client() as client:
        entry = client.image(image_id)
    emit(call, entry, lambda: _print(entry))


@image.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--disk-format", required=True, metavar="F", help="What the file is: raw, qcow2, aki, ari …"
)
@click.option("--name", metavar="N", help="Name of the image.")
@click.option(
    "--property", "properties", multiple=True, metavar="K=V", help="May be given several times."
)
@click.option("--id", "image_id", metavar="UUID", help="Id of the image; made up if not given.")
@invocation
def add(
    call: Invocation,
    file: BinaryIO,
    *,
    disk_format: str,
    name: str | None,
    properties: tuple[str, ...],
    image_id: str | None,
) -> None:
    """Register a file in the local directory image source."""
    with call.client() as client:
        entry = client.add_image(
            file, disk_format=disk_format, name=name, image_id=image_id, properties=properties
        )
    emit(call, entry, lambda: click.echo(entry.id))


@image.command()
@click.argument("image_id", metavar="ID")
@invocation
def remove(call: Invocation, image_id: str) -> None:
    """Remove an image from the cache; one that an instance stands on stays.

    The image itself stays in Glance or in the local directory.
    """
    with call.client() as client:
        client.remove_image(image_id)
    emit(call, {"removed": image_id}, lambda: click.echo(f"{image_id} removed", err=True))


@image.command()
@click.argument("image_id", metavar="ID")
@invocation
def why(call: Invocation, image_id: str) -> None:
    """Tell what keeps an image in the cache, or why the next gc removes it."""
    with call.client() as client:
        decision = client.why_image(image_id)
    emit(call, decision, lambda: pairs(_decision_lines(decision)))


@image.command()
@click.argument("image_id", metavar="ID")
@click.option("--for", "seconds", type=Duration(), metavar="TIME", help="Such as 90s, 12h, 7d.")
@invocation
def pin(call: Invocation, image_id: str, seconds: float | None) -> None:
    """Keep an image in the cache, for a time or until it is unpinned."""
    with call.client() as client:
        entry = client.pin_image(image_id, seconds)
    until = f"until {instant(entry.pinned_until)}" if entry.pinned_until else "until unpinned"
    emit(call, entry, lambda: click.echo(f"{entry.id} stays {until}", err=True))


@image.command()
@click.argument("image_id", metavar="ID")
@invocation
def unpin(call: Invocation, image_id: str) -> None:
    """Take the pin off an image; it may go when nobody needs it."""
    with call.client() as client:
        entry = client.unpin_image(image_id)
    emit(call, entry, lambda: click.echo(f"{entry.id} unpinned", err=True))


@image.command()
@click.argument("image_ids", metavar="[ID...]", nargs=-1)
@invocation
def verify(call: Invocation, image_ids: tuple[str, ...]) -> None:
    """Read images in the cache from end to end and check their hashes; all if none is named."""
    with call.client() as client:
        if not image_ids:
            entries = client.images()
            image_ids = tuple(e.id for e in entries if e.state is ImageState.CACHED)
        found = [client.verify_image(image_id) for image_id in image_ids]
    emit(
        call,
        {"images": found},
        lambda: rows(
            ("ID", "BYTES", "DIGEST", "INSTANCES"),
            ((v.image_id, v.soundness, v.digest[:31], " ".join(v.instances)) for v in found),
        ),
    )
    if any(verification.soundness is Soundness.DAMAGED for verification in found):
        click.get_current_context().exit(Exit.FAILED)


@click.group(cls=Group)
def cache() -> None:
    """The image cache as a whole."""


@cache.command()
@invocation
def status(call: Invocation) -> None:
    """Show how much there is in the cache, and what is on its way."""
    with call.client() as client:
        cache_status = client.cache()
    emit(call, cache_status, lambda: pairs(cache_lines(cache_status)))


@cache.command()
@click.option("--dry-run", is_flag=True, help="Tell what would be removed, and remove nothing.")
@invocation
def gc(call: Invocation, *, dry_run: bool) -> None:
    """Remove the images that nobody needs and that age or lack of space removes."""
    with call.client() as client:
        report = client.gc(dry_run=dry_run)
    emit(call, report, lambda: _print_gc(report))


def cache_lines(cache_status: CacheStatus) -> list[tuple[str, object]]:
    """The cache as people read it."""
    return [
        ("cache", cache_status.directory),
        ("images", cache_status.entries),
        ("on disk", size(cache_status.disk_usage)),
        ("free", size(cache_status.free_space)),
        *(
            (
                f"fetching {fetch.image_id}",
                _so_far(fetch),
            )
            for fetch in cache_status.fetching
        ),
    ]


def _so_far(fetch: Fetch) -> str:
    total = size(fetch.bytes_total) or "unknown"
    return f"{size(fetch.bytes_done)} of {total}, {size(fetch.rate)}/s, {fetch.waiters} waiting"


def _print_fetches(reports: list[JobReport]) -> None:
    rows(
        ("JOB", "IMAGE", "STATUS", "FROM"),
        (
            (
                report.id,
                report.image.id if report.image else "",
                report.status,
                report.image.source if report.image else "",
            )
            for report in reports
        ),
    )


def _decision_lines(decision: Decision) -> list[tuple[str, object]]:
    return [
        ("id", decision.image_id),
        ("base", decision.base_name),
        ("next gc", "removes it" if decision.remove else "keeps it"),
        ("reason", f"{decision.reason}: {decision.detail}"),
    ]


def _print_gc(report: GcReport) -> None:
    verb = "would go" if report.dry_run else "removed"
    rows(
        ("ID", "DECISION", "FREES", "REASON"),
        (
            (
                decision.image_id,
                verb if decision.remove else "stays",
                size(decision.bytes) if decision.remove else "",
                decision.detail,
            )
            for decision in report.decisions
        ),
    )
    click.echo(f"{size(report.bytes)} {'would be ' if report.dry_run else ''}freed", err=True)


def _print(entry: ImageEntry) -> None:
    pairs(
        [
            ("id", entry.id),
            ("name", entry.name),
            ("state", entry.state),
            ("source", entry.source),
            ("path", entry.path),
            ("format", entry.format),
            ("virtual size", size(entry.virtual_size)),
            ("on disk", size(entry.disk_usage)),
            ("digest", entry.digest),
            ("certificate", entry.certificate),
            ("committed", instant(entry.committed_at)),
            ("last used", instant(entry.last_used_at)),
            ("pinned", (instant(entry.pinned_until) or "for ever") if entry.pinned else None),
            *(("instance", uuid) for uuid in entry.instances),
        ]
    )
