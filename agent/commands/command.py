"""What all commands have in common: the global options, the way they fail, the exit codes.

Imports nothing that is slow: every call of `bootwright` passes here.
"""

import difflib
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from agent.client import Client

P = ParamSpec("P")
R = TypeVar("R")


class Exit(enum.IntEnum):
    """The exit codes, frozen."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TIMED_OUT = 3
    MISSING = 4
    DEGRADED = 5


class Format(enum.StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


class Failure(click.ClickException):
    """Ends the command with a sentence on standard error and an exit code."""

    def __init__(self, message: str, hint: str = "", *, code: Exit = Exit.FAILED) -> None:
        super().__init__(f"{message}\nHint: {hint}" if hint else message)
        self.exit_code = code  # type: ignore[misc]  # one class, any code


@dataclass(slots=True)
class Invocation:
    """The global options of one call."""

    config_file: tuple[str, ...] = ()
    config_dir: tuple[str, ...] = ()
    socket: str | None = None
    format: Format = Format.TABLE

    def client(self) -> "Client":
        """Return a client for the agent the options name; it connects when used."""
        from agent.client import Client  # noqa: PLC0415 - slow, and not every command needs it
        from agent.config_files import ConfigError, api_socket  # noqa: PLC0415

        if self.socket is not None:
            return Client(Path(self.socket))
        try:
            return Client(api_socket(self.config_file, self.config_dir))
        except ConfigError as e:
            raise Failure(str(e), code=Exit.USAGE) from e


def invocation(
    function: Callable[Concatenate[Invocation, P], R],
) -> Callable[P, R]:
    """Give a command the `Invocation` as its first argument."""
    return click.make_pass_decorator(Invocation, ensure=True)(function)


class Command(click.Command):
    """A command that takes the global options too, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_options())

    def invoke(self, ctx: click.Context) -> object:
        """Run it; what the agent refuses or cannot do becomes a `Failure`."""
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except Exception as e:
            if failure := _failure(e):
                raise failure from e
            raise


class Group(click.Group):
    """A group of commands; takes the global options as they do."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_options())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a UsageError names the nearest if there is none of that name."""
        if self.get_command(ctx, args[0]) is None and args[0][:1].isalnum():
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.5)
            meant = f" Did you mean '{near[0]}'?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{meant}")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group whose commands are imported when they are used: `module:name` for each."""

    def __init__(self, *args: Any, lazy: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order they were given."""
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, importing it; None if there is none of that name."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, name = self._lazy[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


def _global_options() -> list[click.Option]:
    """Return new global options; each writes into the `Invocation`."""
    return [
        click.Option(
            ["--config-file"],
            multiple=True,
            metavar="FILE",
            type=click.Path(),
            expose_value=False,
            callback=_remember,
            help="Read this configuration file instead of /etc/bootwright; may be repeated.",
        ),
        click.Option(
            ["--config-dir"],
            multiple=True,
            metavar="DIR",
            type=click.Path(),
            expose_value=False,
            callback=_remember,
            help="Read every .conf file of this directory after the files; may be repeated.",
        ),
        click.Option(
            ["--socket"],
            metavar="PATH",
            type=click.Path(),
            expose_value=False,
            callback=_remember,
            help="Unix socket of the agent, instead of the one of the configuration.",
        ),
        click.Option(
            ["--format"],
            type=click.Choice(Format, case_sensitive=False),
            expose_value=False,
            callback=_remember,
            help="Form of the result on standard output; table if not given.",
        ),
    ]


def _remember(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value and param.name is not None:
        setattr(ctx.ensure_object(Invocation), param.name, value)


def _failure(error: Exception) -> Failure | None:
    """What an error of the client comes to; None for a defect."""
    # Imported by whoever raised it; a command that needs no agent never pays for it.
    from agent.client import AgentUnavailable, Refused  # noqa: PLC0415

    match error:
        case AgentUnavailable():
            return Failure(str(error))
        case Refused(status=404):
            return Failure(str(error), error.error.hint, code=Exit.MISSING)
        case Refused() if error.error.code == "InvalidJob":
            return Failure(str(error), error.error.hint, code=Exit.USAGE)
        case Refused():
            return Failure(str(error), error.error.hint)
        case _:
            return None
