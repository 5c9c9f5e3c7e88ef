"""The agent's directories, and what their file systems can do."""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent import claims, files
from agent.checks import error, ok, warning
from agent.disk import DiskType
from agent.instances import Instances
from agent.job import ImagesType
from agent.settings import ImageSourceName, Settings
from agent.views import Finding
from agent.write_path import BLOCK

_MOUNTS: Final = Path("/proc/self/mountinfo")

_REMOTE: Final = {"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "glusterfs"}
"""Where SQLite's shared memory is not shared, or locks are not the kernel's own."""

MADE_BY_UNIT: Final = (Path("/var/lib/bootwright"), Path("/run/bootwright"))
"""StateDirectory= and RuntimeDirectory= of the unit that is shipped."""

_NO_ROOM: Final = 64 << 20
"""Bytes; a journal and its WAL want less, and no image worth the name fits."""

_DIRECT: Final = ("none", "directsync")
"""The cache modes for which QEMU opens a file with O_DIRECT."""


def directories(settings: Settings) -> Iterator[Finding]:
    """Whether the agent can write where it has to, and others cannot look."""
    places = {
        "instances_path": settings.instances_path,
        "state_path": settings.state_path,
        "socket": settings.api.socket.parent,
    }
    if settings.instances_path.exists():
        places["image cache"] = settings.image_cache.directory
    if settings.images.source is ImageSourceName.DIRECTORY:
        places["images"] = settings.images.directory
    for name, path in places.items():
        yield _directory(name, path)
    closed = [
        parent
        for parent in (settings.instances_path, *settings.instances_path.parents)
        if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH
    ]
    if closed:
        yield error(
            "way to the disks",
            f"{closed[0]} is closed to others, so qemu cannot reach the disks below it",
            f"chmod o+x {closed[0]}",
        )


def _directory(name: str, path: Path) -> Finding:
    if path.is_symlink():
        return error(
            name,
            f"{path} is a symbolic link, which the privileged helper does not follow",
            "name the directory itself, or mount it there",
        )
    if not path.exists():
        return _directory_to_be(name, path)
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return error(name, f"{path} is no directory", "move it away")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return error(
            name,
            f"{path} (mode {stat.S_IMODE(status.st_mode):o}, uid {status.st_uid}) is not writable "
            f"for uid {os.geteuid()}",
            f"chown bootwright: {path}",
        )
    if status.st_mode & stat.S_IWOTH:
        return error(
            name, f"everybody may write to {path}, and put anything there", f"chmod o-w {path}"
        )
    return ok(name, str(path))


def _directory_to_be(name: str, path: Path) -> Finding:
    parent = next(parent for parent in path.parents if parent.exists())
    if os.access(parent, os.W_OK | os.X_OK):
        return ok(name, f"{path} is not there yet, and can be made")
    message = f"{path} is not there, and uid {os.geteuid()} cannot make it in {parent}"
    if any(path.is_relative_to(made) for made in MADE_BY_UNIT):
        return warning(name, message, "the unit makes it: systemctl start bootwright")
    return error(name, message, f"install -d -o bootwright -g bootwright -m 711 {path}")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.is_dir())


def space(settings: Settings) -> Iterator[Finding]:
    """How full the file systems are."""
    cache = settings.image_cache
    places = {"cache space": cache.directory, "state space": settings.state_path}
    for name, path in places.items():
        status = os.statvfs(_existing(path))
        free = status.f_bavail * status.f_frsize
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        percent = 100 * used / max(1, used + free)
        says = f"{free >> 20} MiB free of {path}, {percent:.0f} % used"
        if free < _NO_ROOM or (status.f_files and status.f_favail == 0):
            inodes = "" if not status.f_files else f", {status.f_favail} inodes left"
            yield error(name, says + inodes, "free space there; see 'bootwright cache gc'")
        elif path == cache.directory and free < cache.reserved_free_space:
            yield error(
                name,
                f"{says}, and reserved_free_space keeps {cache.reserved_free_space >> 20} MiB",
                "images that are not here yet are refused: free space, or reserve less",
            )
        elif path == cache.directory and percent > cache.high_watermark:
            yield warning(
                name,
                f"{says}, more than high_watermark ({cache.high_watermark} %)",
                "bases that nobody needs are removed down to low_watermark; if that does not help, "
                "'bootwright cache gc --dry-run' tells what keeps each",
            )
        else:
            yield ok(name, says)


