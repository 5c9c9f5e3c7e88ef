"""What lies below a directory, in a form that two runs can be compared by."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_BLOCK: Final = 4096
_PIECE: Final = 1 << 20

Tree = dict[str, str]
"""Path from the top, to what is there: kind, permissions and, of a file, size and content."""


def tree_of(top: Path) -> Tree:
    """Return all below `top`, but not the lock files: they stay, and nobody reads them."""
    found: Tree = {}
    for directory, _, names in os.walk(top):
        here = Path(directory)
        if here.name == ".locks":
            continue
        if here != top:
            found[os.fspath(here.relative_to(top))] = f"directory {_mode(here)}"
        for name in names:
            path = here / name
            found[os.fspath(path.relative_to(top))] = f"file {_mode(path)} {_content(path)}"
    return found


def differences(left: Tree, right: Tree) -> set[str]:
    """Return the paths of what is not the same in both."""
    return {path for path in left.keys() | right.keys() if left.get(path) != right.get(path)}


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.lstat().st_mode):o}"


def _content(path: Path) -> str:
    """Return size and hash; zeros are the same whether they are on the disk or in a hole."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for begin, end in _extents(file.fileno(), size):
            for at in range(begin, end, _PIECE):
                piece = os.pread(file.fileno(), min(_PIECE, end - at), at)
                _hash(hasher, at, piece)
    return f"{size} {hasher.hexdigest()}"


def _hash(hasher: "hashlib.blake2b", at: int, piece: bytes) -> None:
    if not piece.strip(b"\0"):
        return
    for offset in range(0, len(piece), _BLOCK):
        block = piece[offset : offset + _BLOCK]
        if block.strip(b"\0"):
            hasher.update((at + offset).to_bytes(8, "big"))
            hasher.update(block)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of data, in whole blocks."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin // _BLOCK * _BLOCK, end
