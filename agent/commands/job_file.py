"""Job files: YAML (and so JSON), read without surprises.

What YAML has beyond JSON is not read: a date, a number to base 60 (which an
unquoted MAC address can be) or `on` for true stay the text that was written,
and the job's schema decides what a field makes of it.
"""

import re
from typing import IO, Any, Final

import yaml

from agent.commands.command import Exit, Failure

_HINT: Final = "write the job as in docs/job.md: fields as 'name: value', indented with spaces"

_PLAIN: Final = (
    ("null", r"|~|null|Null|NULL"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
)
"""What a text without quotes can be other than a text: much the same as in YAML 1.2."""


class _StrictLoader(yaml.SafeLoader):
    """YAML for what JSON can hold, in which a key stands once: the second would win silently.

    No alias either: one can hold itself, and a few of them a thousand million.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None
        or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; ComposerError for an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: write it out, a job has no aliases", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of `node`; ConstructorError for a key that stands twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands here a second time", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _name, _pattern in _PLAIN:
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), None
    )


def load(stream: IO[bytes]) -> dict[str, object]:
    """Return the job in `stream` as it is written, not yet checked.

    Raises:
        Failure: it is not YAML, or no mapping; says at which line and column.
    """
    name = name_of(stream)
    try:
        document = yaml.load(stream, _StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _invalid(f"{name}{place}: {e.problem or e.context}", _HINT) from e
    except RecursionError as e:
        raise _invalid(f"{name}: it is nested too deeply", _HINT) from e
    except (yaml.YAMLError, ValueError) as e:
        raise _invalid(f"{name} is not YAML: {' '.join(str(e).split())}", _HINT) from e
    if not isinstance(document, dict):
        raise _invalid(
            f"{name} holds no job: a job is a mapping of fields",
            "the smallest one has instance.name, image.id and flavor (docs/job.md)",
        )
    return {str(key): value for key, value in document.items()}


def _invalid(message: str, hint: str) -> Failure:
    return Failure(f"InvalidJob: {message}", hint, code=Exit.USAGE)


def name_of(stream: IO[bytes]) -> str:
    """What to call the file in a sentence."""
    return str(getattr(stream, "name", "standard input"))
