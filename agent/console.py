"""What a guest has said on its serial console: one text, however its keeper has cut it up.

libvirt has virtlogd write the log. When it has grown to `max_size` (2 MiB)
virtlogd renames it to `console.log.0`, that to `.1` and so on, removes what
`max_backups` (3) leaves no room for, and begins another. Here the pieces are put
together again, oldest first; and what is gone is never passed over in silence.

virtlogd's pieces are root's; the privileged helper lets us read them.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from oslo_privsep.comm import PrivsepTimeout

from agent.errors import HypervisorError
from agent.views import ConsolePiece
from privsep import consoles

LOG = logging.getLogger(__name__)

# virtlogd renames in a moment, and not again before a guest has said 2 MiB.
_ATTEMPTS: Final = 5


def read(
    log: Path, offset: int, most: int, *, reveal: Callable[[str], None] = consoles.reveal
) -> ConsolePiece:
    """Return up to `most` bytes of an instance's console from byte `offset` of what is kept.

    Args:
        log: the file that is written to now, in the directory named after the instance's uuid.
        reveal: makes the files of the instance of that uuid readable that are root's.

    Raises:
        HypervisorError: it cannot be read.
    """
    try:
        return _read(log, offset, most)
    except PermissionError:
        LOG.debug("the console of %s is root's in part", log.parent.name)
    try:
        reveal(log.parent.name)
        return _read(log, offset, most)
    except (OSError, PrivsepTimeout) as e:
        raise HypervisorError(
            f"the console {log} cannot be read: {e}",
            "virtlogd keeps what it has rotated for root alone, and the helper could not change "
            "that (it takes a file system with access control lists); read it as root, or raise "
            "max_size in virtlogd.conf",
        ) from e


def _read(log: Path, offset: int, most: int) -> ConsolePiece:
    with contextlib.ExitStack() as stack:
        files = _open(log, stack)
        if not files:
            return ConsolePiece(data=b"", begins="", complete=True)
        oldest = os.fstat(files[0].fileno())
        data = bytearray()
        for file in files:
            size = os.fstat(file.fileno()).st_size
            if offset < size:
                file.seek(offset)
                data += file.read(most - len(data))
            offset = max(0, offset - size)
        return ConsolePiece(
            data=bytes(data),
            begins=f"{oldest.st_dev:x}-{oldest.st_ino:x}",
            # The first file is made by us, all later ones by virtlogd, which is root.
            complete=oldest.st_uid != 0 or log.parent.stat().st_uid == 0,
        )


def _open(log: Path, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """Open all pieces, oldest first, as they were at one and the same moment."""
    for _ in range(_ATTEMPTS):
        paths = _pieces(log)
        with contextlib.ExitStack() as attempt, contextlib.suppress(FileNotFoundError):
            files: list[BinaryIO] = [attempt.enter_context(path.open("rb")) for path in paths]
            opened = (os.fstat(file.fileno()) for file in files)
            same = map(os.path.samestat, map(Path.stat, paths), opened)
            if all(same) and _pieces(log) == paths:
                stack.enter_context(attempt.pop_all())
                return files
    raise PermissionError(f"it was renamed while it was opened, {_ATTEMPTS} times in a row")


def _pieces(log: Path) -> list[Path]:
    # While virtlogd renames, a number may be missing: so all there are, and not from 0 on.
    ages = {}
    for path in log.parent.glob(f"{log.name}*"):
        number = path.name.removeprefix(log.name).removeprefix(".")
        if path == log or number.isdecimal():
            ages[path] = int(number or -1)
    return sorted(ages, key=lambda path: ages[path], reverse=True)
