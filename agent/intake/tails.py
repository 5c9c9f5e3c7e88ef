"""The bytes of an image received since its last checkpoints, for the case that the agent dies.

    tail-<offset>    the bytes from <offset> on

They are never synced, and each file is removed before the kernel gets round to
writing it to the disk: they cost a copy in memory, and spare asking for these
bytes again. A crash of the host takes them along.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"tail-([0-9]+)")
_PIECE = 1 << 20


class Tails:
    """Those in one directory; for one thread, but for `forget`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None

    def pieces(self, offset: int) -> Iterator[bytes]:
        """Yield what is there from `offset` on, as far as it has no gap."""
        for begin, path in self._files():
            if begin > offset:
                return
            with path.open("rb", buffering=0) as file:
                file.seek(offset - begin)
                while piece := file.read(_PIECE):
                    offset += len(piece)
                    yield piece

    def append(self, offset: int, chunk: bytes) -> None:
        """Add the bytes from `offset` on."""
        if self._fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._directory / f"tail-{offset}", flags, 0o600)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def cut(self) -> None:
        """Begin another file with the next bytes; may be called again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def forget(self, before: int | None = None) -> None:
        """Remove the files that begin before an offset, or all of them."""
        for begin, path in self._files():
            if before is None or begin < before:
                path.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        found = []
        for path in self._directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found.append((int(match[1]), path))
        return sorted(found)
