"""The backends: how a disk is made of a base, or of nothing.

Another backend is one module here and one line in `_BACKENDS`, and passes
`tests/test_backends.py`.
"""

from pathlib import Path
from typing import Final, Protocol

from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.job import ImagesType
from agent.report import Role


class Backend(Protocol):
    """One way to keep a disk; holds no state, so threads may share it.

    A disk that exists is whole: it is made under another name and renamed, so
    every method may be called again after a crash at any instant.
    """

    def plan(
        self, instance_dir: Path, role: Role, name: str, base: Base | None, virtual_size: int
    ) -> Disk:
        """Return what a disk will be; nothing is made, nothing is looked at.

        Args:
            name: the disk's name in the instance's directory, such as `disk.eph0`.
            base: what it will be made of; None for an empty disk.
            virtual_size: bytes, not less than the base's.

        Raises:
            BackendError: the base does not fit, or is of a kind that cannot be used.
        """
        ...

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        """Make a disk of its base; one that exists is kept, with what the guest wrote.

        Raises:
            BackendError: something else stands at its path, or it could not be made.
            InsufficientFreeSpace
        """
        ...

    def create_empty(self, disk: Disk) -> None:
        """Make a disk that reads as zeros; one that exists is kept. Raises as `prepare`."""
        ...

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        """Make a disk larger while no guest uses it, and return it as it is then.

        Raises:
            BackendError: it would shrink, or could not be grown.
        """
        ...

    def remove(self, disk: Disk, instance_dir: Path) -> None:
        """Remove a disk; one that is not there is no error.

        Raises:
            BackendError: it is not a disk of this instance; nothing was removed.
        """
        ...


_BACKENDS: Final[dict[ImagesType, Backend]] = {
    ImagesType.QCOW2: Qcow2(),
    ImagesType.RAW: Flat(),
}


def by_type(images_type: ImagesType) -> Backend:
    return _BACKENDS[images_type]
