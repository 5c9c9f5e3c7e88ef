"""Mounts that a test needs and that go with it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_file_system(directory: Path, *, mib: int, kind: str = "ext4") -> Iterator[None]:
    """Mount an ext4 or xfs of that size, in a file beside it, on a directory; it is made."""
    image = directory.with_name(f"{directory.name}.{kind}")
    directory.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(mib << 20)
    # Without blocks that only root may use: the agent and we shall see the same.
    _run(f"mkfs.{kind}", "-q", *(["-m", "0"] if kind == "ext4" else []), image)
    _run("mount", "-o", "loop", image, directory)
    try:
        yield
    finally:
        _unmount(directory)
        image.unlink()


@contextmanager
def seen_at(source: Path, *places: Path) -> Iterator[None]:
    """Let a directory be seen at other places too, as a share is that several hosts mount."""
    mounted: list[Path] = []
    try:
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            _run("mount", "--bind", source, place)
            mounted.append(place)
        yield
    finally:
        for place in reversed(mounted):
            _unmount(place)


def _unmount(place: Path) -> None:
    # Lazily: what a failed test has left open there must not keep the rest from ending.
    _run("umount", "--lazy", place)


def _run(*words: str | Path) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=60)
