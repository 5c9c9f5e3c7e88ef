"""Disks as images in a Ceph cluster: clones of Glance's own images where it keeps them there too.

    <pool>/<uuid>_<name>                a disk
    <pool>/.bootwright-<uuid>_<name>    one that is being made

An image becomes a disk by its renaming, when all of it is there, and says in its
metadata whose it is. What bears a disk's name without that is somebody else's.
"""

import dataclasses
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.backends import Write, disk_file
from agent.base import Base
from agent.cancellation import Cancellation
from agent.ceph import Cluster, Pool
from agent.disk import Disk, DiskType, Home, RbdAccess
from agent.errors import BackendError
from agent.image import Image
from agent.job import ImagesType
from agent.report import Role

_UNFINISHED: Final = ".bootwright-"
# rbd://<fsid>/<pool>/<image>/<snapshot>, as Glance's store writes it.
_LOCATION: Final = re.compile(r"rbd://([^/]+)/([^/]+)/([^/]+)/([^/]+)")


class Rbd:
    """See `Backend`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        pool: str,
        secret_uuid: str | None,
        share_key: Callable[[str, bytes], None],
        scratch: Path,
        clones: bool,
        busy_retries: int,
        busy_interval_s: float,
    ) -> None:
        """`secret_uuid`: None for one that follows from the cluster and the user.

        `share_key(secret_uuid, key)` makes sure that the hypervisor has the user's key.

        `scratch`: a directory for files that no name is given to. `clones`: whether an
        image may be used as the cluster has it, its bytes unread.
        """
        self._cluster = cluster
        self._pool = pool
        self._secret_uuid = secret_uuid
        self._share_key = share_key
        self._scratch = scratch
        self._clones = clones
        self._busy_retries = busy_retries
        self._busy_interval_s = busy_interval_s

    def direct(self, image: Image, /) -> Base | None:
        if not self._clones or image.disk_format != "raw":
            return None
        for location in image.locations:
            match = _LOCATION.fullmatch(location)
            # A location may be anybody's word: only what Glance itself calls this image counts.
            if match is None or (match[1], match[3], match[4]) != (
                self._cluster.fsid,
                image.id,
                "snap",
            ):
                continue
            size = self._cluster.snapshot_size((match[2], match[3], match[4]))
            if size is not None:
                return Base(
                    path=Path(match[2], match[3]),
                    format="raw",
                    virtual_size=size,
                    image=image,
                    digest="" if image.digest is None else ":".join(image.digest),
                    origin="rbd",
                    location=location,
                )
        return None

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        if base is not None:
            disk_file.check_holds(virtual_size, base)
            disk_file.check_raw(base, "an image in Ceph")
        # The rules for names are those of files: one part, nothing hidden.
        image = f"{home.uuid}_{disk_file.path_of(home, name).name}"
        cached = base is not None and base.location is None
        return Disk(
            role=role,
            backend=ImagesType.RBD,
            type=DiskType.NETWORK,
            path=Path(self._pool, image),
            format="raw",
            virtual_size=virtual_size,
            base_name=base.name if base is not None and cached else None,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        cancellation.check()
        with self._cluster.pool(self._pool) as pool:
            if self._exists(pool, disk):
                return
            name = self._fresh(pool, disk)
            if base.location is not None and (match := _LOCATION.fullmatch(base.location)):
                self._cluster.clone((match[2], match[3], match[4]), pool, name)
            else:
                try:
                    fd = os.open(base.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise BackendError(f"copying base {base.name} to {disk.path}: {e}") from e
                try:
                    pool.create(name, disk.virtual_size)
                    self._fill(pool, name, fd, cancellation)
                finally:
                    os.close(fd)
            if pool.size(name) != disk.virtual_size:
                pool.resize(name, disk.virtual_size)
            self._finish(pool, disk)

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        cancellation.check()
        with self._cluster.pool(self._pool) as pool:
            if self._exists(pool, disk):
                return
            with tempfile.TemporaryFile(dir=self._scratch, buffering=0) as file:
                file.truncate(disk.virtual_size)
                write(file.fileno())
                name = self._fresh(pool, disk)
                pool.create(name, disk.virtual_size)
                self._fill(pool, name, file.fileno(), cancellation)
            self._finish(pool, disk)

    def _fill(self, pool: Pool, name: str, fd: int, cancellation: Cancellation) -> None:
        try:
            pool.fill(name, fd, cancellation)
        except BaseException:
            # Nobody holds it by now; if it stays all the same, the next attempt removes it.
            pool.remove(name)
            raise

    def _fresh(self, pool: Pool, disk: Disk) -> str:
        """Return the name a disk is made under, with nothing left there by an earlier run."""
        name = f"{_UNFINISHED}{disk.path.name}"
        self._remove(pool, name)
        return name

    def _finish(self, pool: Pool, disk: Disk) -> None:
        name = f"{_UNFINISHED}{disk.path.name}"
        pool.mark(name, disk.path.name.partition("_")[0])
        pool.rename(name, disk.path.name)

    def _exists(self, pool: Pool, disk: Disk) -> bool:
        owner = pool.owner(disk.path.name)
        if owner is None:
            return False
        if not disk.path.name.startswith(f"{owner}_"):
            raise BackendError(
                f"{disk.path} is in the way: it is an image that this agent has not made",
                "look what it is, and rename or remove it with rbd",
            )
        return True

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        with self._cluster.pool(self._pool) as pool:
            if not self._exists(pool, disk):
                raise BackendError(f"growing {disk.path}: there is no such image")
            found = dataclasses.replace(disk, virtual_size=pool.size(disk.path.name))
            disk_file.check_grows(found, virtual_size)
            pool.resize(disk.path.name, virtual_size)
        return dataclasses.replace(disk, virtual_size=virtual_size)

    def remove(self, disk: Disk, home: Home) -> None:
        if disk.path.parent != Path(self._pool) or not disk.path.name.startswith(f"{home.uuid}_"):
            raise BackendError(
                f"{disk.path} is no disk of instance {home.uuid} in pool {self._pool} and was not "
                "removed"
            )
        with self._cluster.pool(self._pool) as pool:
            self._remove(pool, f"{_UNFINISHED}{disk.path.name}")
            if self._exists(pool, disk):
                self._remove(pool, disk.path.name)

    def _remove(self, pool: Pool, name: str) -> None:
        for attempt in range(self._busy_retries + 1):
            if attempt:
                # A QEMU that has just ended is believed to have it for some seconds.
                time.sleep(self._busy_interval_s)
            if pool.remove(name):
                return
        raise BackendError(
            f"removing {pool.name}/{name}: somebody still has it open",
            f"'rbd status {pool.name}/{name}' tells who",
        )

    def access(self) -> RbdAccess | None:
        # The same on every host of the cluster, as a migration needs it.
        secret_uuid = self._secret_uuid or str(
            uuid.uuid5(uuid.UUID(self._cluster.fsid), self._cluster.user)
        )
        self._share_key(secret_uuid, self._cluster.key())
        return RbdAccess(
            monitors=self._cluster.monitors(),
            user=self._cluster.user,
            secret_uuid=secret_uuid,
        )
