"""`bootwright config …` and `bootwright agent`: the commands that read the whole configuration."""

import dataclasses
import logging
from pathlib import Path

import click
from oslo_config import cfg

from agent import config, logs
from agent.commands.command import Command, Exit, Failure, Group, Invocation, invocation
from agent.commands.output import emit, rows
from agent.config import ConfigError, Configuration

LOG = logging.getLogger(__name__)


@click.group("config", cls=Group)
def config_group() -> None:
    """The configuration; needs no running agent."""


@config_group.command()
@invocation
def sample(call: Invocation) -> None:
    """Print a configuration file with every option, explained and commented out."""
    text = config.sample()
    emit(call, {"sample": text}, lambda: click.echo(text, nl=False))


@config_group.command()
@invocation
def show(call: Invocation) -> None:
    """Show every option as it is in effect, and where it was set."""
    try:
        values = _read(call).effective()
    except ConfigError as e:
        raise Failure(str(e), code=Exit.USAGE) from e
    emit(
        call,
        {"options": [dataclasses.asdict(value) for value in values]},
        lambda: rows(
            ("SECTION", "OPTION", "VALUE", "FROM"),
            ((value.section, value.name, value.value, value.origin) for value in values),
        ),
    )


@config_group.command()
@invocation
def check(call: Invocation) -> None:
    """Check the configuration: exit code 2 if the agent would not start with it."""
    configuration = _read(call)
    warnings, problems = configuration.warnings(), configuration.problems()
    emit(call, {"warnings": warnings, "problems": problems}, lambda: None)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    if problems:
        raise Failure("\n".join(problems), code=Exit.USAGE)
    click.echo("The agent can start with this configuration.", err=True)


@click.command(cls=Command)
@invocation
def agent(call: Invocation) -> None:
    """Run the service in the foreground; what the systemd unit starts."""
    # The service brings libvirt and Glance along, which no other command here needs.
    from agent.journal import JournalUnusable  # noqa: PLC0415
    from agent.listener import ListenError  # noqa: PLC0415
    from agent.main import run  # noqa: PLC0415
    from agent.privileges import HelperNotStarted, PrivilegesNotDropped  # noqa: PLC0415

    configuration = _read(call)
    try:
        settings = configuration.settings()
    except ConfigError as e:
        raise Failure(str(e), code=Exit.USAGE) from e
    if call.socket is not None:
        socket = Path(call.socket).absolute()
        settings = dataclasses.replace(
            settings, api=dataclasses.replace(settings.api, socket=socket)
        )
    _set_up_logging(configuration, debug=settings.debug)
    try:
        status = run(settings, lambda: _reload(call))
    except (JournalUnusable, ListenError, PrivilegesNotDropped, HelperNotStarted, OSError) as e:
        raise Failure(f"the agent ends: {e}") from e
    click.get_current_context().exit(status)


def _reload(call: Invocation) -> None:
    """Take over what may change in a running agent: how much is logged."""
    try:
        # Not into oslo.config's global object: the rest of the agent goes on with that.
        configuration = Configuration(call.config_file, call.config_dir, conf=cfg.ConfigOpts())
        settings = configuration.settings()
        _set_up_logging(configuration, debug=settings.debug)
    except ConfigError as e:
        LOG.error("the configuration was not read again: %s", e)
        return
    except Exception:  # a defect of ours or of a plugin is no reason to end the service
        LOG.exception("the configuration was not read again")
        return
    LOG.info("read the configuration again: debug is in effect, all else needs a restart")


def _set_up_logging(configuration: Configuration, *, debug: bool) -> None:
    logs.setup(debug=debug)
    for warning in configuration.warnings():
        LOG.warning("%s", warning)


def _read(call: Invocation) -> Configuration:
    try:
        return Configuration(call.config_file, call.config_dir)
    except ConfigError as e:
        raise Failure(str(e), code=Exit.USAGE) from e
