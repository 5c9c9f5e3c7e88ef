"""Writes those parts of the documentation that the code knows best, and the sample configuration.

    python -m docs.generate            write them
    python -m docs.generate --check    say which are stale; exit status 1 if any is

A page holds its generated parts between `<!-- generated: NAME -->` and `<!-- end -->`. Whatever
stands outside of them is written by people.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from oslo_config import cfg, types
from pydantic import BaseModel

from agent import config, errors, job, options, report
from agent.config_values import plain
from agent.errors import BootwrightError, ImageError

ROOT: Final = Path(__file__).parents[1]

_PART: Final = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every file with generated parts, as it should be."""
    found = {ROOT / "etc/bootwright.conf.sample": config.sample()}
    for name in ("job.md", "configuration.md"):
        path = ROOT / "docs" / name
        found[path] = _PART.sub(_part, path.read_text("utf-8"))
    return found


def stale() -> list[Path]:
    """Return the files that are not as they should be."""
    return [path for path, text in pages().items() if path.read_text("utf-8") != text]


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with `--check` only look; return the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m docs.generate [--check]", file=sys.stderr)
        return 2
    if not entry_points(group="oslo.config.opts", name="bootwright"):
        # oslo.config would find no option, and the sample would be empty.
        print("bootwright is not installed for this Python: pip install .", file=sys.stderr)
        return 2
    found = stale()
    for path in found:
        if arguments:
            print(f"{path.relative_to(ROOT)} is stale, run: python -m docs.generate")
        else:
            path.write_text(pages()[path], "utf-8")
            print(f"{path.relative_to(ROOT)} written")
    return 1 if arguments and found else 0


def _part(place: re.Match[str]) -> str:
    begin, name, end = place.groups()
    return f"{begin}{_PARTS[name]()}{end}"


# The job and its result


def _job_fields() -> str:
    return _sections(
        {
            "The job": job.JobRequest,
            "`instance`": job.Instance,
            "`flavor`": job.Flavor,
            "`flavor.ephemeral[]`": job.Ephemeral,
            "`image`": job.ImageRef,
            "`libvirt`": job.Libvirt,
            "`networks[]`": job.Network,
        },
        ("Field", "Value", "Default", "Meaning"),
        _request_row,
    )


def _result_fields() -> str:
    return _sections(
        {
            "The result": report.JobReport,
            "`instance`": report.InstanceReport,
            "`image`": report.ImageReport,
            "`disks[]`": report.DiskReport,
            "`disks[].backing_chain[]`": report.ChainLink,
            "`domain`": report.DomainReport,
            "`timeline[]`": report.PhaseReport,
            "`progress`": report.Progress,
            "`error`": report.ErrorReport,
        },
        ("Field", "Value", "Meaning"),
        lambda name, schema, _, meaning: (f"`{name}`", _kind(schema), meaning),
    )


Row = Callable[[str, Mapping[str, Any], bool, str], Sequence[str]]
"""`row(name, schema, required, meaning)`: the cells for one field."""


def _sections(models: Mapping[str, type[BaseModel]], headers: Sequence[str], row: Row) -> str:
    parts = []
    for title, model in models.items():
        schema = model.model_json_schema()
        meanings = _attribute_docstrings(model)
        rows = [
            row(name, field, name in schema.get("required", ()), meanings.get(name, ""))
            for name, field in schema["properties"].items()
        ]
        parts.append(f"### {title}\n\n{_table(headers, rows)}\n")
    return "\n" + "\n".join(parts) + "\n"


