"""Running the command line, with and without an agent in memory behind a real socket."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.cli import main
from agent.listener import Listener

Cli = Callable[..., Result]

JOB = """
instance: {name: web-1}
image: {id: img-1}
flavor: {vcpus: 1, ram: 512, disk: 1}
"""
PROGRAM = (sys.executable, "-c", "from agent.cli import main; main()")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
"""For `PROGRAM`, wherever it is run."""
FLAGS = ("--image", "img-1", "--flavor", "1x512x1", "--name", "web-1")


@pytest.fixture
def cli(listener: Listener, socket_path: Path) -> Cli:
    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, ["--socket", str(socket_path), *args], input=stdin)

    return run


def alone(*args: str) -> Result:
    """A command without any agent."""
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path
