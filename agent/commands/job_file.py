"""Job files: YAML (and so JSON), read without surprises."""

from typing import IO, Any

import yaml

from agent.commands.command import Exit, Failure


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, in which a key stands once: the second would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of `node`; ConstructorError for a key that stands twice."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands here a second time", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        raise Failure(f"{name}{place}: {e.problem or e.context}", code=Exit.USAGE) from e
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise Failure(f"{name} is not YAML: {e}", code=Exit.USAGE) from e
    if not isinstance(document, dict):
        raise Failure(
            f"{name} holds no job: a job is a mapping of fields",
            "the smallest one has instance.name, image.id and flavor (docs/job.md)",
            code=Exit.USAGE,
        )
    return {str(key): value for key, value in document.items()}


def name_of(stream: IO[bytes]) -> str:
    """What to call the file in a sentence."""
    return str(getattr(stream, "name", "standard input"))