def _request_row(
    name: str, schema: Mapping[str, Any], required: bool, meaning: str
) -> Sequence[str]:
    if not meaning:
        raise LookupError(f"agent/job.py: the field {name} has no docstring")
    if required:
        default = "needed"
    else:
        value = schema.get("default")
        default = "" if value in (None, [], {}) else f"`{str(value).lower()}`"
    unit = schema.get("description", "") if "properties" not in schema else ""
    kind = _kind(schema) + (f"; {unit}" if unit and "$ref" not in schema else "")
    return (f"`{name}`", kind, default, meaning)


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each field of `model` in its source, in one line each."""
    (definition,) = ast.parse(inspect.getsource(model)).body
    if not isinstance(definition, ast.ClassDef):
        raise TypeError(f"{model} is no class")
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                found[name] = " ".join(str(text).split())
            case _:
                pass
    return found


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value has to be, in words."""
    match schema:
        case {"anyOf": kinds}:
            text = " or ".join(_kind(kind) for kind in kinds if kind.get("type") != "null")
        case {"$ref": str(name)}:
            text = _reference(name.rpartition("/")[2])
        case {"const": value}:
            text = f"`{value}`"
        case {"type": "array", "items": items, **rest}:
            most = f"at most {rest['maxItems']}, " if "maxItems" in rest else ""
            text = f"list, {most}each a {_kind(items)}"
        case {"type": "object", "additionalProperties": {"type": "integer"}}:
            text = "mapping of text to whole number"
        case {"type": "object"}:
            text = "mapping of text to text"
        case {"type": "string", "pattern": str(pattern)}:
            text = f"text, `{pattern}`"
        case {"type": "string", "maxLength": int(most)}:
            text = f"text of at most {most} characters"
        case {"type": "string"}:
            text = "text"
        case {"type": "boolean"}:
            text = "`true` or `false`"
        case {"type": "integer" | "number" as number}:
            text = ("whole number" if number == "integer" else "number") + _range(schema)
        case _:
            raise LookupError(f"no words for {schema}")
    return text


def _range(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"minimum": low, "maximum": high}:
            return f", {low} to {high}"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f", more than {plain(low)}, at most {plain(high)}"
        case {"minimum": low}:
            return f", at least {low}"
        case _:
            return ""


def _reference(name: str) -> str:
    known = getattr(job, name, None) or getattr(report, name)
    if issubclass(known, BaseModel):
        return "mapping, see below"
    return " | ".join(f"`{member.value}`" for member in known)


def _error_codes() -> str:
    classes = [
        known
        for known in vars(errors).values()
        if inspect.isclass(known)
        and issubclass(known, BootwrightError)
        and known not in (BootwrightError, ImageError)
    ]
    rows = [
        (f"`{known.__name__}`", "yes" if known.retriable else "", str(inspect.getdoc(known)))
        for known in classes
    ]
    return "\n" + _table(("Code", "Retriable", "Meaning"), rows) + "\n\n"


# The configuration


def _option_tables() -> str:
    parts = []
    for section, opts in options.documented().items():
        rows = [_option_row(opt) for opt in opts]
        parts.append(f"### [{section}]\n\n{_table(_OPTION_HEADERS, rows)}\n")
    return "\n" + "\n".join(parts) + "\n"


_OPTION_HEADERS: Final = ("Option", "Value", "Default", "Meaning")


def _option_row(opt: cfg.Opt) -> Sequence[str]:
    default = opt.sample_default if opt.sample_default is not None else opt.default
    match default:
        case None | [] | "":
            shown = ""
        case bool():
            shown = f"`{str(default).lower()}`"
        case list():
            shown = f"`{','.join(map(str, default))}`"
        case _:
            shown = f"`{default}`"
    return (f"`{opt.dest}`", _option_kind(opt.type), shown, _cell(opt.help))


def _option_kind(kind: object) -> str:
    match kind:
        case types.Boolean():
            text = "true or false"
        case types.Integer(min=low, max=high) | types.Float(min=low, max=high):
            text = "whole number" if isinstance(kind, types.Integer) else "number"
            if low is not None:
                text += (
                    f", {plain(low)} to {plain(high)}"
                    if high is not None
                    else f", at least {plain(low)}"
                )
        case types.List():
            text = "list, separated by commas"
        case types.String(choices=choices) if choices:
            text = " | ".join(
                f"`{value}`" + (f" ({meaning})" if meaning else "")
                for value, meaning in choices.items()
                if value
            )
        case _:
            text = "text"
    return text


# Markdown


def _cell(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


_PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "job fields": _job_fields,
    "result fields": _result_fields,
    "error codes": _error_codes,
    "options": _option_tables,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
