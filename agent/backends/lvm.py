"""Disks as logical volumes: `/dev/<group>/<instance uuid>_<disk>`.

    without a thin pool    a full copy of the base; all else of it is overwritten with zeros,
                           for its blocks have been somebody's
    with one               a snapshot of the base's own volume, `base_<sha1>`, which is made
                           with the first disk that needs it and goes with the base
    encrypted              a full copy in either, through dm-crypt: `/dev/mapper/…-dmcrypt`

The helper does what needs privilege and knows whose a volume is
(`privsep.lvm`); here is which volume is made of what, and when it goes.
"""

import contextlib
import dataclasses
import enum
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent import volumes
from agent.backends import Write, disk_file
from agent.backends.volume_work import VolumeWork
from agent.base import Base
from agent.cancellation import Cancellation
from agent.disk import Disk, DiskType, Home, RbdAccess
from agent.errors import BackendError, InsufficientFreeSpace
from agent.image import Image
from agent.instance_keys import InstanceKeys
from agent.job import ImagesType
from agent.report import Role
from agent.volumes import NEW, OLD, Survey, Volume
from privsep import lvm

LOG = logging.getLogger(__name__)

_ENCRYPTED: Final = "-dmcrypt"
_MAPPINGS: Final = Path("/dev/mapper")
_BASE: Final = "base_"
_UUID_LENGTH: Final = 36
# udev looks into every new volume, and QEMU takes a moment to let go of one.
_IN_USE_LOOKS: Final = 5
_IN_USE_WAIT_S: Final = 0.5


class Clear(enum.StrEnum):
    """What happens to the blocks of a disk that goes; Nova's words."""

    ZERO = "zero"
    SHRED = "shred"
    NONE = "none"


_NOISE_PASSES: Final = {Clear.ZERO: 0, Clear.SHRED: 3, Clear.NONE: 0}


