"""Disks as overlays: a qcow2 file that holds what differs from the base."""

import dataclasses

from agent import files, qcow2
from agent.backends import OverlayBackend, Write, disk_file
from agent.backends.flat import Flat
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Home, Link, RbdAccess
from agent.errors import BackendError
from agent.image import Image
from agent.job import ImagesType
from agent.qemu_img import QemuImg
from agent.report import Role


class Qcow2(OverlayBackend):
    """See `Backend`.

    A disk that stands on no base is a flat one: as qcow2 it would share nothing.
    """

    def __init__(
        self,
        qemu_img: QemuImg,
        *,
        preallocate: bool = False,
        geometry: qcow2.Geometry = qcow2.DEFAULT_GEOMETRY,
    ) -> None:
        """`preallocate`: take the space of a whole disk when it is made."""
        self._qemu_img = qemu_img
        self._preallocate = preallocate
        self._geometry = geometry
        self._flat = Flat(preallocate=preallocate)

    def direct(self, _image: Image, _cancellation: Cancellation, /) -> Base | None:
        return None

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        if base is None:
            return self._flat.plan(home, role, name, None, virtual_size)
        disk_file.check_holds(virtual_size, base)
        return Disk(
            role=role,
            backend=ImagesType.QCOW2,
            path=disk_file.path_of(home, name),
            format="qcow2",
            virtual_size=virtual_size,
            base_name=base.name,
            backing_chain=(Link(path=base.path, format=base.format),),
            native_io=self._preallocate,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        with files.reporting("creating the overlay", disk.path), files.Together() as together:
            self.overlay(disk, base, together, cancellation)
            together.publish()

    def overlay(
        self, disk: Disk, base: Base, together: files.Together, cancellation: Cancellation
    ) -> None:
        cancellation.check()
        if not disk_file.exists(disk):
            try:
                qcow2.create_overlay(
                    disk.path,
                    virtual_size=disk.virtual_size,
                    backing_file=base.path,
                    backing_format=base.format,
                    geometry=self._geometry,
                    together=together,
                )
            except (ValueError, OSError) as e:
                raise BackendError(f"creating the overlay {disk.path}: {e}") from e
        if self._preallocate:
            # By its name. Also one that exists: a crash may have come between the two.
            together.publish()
            disk_file.preallocate(disk)

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        self._flat.generate(disk, write, cancellation)

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        grown = dataclasses.replace(disk, virtual_size=virtual_size)
        if self._preallocate:
            disk_file.preallocate(grown)  # while the disk still is as it was if that fails
        backing = [link.path for link in disk.backing_chain]
        try:
            self._qemu_img.grow(disk.path, "qcow2", virtual_size, backing=backing)
        except OSError as e:
            raise BackendError(f"growing {disk.path} to {virtual_size} bytes: {e}") from e
        return grown

    def remove(self, disk: Disk, home: Home, _cancellation: Cancellation, /) -> None:
        disk_file.remove(disk, home)

    def access(self) -> RbdAccess | None:
        return None
