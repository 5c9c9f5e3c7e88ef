"""The virtualenv that Glance and Keystone run from, and the empty databases made with it.

Both are slow to make (a minute and ten seconds) and are kept, so only the first run pays.
"""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CONSTRAINTS = Path(__file__).with_name("glance-constraints.txt")
_REQUIREMENTS = ("glance", "keystone", "gunicorn")
_PYTHON = "/usr/bin/python3"


def install(cache_dir: Path) -> Path:
    """Return the virtualenv in `cache_dir` for these constraints, built first if it is not there.

    Several processes may call this at once; all but one wait. What others run
    from, whose constraints are not ours, is left alone.

    Raises:
        subprocess.CalledProcessError: the packages cannot be installed; pip says why on stderr.
    """
    constraints = hashlib.sha256(_CONSTRAINTS.read_bytes()).hexdigest()
    venv = cache_dir.resolve() / f"glance-{constraints[:12]}"
    installed = venv / ".installed"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / "glance.lock"):
        if installed.exists():
            return venv
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([_PYTHON, "-m", "venv", venv], check=True, timeout=300)
        pip: list[str | Path] = [venv / "bin/pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run(
            [*pip, "install", "--constraint", _CONSTRAINTS, *_REQUIREMENTS],
            check=True,
            timeout=1200,
        )
        installed.touch()
    return venv


def copy_prepared(
    venv: Path, name: str, prepare: Callable[[Path, Path], None], target: Path
) -> None:
    """Copy the prepared directory `name` to `target`, which must not exist.

    Args:
        venv: where the prepared directory is kept, so that it goes when the packages change.
        name: one for each kind of directory.
        prepare: fills an empty directory, given the virtualenv and that directory; called once
            in the life of the virtualenv.
        target: the copy.
    """
    prepared = venv / "prepared" / name
    with _lock(venv / f"{name}.lock"):
        if not prepared.exists():
            unfinished = prepared.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            prepare(venv, unfinished)
            unfinished.rename(prepared)
    shutil.copytree(prepared, target)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