class Lvm:
    """See `Backend`. One per volume group and host."""

    def __init__(
        self,
        group: str,
        *,
        thin: bool,
        bases: Path,
        scratch: Path,
        clear: Clear = Clear.ZERO,
        clear_size: int | None = None,
        keys: InstanceKeys | None = None,
    ) -> None:
        """Nothing is looked at before it is needed.

        Args:
            thin: whether the helper has been given a thin pool.
            bases: the directory of the image cache; a base's volume goes when the base has gone.
            scratch: where a file system is made before it is put on its volume.
            clear: what is done to the blocks of a volume before it is removed. Those of a
                thin pool need nothing: it zeroes them before anybody sees them.
            clear_size: bytes from the beginning of a volume; None for all of it.
            keys: encrypts all disks if given.
        """
        self._devices = Path("/dev", group)
        self._thin = thin
        self._bases = bases
        self._scratch = scratch
        self._clear = clear
        self._clear_size = clear_size
        self._keys = keys
        self._extent: int | None = None
        self._work = VolumeWork()

    def direct(self, _image: Image, _cancellation: Cancellation, /) -> Base | None:
        return None

    def plan(self, home: Home, role: Role, name: str, base: Base | None, virtual_size: int) -> Disk:
        disk_file.path_of(home, name)  # for what it says of the name
        if base is not None:
            disk_file.check_holds(virtual_size, base)
            disk_file.check_raw(base, "a logical volume")
        volume = f"{home.uuid}_{name.replace('_', '__')}"
        return Disk(
            role=role,
            backend=ImagesType.LVM,
            type=DiskType.BLOCK,
            path=self._devices / volume
            if self._keys is None
            else _MAPPINGS / f"{volume}{_ENCRYPTED}",
            format="raw",
            virtual_size=self._rounded(virtual_size),
            base_name=None if base is None else base.name,
            native_io=not self._thin,
        )

    def prepare(self, disk: Disk, base: Base, cancellation: Cancellation) -> None:
        cancellation.check()
        with (
            self._reporting(f"copying base {base.name} to", disk),
            # Before the survey: what that has seen shall not be evicted afterwards.
            self._work.on(f"{_BASE}{base.name}"),
            self._making(disk, cancellation) as found,
        ):
            if found is None:
                return
            if self._thin and not _is_encrypted(disk):
                self._snapshot(disk, base, found, cancellation)
            else:
                with _opened(base.path) as source:
                    self._copy(disk, source, found, cancellation)

    def generate(self, disk: Disk, write: Write, cancellation: Cancellation) -> None:
        cancellation.check()
        with self._reporting("creating", disk), self._making(disk, cancellation) as found:
            if found is None:
                return
            with tempfile.TemporaryFile(dir=self._scratch, buffering=0) as file:
                os.ftruncate(file.fileno(), disk.virtual_size)
                write(file.fileno())
                self._copy(disk, file.fileno(), found, cancellation)

    def grow(self, disk: Disk, virtual_size: int) -> Disk:
        disk_file.check_grows(disk, virtual_size)
        name = _volume_of(disk)
        with (
            self._reporting("growing", disk),
            self._work.on(name),
        ):
            volume = volumes.survey().volumes.get(name)
            if volume is None:
                raise BackendError(f"growing {disk.path}: there is no such volume of ours")
            found = dataclasses.replace(disk, virtual_size=volume.size)
            disk_file.check_grows(found, virtual_size)
            size = self._rounded(virtual_size)
            if size > volume.size or volume.grew_from is not None:
                self._grow(disk, volume, size)
        return dataclasses.replace(disk, virtual_size=size)

    def remove(self, disk: Disk, home: Home, cancellation: Cancellation, /) -> None:
        name = _volume_of(disk)
        if not name.startswith(f"{home.uuid}_") or disk.path.parent not in (
            self._devices,
            _MAPPINGS,
        ):
            raise BackendError(f"{disk.path} is not of instance {home.uuid} and was not removed")
        with self._reporting("removing", disk), self._work.on(name):
            if _is_encrypted(disk):
                lvm.lock(name)
            found = _unused(name, cancellation)
            if name in found.others:
                LOG.warning("%s is left alone: the agent has not made it", disk.path)
            self._retire(name, found)
            self._clear_away(name, found, cancellation)
            if self._keys is not None and not _has_disks(home.uuid, found, but=name):
                self._keys.remove(home.uuid)

    def access(self) -> RbdAccess | None:
        return None

    def open(self, disk: Disk) -> None:
        """Let a domain use a disk again after the host has started: open its mapping.

        Raises:
            BackendError: it cannot be opened, or has no key.
        """
        if _is_encrypted(disk):
            with self._reporting("opening", disk):
                self._unlock(disk)

    def tidy(self, cancellation: Cancellation) -> None:
        """Remove what a crash left, and the volumes of bases that have gone.

        What is being worked on stays. A volume that was about to go is wiped
        first, which takes its time.

        Raises:
            BackendError, InsufficientFreeSpace: something could not be removed.
            BootwrightError: the reason of the cancellation.
        """
        with volumes.reporting("tidying up the volume group"):
            found = volumes.survey()
            for name in sorted({_stem(name) for name in found.volumes}):
                if self._is_whole(name, found):
                    continue
                cancellation.check()
                with self._work.alone(name) as alone:
                    if alone:
                        self._tidy(name, volumes.survey(), cancellation)

    def _tidy(self, name: str, found: Survey, cancellation: Cancellation) -> None:
        if self._base_is_gone(name):
            self._retire(name, found)
        if self._clear_away(name, found, cancellation):
            LOG.info("removed what nobody needs of the volume %s", name)

    def _is_whole(self, name: str, found: Survey) -> bool:
        """Whether there is the volume, which is needed, and nothing else."""
        states = {name + NEW, name + OLD}
        return states.isdisjoint(found.volumes) and not self._base_is_gone(name)

    def _base_is_gone(self, name: str) -> bool:
        base = name.removeprefix(_BASE)
        return base != name and not (self._bases / base).exists()

    # Making one

    @contextlib.contextmanager
    def _making(self, disk: Disk, cancellation: Cancellation) -> Iterator[Survey | None]:
        """Give the survey by which the disk's `+new` is to be made; None if the disk is there.

        At the end, however it comes, no `+new` is left.
        """
        name = _volume_of(disk)
        with self._work.on(name):
            found = volumes.survey()
            if name in found.others:
                raise BackendError(
                    f"{disk.path} is in the way: the volume has no tag {lvm.TAG}, so the agent has "
                    "not made it",
                    "look what put it there and remove it by hand",
                )
            if (volume := found.volumes.get(name)) is not None:
                if _is_encrypted(disk):
                    self._unlock(disk)
                if volume.grew_from is not None:
                    self._grow(disk, volume, volume.size)
                yield None
                return
            if self._clear_away(name, found, cancellation):
                found = volumes.survey()  # what has gone makes room
            try:
                yield found
            except BaseException:
                with contextlib.suppress(Exception):  # the first one counts; `tidy` does the rest
                    if _is_encrypted(disk):
                        lvm.lock(name + NEW)
                    lvm.remove(name + NEW)
                raise

    def _copy(self, disk: Disk, source: int, found: Survey, cancellation: Cancellation) -> None:
        """Make the disk a copy of file `source`."""
        name = _volume_of(disk)
        encrypted = _is_encrypted(disk)
        # Encrypted, zeros are written like everything else.
        sparse = self._thin and not encrypted
        needed = os.fstat(source).st_blocks * 512 if sparse else disk.virtual_size
        self._require_space(found, min(needed, disk.virtual_size), disk.path)
        lvm.create(name, disk.virtual_size)
        if encrypted:
            lvm.unlock(name + NEW, self._key(disk, make=True))
        volumes.fill(
            name,
            source,
            disk.virtual_size,
            zeroed=sparse,
            encrypted=encrypted,
            cancellation=cancellation,
        )
        if encrypted:
            lvm.lock(name + NEW)
        lvm.finish(name)
        if encrypted:
            self._unlock(disk)

    def _snapshot(self, disk: Disk, base: Base, found: Survey, cancellation: Cancellation) -> None:
        """Make the disk a snapshot of the base's volume, which is made if it is not there."""
        name = _volume_of(disk)
        origin = f"{_BASE}{base.name}"
        if origin not in found.volumes:
            with self._work.making(origin, cancellation), _opened(base.path) as source:
                found = volumes.survey()
                if origin not in found.volumes:
                    if self._clear_away(origin, found, cancellation):
                        found = volumes.survey()
                    self._make_base(origin, base, source, found, cancellation)
        self._require_space(found, 0, disk.path)
        cancellation.check()
        lvm.snapshot(name, origin, disk.virtual_size)
        lvm.finish(name)

    def _make_base(
        self, origin: str, base: Base, source: int, found: Survey, cancellation: Cancellation
    ) -> None:
        needed = os.fstat(source).st_blocks * 512
        if needed > found.free:
            # Others can be made again; a job that fails cannot.
            self._evict(found, keep=origin)
            found = volumes.survey()
        self._require_space(found, needed, base.path)
        size = self._rounded(base.virtual_size)
        try:
            lvm.create(origin, size)
            volumes.fill(
                origin, source, size, zeroed=True, encrypted=False, cancellation=cancellation
            )
            lvm.finish(origin)
        except BaseException:
            with contextlib.suppress(Exception):  # the first one counts; `tidy` does the rest
                lvm.remove(origin + NEW)
            raise
        LOG.info("made volume %s of base %s for snapshots", origin, base.name)

    def _evict(self, found: Survey, *, keep: str) -> None:
        """Remove the volumes of bases; the snapshots made of them live on."""
        for name in sorted({_stem(name) for name in found.volumes} - {keep}):
            if name.startswith(_BASE):
                with self._work.alone(name) as alone:
                    if alone:
                        self._retire(name, found)
                        self._clear_away(name, found, Cancellation())

    def _require_space(self, found: Survey, needed: int, what: Path) -> None:
        if self._thin and not found.zeroing:
            raise BackendError(
                "the thin pool does not zero its blocks, so disks would show what others have "
                "written",
                "lvchange --zero y on the pool in images_thin_pool",
            )
        if needed > found.free:
            place = "thin pool" if self._thin else "volume group"
            raise InsufficientFreeSpace(
                f"{what} takes {needed} bytes and the {place} has {found.free} bytes free",
                f"free space in the {place}, or make it larger (vgextend, lvextend)",
            )

    def _grow(self, disk: Disk, volume: Volume, size: int) -> None:
        """Make the volume larger, or finish what a crash has interrupted in that."""
        name = _volume_of(disk)
        encrypted = _is_encrypted(disk)
        if encrypted:
            self._unlock(disk)
        lvm.grow(name, size, encrypted)
        if volume.thin and not encrypted:
            return
        begin = volume.size if volume.grew_from is None else volume.grew_from
        volumes.blank(name, begin, size, encrypted=encrypted, cancellation=Cancellation())
        lvm.settle(name)

    # Its end

    def _retire(self, name: str, found: Survey) -> None:
        if (volume := found.volumes.pop(name, None)) is not None:
            lvm.retire(name)
            found.volumes[name + OLD] = volume

    def _clear_away(self, name: str, found: Survey, cancellation: Cancellation) -> bool:
        """Remove what is half made of a volume, and what is half gone, wiped; tell if it was."""
        if name + NEW in found.volumes:
            if not name.startswith(_BASE):
                lvm.lock(name + NEW)
            lvm.remove(name + NEW)
        if name + OLD in found.volumes:
            self._wipe(name + OLD, found.volumes[name + OLD], cancellation)
            lvm.remove(name + OLD)
        return name + NEW in found.volumes or name + OLD in found.volumes

    def _wipe(self, name: str, volume: Volume, cancellation: Cancellation) -> None:
        if volume.thin or self._clear is Clear.NONE:
            return
        end = volume.size if self._clear_size is None else min(self._clear_size, volume.size)
        for noise in (*[True] * _NOISE_PASSES[self._clear], False):
            volumes.blank(name, 0, end, noise=noise, cancellation=cancellation)

    # Encryption

    def _unlock(self, disk: Disk) -> None:
        lvm.unlock(_volume_of(disk), self._key(disk))

    def _key(self, disk: Disk, *, make: bool = False) -> bytes:
        if self._keys is None:
            raise BackendError(
                f"{disk.path} is encrypted, and no keys are configured",
                "set enabled = true in [ephemeral_storage_encryption] again",
            )
        uuid = _volume_of(disk)[:_UUID_LENGTH]
        return self._keys.make(uuid) if make else self._keys.get(uuid)

    def _rounded(self, virtual_size: int) -> int:
        if self._extent is None:
            self._extent = volumes.survey().extent
        return -(-virtual_size // self._extent) * self._extent

    @contextlib.contextmanager
    def _reporting(self, what: str, disk: Disk) -> Iterator[None]:
        with volumes.reporting(f"{what} {disk.path}"):
            yield


def _stem(name: str) -> str:
    return name.removesuffix(NEW).removesuffix(OLD)


def _volume_of(disk: Disk) -> str:
    return disk.path.name.removesuffix(_ENCRYPTED)


def _is_encrypted(disk: Disk) -> bool:
    return disk.path.parent == _MAPPINGS


def _has_disks(uuid: str, found: Survey, *, but: str) -> bool:
    return any(name.startswith(f"{uuid}_") and _stem(name) != but for name in found.volumes)


def _unused(name: str, cancellation: Cancellation) -> Survey:
    """Return a survey in which nobody uses the volume.

    Raises:
        BackendError: somebody does.
    """
    for look in range(_IN_USE_LOOKS):
        if look:
            cancellation.wait(_IN_USE_WAIT_S)
        found = volumes.survey()
        volume = found.volumes.get(name)
        if volume is None or not volume.in_use:
            return found
    raise BackendError(
        f"the volume {name} is in use and was not removed",
        "find out by whom (lsof, dmsetup ls --tree), and delete the instance again",
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
