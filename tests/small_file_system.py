"""File systems of two MiB, to be really full, or to lack something."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def mounted_file_system(kind: str) -> Callable[[Path], Iterator[Path]]:
    """Return a fixture: a directory with a file system of that kind in it."""

    @pytest.fixture
    def mounted(tmp_path: Path) -> Iterator[Path]:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        where = tmp_path / kind
        where.mkdir()
        argv: list[str | Path] = ["mount", "-t", kind, "-o", "size=2m", kind, where]
        if subprocess.run(argv, check=False).returncode:
            pytest.skip("no mounts here")
        try:
            yield where
        finally:
            subprocess.run(["umount", where], check=True)

    return mounted