def features(settings: Settings) -> Iterator[Finding]:
    """What the file system of the disks can do, tried on files without a name."""
    place = _existing(settings.instances_path)
    name = "file system"
    if not os.access(place, os.W_OK | os.X_OK):
        yield warning(name, f"{place} cannot be written to, so nothing was tried", "see above")
        return
    kind = file_system_of(place)
    can = {"O_DIRECT": files.supports_direct(place), "holes": _has_holes(place)}
    can["reflinks"] = _has_reflinks(place)
    yield ok(name, f"{kind}: " + ", ".join(f"{'' if yes else 'no '}{w}" for w, yes in can.items()))
    # Where none is configured the agent takes what the file system can do.
    mode = settings.libvirt.cache_modes.get(DiskType.FILE)
    if not can["O_DIRECT"] and mode in _DIRECT:
        yield error(
            name,
            f"disk_cachemodes has file={mode}, for which {kind} at {place} lacks O_DIRECT",
            "take it out of disk_cachemodes in [libvirt]: the agent then chooses by itself",
        )
    if not can["holes"]:
        yield warning(
            name,
            f"{kind} at {place} has no holes: every disk takes its full size at once",
            "use ext4, xfs or btrfs",
        )
    if not can["reflinks"] and settings.libvirt.images_type is ImagesType.RAW:
        yield warning(
            name,
            f"images_type is raw, and {kind} at {place} cannot share extents: every root disk "
            "is a full copy",
            "use xfs or btrfs, or images_type = qcow2",
        )
    state = _existing(settings.state_path)
    if (kind := file_system_of(state)) in _REMOTE:
        yield error(
            "state_path",
            f"{state} is on {kind}: the journal is safe on a local file system only",
            "set state_path in [DEFAULT]",
        )


def file_system_of(path: Path) -> str:
    """Return the kind of the file system of a path: ext4, nfs4 …"""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kind = "unknown"
    for line in _MOUNTS.read_text().splitlines():
        # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            kind = after.split()[0]
    return kind


def _has_holes(place: Path) -> bool:
    with tempfile.TemporaryFile(dir=place) as file:
        file.truncate(16 << 20)
        return os.fstat(file.fileno()).st_blocks * 512 < 16 << 20


def _has_reflinks(place: Path) -> bool:
    with tempfile.TemporaryFile(dir=place) as one, tempfile.TemporaryFile(dir=place) as other:
        one.write(bytes(BLOCK))
        one.flush()
        return files.clone(one.fileno(), other.fileno())


def records(settings: Settings) -> Iterator[Finding]:
    """Whether it is known which bases are needed; if not, none is ever removed."""
    name = "instances"
    if not os.access(settings.instances_path, os.R_OK | os.X_OK):
        return
    instances = Instances(settings.instances_path)
    for path in instances.unreadable:
        yield error(
            name,
            f"{path} cannot be read, so nothing is removed from the image cache",
            "restore it from a backup, or remove it if the instance is gone, and restart the agent",
        )
    for record in instances.all():
        links = {link.path for disk in record.disks for link in disk.backing_chain}
        for path in sorted(links):
            if not path.exists():
                yield error(
                    name,
                    f"{path}, on which instance {record.name} stands, is not there",
                    f"bootwright image fetch {record.image_id}, which puts the same bytes there; "
                    "or mount what is not mounted",
                )
    yield ok(name, f"{len(instances.all())} with a record that can be read")


def hosts(settings: Settings) -> Iterator[Finding]:
    """The hosts that share the image cache."""
    name, cache = "hosts", settings.image_cache
    directory = cache.directory / ".hosts"
    if not os.access(directory, os.R_OK | os.X_OK):
        return
    names = []
    for path, claim in claims.all_of(directory):
        if claim is None:
            yield error(
                name,
                f"{path} cannot be read, so nothing is removed from the image cache",
                f"start the agent of host {path.stem}, or remove the file if it is gone for ever",
            )
        elif path.stem == cache.host_id and claim.hostname != socket.gethostname():
            yield warning(
                name,
                f"host_id {cache.host_id} was used by {claim.hostname}, and this is "
                f"{socket.gethostname()}",
                "if both exist they need a host_id each, see [image_cache]; was it renamed, the "
                "agent puts it right",
            )
        else:
            names.append(claim.hostname)
    yield ok(name, f"the image cache is used by {', '.join(sorted(names)) or 'nobody yet'}")
