"""The backends: how a disk is made, of a base or of nothing, and how it goes.

Another backend is one module here and one line in `disk_backends`, where those of a
host are put together; its name is one of `job.ImagesType`. It passes the suite of
`tests/backend_contract.py`.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, DiskType, Home, RbdAccess
from agent.errors import BackendError, InvalidJob
from agent.files import Together
from agent.image import Image
from agent.job import ImagesType
from agent.report import Role

Write = Callable[[int], None]
"""Puts the content of a disk into an empty, sparse, raw file of its size, given by descriptor."""


class HeldElsewhere(BackendError):
    """The instance's disk bears the mark of another host, or of this one's earlier name."""

    @property
    def code(self) -> str:
        return BackendError.__name__


class Backend(Protocol):
    """One way to keep a disk; threads may share it.

    A disk that exists is whole: it is made under another name and renamed, so
    every method may be called again after a crash at any instant. What bears a
    disk's name and is not the agent's is neither used nor removed.
    """

    def direct(self, image: Image, cancellation: Cancellation, /) -> Base | None:
        """Return a base that disks here can be made of without fetching the image, if there is one.

        Raises:
            BackendError: whether there is cannot be found out.
            BootwrightError: the reason of the cancellation.
        """
        ...

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        """Return what a disk will be; nothing is made, nothing is looked at.

        A backend whose disks have nothing to gain without a base may plan one
        that another backend keeps, which `Disk.backend` then tells.

        Args:
            name: the disk's, such as `disk` or `disk.eph0`.
            base: what it will be made of; None for a disk made by `generate`.
            virtual_size: bytes, not less than the base's.

        Raises:
            BackendError: the base does not fit, or is of a kind that cannot be used.
        """
        ...

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        """Make a disk of its base; one that exists is kept, with what the guest wrote.

        Raises:
            BackendError: something else stands in its place, or it could not be made.
            InsufficientFreeSpace
            BootwrightError: the reason of the cancellation.
        """
        ...

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        """Make a disk of what `write` writes; one that exists is kept. Raises as `prepare`."""
        ...

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        """Make a disk larger while no guest uses it, and return it as it is then.

        Raises:
            BackendError: it would shrink, or could not be grown.
        """
        ...

    def remove(self, disk: Disk, home: Home, cancellation: Cancellation, /) -> None:
        """Remove a disk; one that is not there is no error.

        What can be done at once is done, whatever the cancellation says.

        Raises:
            HeldElsewhere: the disk was not removed; what an attempt to make it has left was.
            BackendError: it is not a disk of this instance; nothing was removed. Or it could
                not be removed.
            BootwrightError: the reason of the cancellation; what is left goes with the next call.
        """
        ...

    def access(self) -> RbdAccess | None:
        """Return what a domain has to know to reach these disks, beside their paths.

        Raises:
            BackendError: it cannot be found out.
        """
        ...


class OverlayBackend(abc.ABC):
    """A `Backend` whose disks of a base are one small file each."""

    @abc.abstractmethod
    def overlay(
        self, disk: Disk, base: Base, together: Together, cancellation: Cancellation
    ) -> None:
        """Make a disk as `prepare` does; it is there, and durable, when `together` is published."""


class Backends:
    """Those of one host, by the `images_type` that asks for them; threads may share it."""

    def __init__(
        self, backends: Mapping[ImagesType, Backend], *, only: ImagesType | None = None
    ) -> None:
        """`only`: what instances may ask for, where all of their disks have to be encrypted."""
        self._backends = dict(backends)
        self._only = only

    def __getitem__(self, images_type: ImagesType) -> Backend:
        """Raises: InvalidJob: this host has none of that type."""
        try:
            return self._backends[images_type]
        except KeyError:
            raise InvalidJob(
                f"this host keeps no {images_type} disks, only {', '.join(self._backends)}",
                f"ask for another images_type, or configure {images_type} in [libvirt] "
                "(docs/configuration.md)",
            ) from None

    def require(self, images_type: ImagesType) -> None:
        """Raises: InvalidJob: this host has none of that type for an instance."""
        self[images_type]
        if self._only not in (None, images_type):
            raise InvalidJob(
                f"this host encrypts the disks of instances, and those of images_type "
                f"{images_type} would not be",
                f"leave images_type out, or ask for {self._only}",
            )

    def access(self, disks: Iterable[Disk]) -> RbdAccess | None:
        """Return what a domain needs to reach those disks; all of them are in one cluster.

        Raises:
            BackendError: it cannot be found out.
        """
        for disk in disks:
            if disk.type is DiskType.NETWORK:
                return self[disk.backend].access()
        return None

    def __iter__(self) -> Iterator[ImagesType]:
        return iter(self._backends)
