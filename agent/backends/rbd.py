"""Disks as images in a Ceph cluster: clones of Glance's own images where it keeps them there too.

    <pool>/<uuid>_<name>                       a disk
    <pool>/.bootwright-<host>-<uuid>_<name>    one that is being made; the host's hash

An image becomes a disk by its renaming, when all of it is there, and says in its
metadata whose it is: which host's, for hosts may share a pool, and which instance's.
What bears a disk's name without that is somebody else's.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from agent.backends import HeldElsewhere, Write, disk_file
from agent.base import Base
from agent.cancellation import Cancellation
from agent.ceph import Cluster, Connection
from agent.ceph_pool import Owner, Pool
from agent.disk import Disk, DiskType, Home, RbdAccess
from agent.errors import BackendError, BootwrightError
from agent.files import reporting_no_space
from agent.image import Image
from agent.job import ImagesType
from agent.report import Role

LOG = logging.getLogger(__name__)

# rbd://<fsid>/<pool>/<image>/<snapshot>, as Glance's store writes it.
_LOCATION: Final = re.compile(r"rbd://([^/]+)/([^/]+)/([^/]+)/([^/]+)")


class Rbd:
    """See `Backend`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        host: str,
        pool: str,
        secret_uuid: str | None,
        share_key: Callable[[str, str, bytes], None],
        scratch: Path,
        clone_pools: Collection[str],
        copy: Callable[[Image, Cancellation], Image | None] | None = None,
        busy_retries: int,
        busy_interval_s: float,
    ) -> None:
        """`host`: the name of this one among those that share the pool.

        `secret_uuid`: None for one that follows from the cluster and the user.

        `share_key(secret_uuid, usage, key)` makes sure that the hypervisor has the user's key.

        `scratch`: a directory for files that no name is given to. `clone_pools`:
        those in which an image may be used as the cluster has it, its bytes unread. `copy`
        has Glance copy an image that is elsewhere into one of these, and returns its new record;
        None where the image cache is the better way.
        """
        self._cluster = cluster
        self._host = host
        self._pool = pool
        self._secret_uuid = secret_uuid
        self._share_key = share_key
        self._scratch = scratch
        self._clone_pools = clone_pools
        self._copy = copy
        self._busy_retries = busy_retries
        self._busy_interval_s = busy_interval_s

    def direct(self, image: Image, cancellation: Cancellation, /) -> Base | None:
        if not self._clone_pools or image.disk_format != "raw":
            return None
        found = self._cluster.call(lambda ceph: self._direct(ceph, image))
        if found is not None or self._copy is None:
            return found
        copied = self._copy(image, cancellation)
        if copied is None:
            return None
        found = self._cluster.call(lambda ceph: self._direct(ceph, copied))
        if found is None:
            LOG.warning(
                "image %s is fetched, though Glance has copied it: it shows no location in a pool "
                "of images_rbd_glance_pools",
                image.id,
            )
        return found

    def _direct(self, ceph: Connection, image: Image) -> Base | None:
        for location in image.locations:
            match = _LOCATION.fullmatch(location)
            # A location may be anybody's word: only what Glance itself calls this image counts.
            if match is None or (match[1], match[3], match[4]) != (ceph.fsid, image.id, "snap"):
                continue
            if match[2] not in self._clone_pools:
                LOG.info(
                    "image %s is fetched, though it is in Ceph: pool %s is not in "
                    "images_rbd_glance_pools",
                    image.id,
                    match[2],
                )
                continue
            size = ceph.snapshot_size((match[2], match[3], match[4]))
            if size is None:
                LOG.info(
                    "image %s is fetched, though it is in Ceph: client.%s finds no protected "
                    "snapshot %s",
                    image.id,
                    self._cluster.user,
                    location,
                )
            else:
                return Base(
                    path=Path(match[2], match[3]),
                    format="raw",
                    virtual_size=size,
                    image=image,
                    digest=None,
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
        self._cluster.call(lambda ceph: self._prepare(ceph, disk, base, cancellation))

    def _prepare(
        self, ceph: Connection, disk: Disk, base: Base, cancellation: Cancellation
    ) -> None:
        cancellation.check()
        with ceph.pool(self._pool) as pool:
            if self._exists(pool, disk):
                return
            with self._making(ceph, pool, disk, cancellation) as name:
                if base.location is not None and (match := _LOCATION.fullmatch(base.location)):
                    LOG.info("cloning %s, of which no byte is read or checked", base.location)
                    ceph.clone((match[2], match[3], match[4]), pool, name)
                else:
                    with _reading(base.path, f"making {disk.path} of base {base.name}:") as fd:
                        pool.create(name, disk.virtual_size)
                        pool.fill(name, fd, cancellation)
                if pool.size(name) != disk.virtual_size:
                    pool.resize(name, disk.virtual_size)

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        self._cluster.call(lambda ceph: self._generate(ceph, disk, write, cancellation))

    def _generate(
        self, ceph: Connection, disk: Disk, write: Write, cancellation: Cancellation
    ) -> None:
        cancellation.check()
        with ceph.pool(self._pool) as pool:
            if self._exists(pool, disk):
                return
            with self._scratch_file(disk) as fd:
                write(fd)
                with self._making(ceph, pool, disk, cancellation) as name:
                    pool.create(name, disk.virtual_size)
                    pool.fill(name, fd, cancellation)

    @contextlib.contextmanager
    def _making(
        self, ceph: Connection, pool: Pool, disk: Disk, cancellation: Cancellation
    ) -> Iterator[str]:
        """Give the name a disk is made under; at the end of the block it becomes the disk's."""
        name = self._unfinished(disk)
        self._remove(pool, name, cancellation)  # what an earlier run has left
        try:
            yield name
            pool.mark(name, self._owner(disk))
            pool.rename(name, disk.path.name)
        except BaseException:
            # What came first counts. What stays here the next attempt removes, or the delete.
            if not ceph.lost:
                with contextlib.suppress(BootwrightError):
                    pool.remove(name)
            raise

    def _exists(self, pool: Pool, disk: Disk) -> bool:
        owner = pool.owner(disk.path.name)
        if owner is None:
            return False
        if owner == self._owner(disk):
            return True
        if owner.host and owner.instance:
            raise HeldElsewhere(
                f"{disk.path} is in the way: host {owner.host} has made it for instance "
                f"{owner.instance}, and this is host {self._host}",
                "boot under another uuid; or, if that host is no more and the instance's directory "
                f"is here now: rbd image-meta set {disk.path} bootwright.host {self._host}",
            )
        raise BackendError(
            f"{disk.path} is in the way: it is an image that no agent has made",
            "look what it is, and rename or remove it with rbd",
        )

    def _owner(self, disk: Disk) -> Owner:
        return Owner(host=self._host, instance=disk.path.name.partition("_")[0])

    def _unfinished(self, disk: Disk) -> str:
        # Two hosts may make disks of one name at a time. A name has at most 95 characters.
        host = hashlib.sha256(self._host.encode()).hexdigest()[:8]
        return f".bootwright-{host}-{disk.path.name}"

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        self._cluster.call(lambda ceph: self._grow(ceph, disk, virtual_size))
        return dataclasses.replace(disk, virtual_size=virtual_size)

    def _grow(self, ceph: Connection, disk: Disk, virtual_size: int) -> None:
        with ceph.pool(self._pool) as pool:
            if not self._exists(pool, disk):
                raise BackendError(f"growing {disk.path}: there is no such image")
            found = dataclasses.replace(disk, virtual_size=pool.size(disk.path.name))
            disk_file.check_grows(found, virtual_size)
            pool.resize(disk.path.name, virtual_size)

    def remove(self, disk: Disk, home: Home, cancellation: Cancellation, /) -> None:
        if disk.path.parent != Path(self._pool) or not disk.path.name.startswith(f"{home.uuid}_"):
            raise BackendError(
                f"{disk.path} is no disk of instance {home.uuid} in pool {self._pool} and was not "
                "removed"
            )
        self._cluster.call(lambda ceph: self._remove_all(ceph, disk, home, cancellation))

    def _remove_all(
        self, ceph: Connection, disk: Disk, home: Home, cancellation: Cancellation
    ) -> None:
        with ceph.pool(self._pool) as pool:
            self._remove(pool, self._unfinished(disk), cancellation)
            owner = pool.owner(disk.path.name)
            if owner == self._owner(disk):
                self._remove(pool, disk.path.name, cancellation)
            elif owner is not None and owner.host and owner.instance == home.uuid:
                # Forgotten here, a disk of an earlier host_id would be known to nobody.
                raise HeldElsewhere(
                    f"{disk.path} was not removed: host {owner.host} has made it for this "
                    f"instance, and this is host {self._host}",
                    "if that is this host's earlier host_id, or that host is no more: rbd "
                    f"image-meta set {disk.path} bootwright.host {self._host}, and delete the "
                    f"instance again; if the instance is that host's: remove {home.directory} and "
                    "restart the agent",
                )
            elif owner is not None:
                LOG.warning("%s is left alone: this host's agent has not made it", disk.path)

    def _remove(self, pool: Pool, name: str, cancellation: Cancellation) -> None:
        for attempt in range(self._busy_retries + 1):
            if attempt:
                # A QEMU that has just ended is believed to have it for some seconds.
                cancellation.wait(self._busy_interval_s)
            if pool.remove(name):
                return
        raise BackendError(
            f"removing {pool.name}/{name}: somebody still has it open",
            f"'rbd status {pool.name}/{name}' tells who",
        )

    def access(self) -> RbdAccess | None:
        return self._cluster.call(self._access)

    def _access(self, ceph: Connection) -> RbdAccess:
        user = self._cluster.user
        # The same on every host of the cluster, as a migration needs it.
        secret_uuid = self._secret_uuid or str(uuid.uuid5(uuid.UUID(ceph.fsid), user))
        # libvirt has one secret for each usage, and a host may have disks in two clusters.
        self._share_key(secret_uuid, f"client.{user} of bootwright, {secret_uuid}", ceph.key())
        return RbdAccess(monitors=ceph.monitors(), user=user, secret_uuid=secret_uuid)

    @contextlib.contextmanager
    def _scratch_file(self, disk: Disk) -> Iterator[int]:
        """Give an empty file of the disk's size that has no name."""
        what = f"making the content of {disk.path} in"
        with (
            _translated(what, self._scratch),
            reporting_no_space(self._scratch / "a file", disk.virtual_size, what),
            tempfile.TemporaryFile(dir=self._scratch, buffering=0) as file,
        ):
            file.truncate(disk.virtual_size)
            yield file.fileno()


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[int]:
    with _translated(what, path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def _translated(what: str, path: Path) -> Iterator[None]:
    """Turn what the file system says about `path` into an error for the job."""
    try:
        yield
    except OSError as e:
        raise BackendError(
            f"{what} {path}: {e.strerror or e}", "look at the file system and the kernel's log"
        ) from e
