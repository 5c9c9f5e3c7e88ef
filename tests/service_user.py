"""Run a program as the service runs: as user bootwright, with what the unit leaves it.

Only root can. The interpreter under test and the checkout may lie below a
directory that nobody else may enter (a home, a temporary directory), so the
program gets a mount namespace of its own in which both are within reach.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

USER: Final = "bootwright"
CHECKOUT: Final = Path(__file__).parent.parent

# $1 the virtualenv, $2 the checkout, $3 a capability for the ambient set or
# nothing; the rest is the program, relative to the checkout, and its arguments.
_LAUNCH: Final = """
set -e
environment=$1 checkout=$2 kept=$3; shift 3
mount -t tmpfs -o mode=0755 tmpfs /mnt
mkdir /mnt/environment /mnt/checkout
mount --rbind "$environment" /mnt/environment
mount --rbind "$checkout" /mnt/checkout
export PYTHONPATH=/mnt/checkout PYTHONDONTWRITEBYTECODE=1
cd /mnt/checkout
exec setpriv --reuid=bootwright --regid=bootwright --init-groups --no-new-privs \
    --inh-caps="-all$kept" --ambient-caps="-all$kept" --bounding-set="-all$kept" \
    /mnt/environment/bin/python "$@"
"""


def require_root() -> None:
    """Skip the test at a desk, fail it in CI, unless this is root."""
    if os.getuid() != 0:
        reason = "needs root, to become the service user"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def account() -> pwd.struct_passwd:
    """The service user; made as a package would make it if it is missing."""
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["systemd-sysusers", CHECKOUT / "etc/bootwright.sysusers"], check=True)
        return pwd.getpwnam(USER)


@contextmanager
def directory() -> Iterator[Path]:
    """A directory the service user owns and can reach (pytest's own belong to root alone)."""
    path = Path(tempfile.mkdtemp(prefix="bootwright-test-"))
    path.chmod(0o711)
    os.chown(path, account().pw_uid, account().pw_gid)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def run(
    program: Path, *arguments: str | Path, capability: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a Python program of the checkout; `capability` ("fowner") is all it has."""
    account()
    kept = f",+{capability}" if capability else ""
    return subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", _LAUNCH, "launch"),
            *(sys.prefix, CHECKOUT, kept, program.relative_to(CHECKOUT), *arguments),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
