"""Disks as overlays: a qcow2 file that holds what differs from the base."""

import dataclasses
from pathlib import Path

from agent import process, qcow2
from agent.backends import disk_file
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, Link
from agent.errors import BackendError
from agent.report import Role

# An empty L1 table is all that grows, so this is for a disk that hangs.
_RESIZE_LIMIT_S = 300.0


class Qcow2:
    """See `Backend`."""

    def plan(
        self, instance_dir: Path, role: Role, name: str, base: Base | None, virtual_size: int
    ) -> Disk:
        chain: tuple[Link, ...] = ()
        if base is not None:
            disk_file.check_holds(virtual_size, base)
            chain = (Link(path=base.path, format=base.format),)
        return Disk(
            role=role,
            path=disk_file.path_of(instance_dir, name),
            format="qcow2",
            virtual_size=virtual_size,
            base_name=None if base is None else base.name,
            backing_chain=chain,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        cancellation.check()
        if disk_file.exists(disk):
            return
        try:
            qcow2.create_overlay(
                disk.path,
                virtual_size=disk.virtual_size,
                backing_file=base.path,
                backing_format=base.format,
            )
        except (ValueError, OSError) as e:
            raise BackendError(f"creating the overlay {disk.path}: {e}") from e

    def create_empty(self, disk: Disk) -> None:
        if disk_file.exists(disk):
            return
        try:
            qcow2.create_empty(disk.path, virtual_size=disk.virtual_size)
        except (ValueError, OSError) as e:
            raise BackendError(f"creating {disk.path}: {e}") from e

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        try:
            process.run(
                ["qemu-img", "resize", "-q", "-f", "qcow2", "--", disk.path, str(virtual_size)],
                timeout_s=_RESIZE_LIMIT_S,
            )
        except process.ProgramFailed as e:
            raise BackendError(f"growing {disk.path} to {virtual_size} bytes: {e}") from e
        return dataclasses.replace(disk, virtual_size=virtual_size)

    def remove(self, disk: Disk, instance_dir: Path) -> None:
        disk_file.remove(disk, instance_dir)
