"""The command `bootwright`: which commands there are, and where they are found.

A client of the API and little more; `bootwright agent` is the service itself.
"""

import click

from agent.commands.command import LazyGroup

_COMMANDS = {
    "agent": "agent.commands.configuration:agent",
    "boot": "agent.commands.boot:boot",
    "job": "agent.commands.jobs:job",
    "instance": "agent.commands.instances:instance",
    "image": "agent.commands.images:image",
    "cache": "agent.commands.images:cache",
    "status": "agent.commands.status:status",
    "doctor": "agent.commands.doctor:doctor",
    "config": "agent.commands.configuration:config_group",
}


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="bootwright", message="bootwright %(version)s")
def main() -> None:
    """Prepare the disks of virtual machines on this host, and boot them."""
