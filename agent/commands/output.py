"""Results on standard output: one JSON or YAML document, or a table for people."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import click
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from agent.commands.command import Format, Invocation
from agent.errors import printable

_UNBROKEN: Final = 10_000
"""Columns on a pipe: programs that read tables want no line broken, and people no id."""

_FILLING: Final = re.compile(r" +(\x1b\[0m)?$", re.MULTILINE)
"""Spaces at the end of a line, which may be bold."""


def emit(invocation: Invocation, document: object, table: Callable[[], None]) -> None:
    """Print `document` (models, mappings, lists, scalars) in the chosen format, or call `table`."""
    match invocation.format:
        case Format.TABLE:
            table()
        case Format.JSON:
            click.echo(_legible(lambda unicode: _json(document, unicode=unicode)))
        case Format.YAML:
            click.echo(_legible(lambda unicode: _yaml(document, unicode=unicode)), nl=False)


def rows(headers: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Print a table with a header; on a terminal with room for the others the last column folds."""
    table = Table(
        *(escape(name) for name in headers), box=None, pad_edge=False, header_style="bold"
    )
    for column in table.columns:
        column.no_wrap = column is not table.columns[-1]
    for line in lines:
        table.add_row(*(escape(_text(cell)) for cell in line))
    console = Console(highlight=False)
    options = console.options.update(max_width=_UNBROKEN)
    if not sys.stdout.isatty() or console.measure(table, options=options).minimum > console.width:
        console = Console(highlight=False, width=_UNBROKEN)
    with console.capture() as captured:
        console.print(table)
    # rich fills every line up to the table's width, which may be that of its longest line.
    click.echo(_FILLING.sub(r"\1", captured.get()), nl=False)


def pairs(lines: Iterable[tuple[str, object]]) -> None:
    """Print `name  value`, a line each; those without a value are left out.

    A terminal breaks what is too long, so that a path can be copied off it.
    """
    kept = [(name, text) for name, value in lines if (text := _text(value))]
    width = max((len(name) for name, _ in kept), default=0)
    console = Console(highlight=False) if sys.stdout.isatty() else None
    for name, text in kept:
        indented = text.replace("\n", "\n" + " " * (width + 2))
        if console is None:
            click.echo(f"{name:{width}}  {indented}")
        else:
            line = Text.assemble((f"{name:{width}}", "bold"), f"  {indented}")
            console.print(line, soft_wrap=True)


def size(count: float | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return ""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def instant(epoch: float | None) -> str:
    """A time as people of this place read it."""
    if epoch is None:
        return ""
    return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _text(value: object) -> str:
    return "" if value is None else printable(str(value))


def _json(document: object, *, unicode: bool) -> str:
    return json.dumps(_plain(document), indent=2, ensure_ascii=not unicode)


def _yaml(document: object, *, unicode: bool) -> str:
    return str(yaml.safe_dump(_plain(document), sort_keys=False, allow_unicode=unicode))


def _legible(dump: Callable[[bool], str]) -> str:
    """Return a document in letters as they are, unless something in it is better escaped."""
    text = dump(True)
    return text if text == printable(text) else dump(False)


def _plain(value: object) -> object:
    match value:
        case BaseModel():
            return value.model_dump(mode="json")
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
