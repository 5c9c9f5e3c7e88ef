"""One pool of a Ceph cluster, and the calls on its images that disks need."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from agent import sparse
from agent.cancellation import Cancellation
from agent.ceph_bindings import Image
from agent.errors import BackendError

_STEP: Final = 4 << 20  # one object of an image
_HOST: Final = "bootwright.host"
_INSTANCE: Final = "bootwright.instance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Whose an image is, as its metadata says; empty where that says nothing."""

    host: str
    instance: str


class Pool:
    """Used by one thread. Every method raises as those of `agent.ceph.Connection`."""

    def __init__(
        self,
        name: str,
        context: Any,
        rbd: Any,
        translated: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> None:
        """`translated(what)` makes the errors of librados and librbd those of the agent."""
        self.name = name
        self.context = context
        self._rbd = rbd
        self._translated = translated

    def names(self) -> list[str]:
        with self._translated(f"listing pool {self.name}"):
            return list(self._rbd.RBD().list(self.context))

    @contextlib.contextmanager
    def _opened(self, name: str, what: str) -> Iterator[Image]:
        with self._translated(f"{what} {self.name}/{name}"):
            image: Image = self._rbd.Image(self.context, name)
            try:
                yield image
            except BaseException:
                # A lost connection cannot even close it, and what came first counts.
                with contextlib.suppress(self._rbd.Error):
                    image.close()
                raise
            image.close()

    def owner(self, name: str) -> Owner | None:
        """Return None if there is no such image."""
        try:
            with self._opened(name, "looking at") as image:
                return Owner(host=_metadata(image, _HOST), instance=_metadata(image, _INSTANCE))
        except BackendError as e:
            if isinstance(e.__cause__, self._rbd.ImageNotFound):
                return None
            raise

    def size(self, name: str) -> int:
        with self._opened(name, "looking at") as image:
            return image.size()

    def create(self, name: str, size: int) -> None:
        with self._translated(f"creating {self.name}/{name}"):
            self._rbd.RBD().create(self.context, name, size, old_format=False)

    def mark(self, name: str, owner: Owner) -> None:
        with self._opened(name, "marking") as image:
            image.metadata_set(_HOST, owner.host)
            image.metadata_set(_INSTANCE, owner.instance)

    def fill(self, name: str, fd: int, cancellation: Cancellation) -> None:
        """Write all that is no hole of an open file to where it stands in the image, durably.

        Raises:
            OSError: the file cannot be read.
            BootwrightError: the reason of the cancellation.
        """
        with self._opened(name, "writing to") as image:
            for start, end in sparse.data_extents(fd, 0, os.fstat(fd).st_size):
                begin = start
                while begin < end:
                    cancellation.check()
                    data = os.pread(fd, min(_STEP, end - begin), begin)
                    if not data:
                        raise OSError(errno.EIO, f"it ends at {begin}, before {end}")
                    image.write(data, begin)
                    begin += len(data)
            image.flush()

    def resize(self, name: str, size: int) -> None:
        with self._opened(name, "resizing") as image:
            image.resize(size)

    def rename(self, name: str, to: str) -> None:
        with self._translated(f"renaming {self.name}/{name}"):
            self._rbd.RBD().rename(self.context, name, to)

    def remove(self, name: str) -> bool:
        """Remove an image; False if somebody has it open. One that is not there is no error."""
        try:
            with self._translated(f"removing {self.name}/{name}"):
                self._rbd.RBD().remove(self.context, name)
        except BackendError as e:
            if isinstance(e.__cause__, self._rbd.ImageNotFound):
                return True
            if isinstance(e.__cause__, self._rbd.ImageBusy):
                return False
            if isinstance(e.__cause__, self._rbd.ImageHasSnapshots):
                raise BackendError(
                    f"removing {self.name}/{name}: somebody has made snapshots of it",
                    f"'rbd snap ls {self.name}/{name}' shows them, 'rbd snap purge' removes them",
                ) from e
            raise
        return True


def _metadata(image: Image, key: str) -> str:
    try:
        return image.metadata_get(key)
    except KeyError:
        return ""
