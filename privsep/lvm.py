"""What the helper does to logical volumes: it makes, fills, grows, wipes and removes the agent's.

The volume group and the thin pool come from the helper's own configuration,
names are checked, and all that is made here bears a tag. A volume without the
tag is somebody else's, whatever its name is, and stays as it is. No file is
read here: what a volume shall hold comes with the call.

A volume's name says what state it is in, and so what may be done with it:

    <instance uuid>_<disk>    whole, perhaps in use by a guest; nothing writes to it here
    base_<sha1>               the base of that name, in the thin pool; read-only
    <either>+new              being made: can be filled, and is given its name when it is whole
    <either>+old              going: can be wiped and removed

With a key, a volume is used through a mapping of dm-crypt, `<volume>-dmcrypt`.

Raised, beside what each function says:

    TypeError, ValueError     an argument is not what it has to be
    FileNotFoundError         there is no such volume
    PermissionError           it is not ours, or not in a state for that
    RuntimeError              a tool failed; says how
    OSError                   the device's own error
    ConnectionError, oslo_privsep.comm.PrivsepTimeout    no helper, no answer
"""

import contextlib
import errno
import fcntl
import json
import operator
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from typing import Any, Final

from oslo_config import cfg

from privsep import volumes
from privsep.lvm_tools import lvm, run

TAG: Final = "bootwright"

NEW: Final = "+new"
OLD: Final = "+old"

STEP: Final = 1 << 20
"""Bytes one `write` takes at most; more at a time comes through the channel more slowly."""

_UUID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_DISK: Final = re.compile(rf"{_UUID}_[a-z][a-z0-9._]{{0,31}}")
_BASE: Final = re.compile(r"base_[0-9a-f]{40}")
_SECTOR: Final = 512
_BLKZEROOUT: Final = 0x127F  # linux/fs.h
_METADATA_FULL: Final = 95.0
"""Percent. A pool that runs out of metadata takes no data either, and has to be repaired."""
_CRYPTSETUP_GONE: Final = 4

# A grown volume is not whole until what it has gained reads as zeros. Where that
# begins is written on it before it grows, so that no crash can make it be forgotten.
_GREW: Final = f"{TAG}.grew_from."

_FIELDS: Final = (
    "vg_extent_size,vg_free,lv_name,lv_size,lv_tags,lv_attr,pool_lv,data_percent,metadata_percent"
)

Row = tuple[str, int, int | None, bool, bool]
"""Name, size, from which byte on a growth has to be finished, thin, in use."""


class _Known:
    """The volumes that are ours, as LVM has last told it or we have done it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}

    def replace(self, rows: list[Row]) -> None:
        with self._lock:
            self._rows = {row[0]: row for row in rows}

    def put(self, row: Row) -> None:
        with self._lock:
            self._rows[row[0]] = row

    def rename(self, name: str, other: str) -> None:
        with self._lock:
            self._rows[other] = (other, *self._rows.pop(name)[1:])

    def forget(self, name: str) -> None:
        with self._lock:
            self._rows.pop(name, None)

    def get(self, name: str) -> Row:
        with self._lock:
            row = self._rows.get(name)
        if row is None:
            # Perhaps only this process is new.
            self.replace(_look()[3])
            with self._lock:
                row = self._rows.get(name)
        if row is None:
            if os.path.lexists(_device(name)):
                raise PermissionError(f"the volume {_full(name)} has no tag {TAG}: it is not ours")
            raise FileNotFoundError(f"there is no volume {_full(name)}")
        return row


_known = _Known()


@volumes.entrypoint
def survey() -> tuple[int, int, int, tuple[Row, ...], tuple[str, ...]]:
    """Return how the volume group stands.

    Bytes of an extent; bytes free in the group, or in the thin pool if there is
    one; 1 if the pool zeroes its blocks (or there is none), else 0; our volumes;
    the names of others'.
    """
    extent, free, zeroing, rows, others = _look()
    _known.replace(rows)
    return extent, free, zeroing, tuple(rows), tuple(others)


@volumes.entrypoint
def create(name: str, size: int) -> None:
    """Make an empty volume `<name>+new` of `size` bytes or a little more.

    A thin one if there is a pool, which then reads as zeros. Any other has
    what its blocks had before, until they are written or `blank`ed.

    Raises:
        RuntimeError: among others, if the name is taken or there is no space.
    """
    _check_name(name)
    _check_size(size)
    words = ["--yes", "--addtag", TAG, "--name", name + NEW]
    pool = cfg.CONF.libvirt.images_thin_pool
    if pool is None:
        # What is on the blocks is overwritten in any case, and not looked at before.
        lvm("lvcreate", *words, "--wipesignatures=n", "--zero=n", f"--size={size}b", _group())
    else:
        words += ["--setactivationskip=n", f"--virtualsize={size}b"]
        lvm("lvcreate", *words, "--thinpool", pool, _group())
    _known.put((name + NEW, size, None, pool is not None, False))


@volumes.entrypoint
def snapshot(name: str, base: str, size: int) -> None:
    """Make `<name>+new`, a writable snapshot of volume `base`, `size` bytes large."""
    _check_name(name, _DISK)
    _check_name(base, _BASE)
    _check_size(size)
    _, base_size, *_ = _known.get(base)
    lvm(
        *("lvcreate", "--yes", "--snapshot", "--setactivationskip=n", "--permission=rw"),
        *("--addtag", TAG, "--name", name + NEW, f"{_group()}/{base}"),
    )
    _known.put((name + NEW, size, None, True, False))
    if size > base_size:
        lvm("lvextend", f"--size={size}b", _full(name + NEW))


@volumes.entrypoint
def write(name: str, offset: int, data: bytes, encrypted: bool) -> None:
    """Put whole sectors, `STEP` bytes at most, at `offset` of `<name>+new`.

    Raises:
        OSError: ENOSPC among others, if they are beyond the end.
    """
    _check_name(name)
    if len(data) > STEP:
        raise ValueError(f"{len(data)} bytes at once are too many")
    _check_range(offset, len(data))
    with _opened(name + NEW, encrypted) as fd:
        _put(fd, data, offset)


@volumes.entrypoint
def blank(name: str, offset: int, length: int, noise: bool, encrypted: bool) -> None:
    """Overwrite `length` bytes at `offset` of a volume with zeros, or with `noise`.

    `name` is that of one being made or going, with its `+new` or `+old`, or of
    a grown one, of which only what it has gained can be overwritten.
    """
    stem, state = _split(name)
    _check_name(stem)
    _check_range(offset, length)
    if not state:
        grew_from = _known.get(name)[2]
        if noise or grew_from is None or offset < grew_from:
            raise PermissionError(f"{_full(name)} is whole and is not overwritten")
    with _opened(name, encrypted) as fd:
        if noise:
            for place in range(offset, offset + length, STEP):
                _put(fd, os.urandom(min(STEP, offset + length - place)), place)
        elif length:
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))


@volumes.entrypoint
def finish(name: str) -> None:
    """Give `<name>+new` its name, now that it is whole and on disk. A base becomes read-only.

    Raises:
        RuntimeError: among others, if the name is taken.
    """
    _check_name(name)
    with _opened(name + NEW, False) as fd:
        os.fsync(fd)
    if _BASE.fullmatch(name):
        lvm("lvchange", "--permission=r", _full(name + NEW))
    lvm("lvrename", _group(), name + NEW, name)
    _known.rename(name + NEW, name)


@volumes.entrypoint
def grow(name: str, size: int, encrypted: bool) -> None:
    """Make a volume larger. What it has gained has to be `blank`ed, then `settle`d."""
    _check_name(name, _DISK)
    _check_size(size)
    _, before, grew_from, thin, used = _known.get(name)
    if size < before:
        raise ValueError(f"{_full(name)} has {before} bytes and would shrink to {size}")
    if grew_from is None:
        grew_from = before
        # Thin volumes have nothing of anybody's in what they gain, encrypted ones noise.
        if not thin or encrypted:
            lvm("lvchange", "--addtag", f"{_GREW}{before}", _full(name))
        else:
            grew_from = None
    if size > before:
        lvm("lvextend", f"--size={size}b", _full(name))
    if encrypted:
        run("cryptsetup", "resize", _mapping_name(name))
    _known.put((name, size, grew_from, thin, used))


@volumes.entrypoint
def settle(name: str) -> None:
    """Note that what a volume has gained has been blanked."""
    _check_name(name, _DISK)
    _, size, grew_from, thin, used = _known.get(name)
    if grew_from is not None:
        lvm("lvchange", "--deltag", f"{_GREW}{grew_from}", _full(name))
        _known.put((name, size, None, thin, used))


@volumes.entrypoint
def retire(name: str) -> None:
    """Take a volume's name from it: it becomes `<name>+old` and can only go.

    Raises:
        PermissionError: among others, if it is in use.
    """
    _check_name(name)
    if _known.get(name)[4]:
        raise PermissionError(f"the volume {_full(name)} is in use")
    lvm("lvrename", _group(), name, name + OLD)
    _known.rename(name, name + OLD)


@volumes.entrypoint
def remove(name: str) -> None:
    """Remove a volume by its name with `+new` or `+old`; one in use stays."""
    stem, state = _split(name)
    _check_name(stem)
    if not state:
        raise PermissionError(f"{_full(name)} is whole: it has to be retired first")
    _known.get(name)
    lvm("lvremove", "--yes", "--select", f'lv_name="{name}" && lv_tags="{TAG}"', _group())
    _known.forget(name)


@volumes.entrypoint
def unlock(name: str, key: bytes) -> None:
    """Open the mapping through which an encrypted volume is used; done already is fine.

    `name` is that of a whole one, or of one being made with its `+new`.
    """
    stem, state = _split(name)
    _check_name(stem, _DISK)
    bits = cfg.CONF.ephemeral_storage_encryption.key_size
    if len(key) * 8 != bits or state == OLD:
        raise ValueError(f"this takes a key of {bits} bits, for a volume that is not going")
    _known.get(name)
    if os.path.lexists(_mapping(name)):
        return
    run(
        *("cryptsetup", "open", "--type=plain", "--key-file=-", f"--key-size={bits}"),
        f"--keyfile-size={bits // 8}",
        f"--cipher={cfg.CONF.ephemeral_storage_encryption.cipher}",
        *(_device(name), _mapping_name(name)),
        given=key,
    )


@volumes.entrypoint
def lock(name: str) -> None:
    """Close the mapping of a volume; one that is not open is fine, one in use is a RuntimeError."""
    stem, _ = _split(name)
    _check_name(stem, _DISK)
    if not os.path.lexists(_mapping(name)):
        return
    run("cryptsetup", "close", _mapping_name(name), accept=(0, _CRYPTSETUP_GONE))


def _look() -> tuple[int, int, int, list[Row], list[str]]:
    fields = ("--reportformat=json", "--units=b", "--nosuffix", "--options", _FIELDS)
    report = json.loads(lvm("vgs", *fields, _group()))["report"][0]["vg"]
    free, zeroing = int(report[0]["vg_free"]), 1
    rows, others = [], []
    pool = cfg.CONF.libvirt.images_thin_pool
    found = False
    for line in report:
        name, attributes = line["lv_name"], line["lv_attr"]
        if pool is not None and name == pool and attributes[0] == "t":
            found = True
            free = int(int(line["lv_size"]) * (100 - float(line["data_percent"])) / 100)
            if float(line["metadata_percent"]) > _METADATA_FULL:
                free = 0
            zeroing = int(attributes[7] == "z")
        tags = line["lv_tags"].split(",")
        if TAG in tags:
            rows.append(_row(line, tags))
        elif name:
            others.append(name)
    if pool is not None and not found:
        raise RuntimeError(f"there is no thin pool {pool} in the volume group {_group()}")
    return int(report[0]["vg_extent_size"]), free, zeroing, rows, others


def _row(line: dict[str, Any], tags: list[str]) -> Row:
    grew = [int(tag.removeprefix(_GREW)) for tag in tags if tag.startswith(_GREW)]
    return (
        line["lv_name"],
        int(line["lv_size"]),
        min(grew, default=None),
        bool(line["pool_lv"]),
        line["lv_attr"][5] == "o",
    )


def _check_name(name: str, *kinds: re.Pattern[str]) -> None:
    if not any(kind.fullmatch(name) for kind in kinds or (_DISK, _BASE)):
        raise ValueError(f"not the name of a volume of ours: {name!r}")


def _split(name: str) -> tuple[str, str]:
    """Return what stands before the state in a volume's name, and the state."""
    for state in (NEW, OLD):
        if name.endswith(state):
            return name.removesuffix(state), state
    return name, ""


def _check_size(size: int) -> None:
    if operator.index(size) <= 0 or size % _SECTOR:
        raise ValueError(f"not the size of a volume: {size!r}")


def _check_range(offset: int, length: int) -> None:
    if min(operator.index(offset), operator.index(length)) < 0 or (offset | length) % _SECTOR:
        raise ValueError(f"not whole sectors: {length} bytes at {offset}")


@contextlib.contextmanager
def _opened(name: str, encrypted: bool) -> Iterator[int]:
    """Open a volume of ours, or its mapping, for writing; nobody else may hold it meanwhile."""
    _known.get(name)
    # The names are checked, and the directories belong to root and udev.
    path = _mapping(name) if encrypted else _device(name)
    fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise PermissionError(errno.EPERM, "not a block device")
        yield fd
    finally:
        os.close(fd)


def _put(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _group() -> str:
    group = cfg.CONF.libvirt.images_volume_group
    if group is None:
        raise PermissionError("no images_volume_group is configured in [libvirt]")
    return str(group)


def _full(name: str) -> str:
    return f"{_group()}/{name}"


def _device(name: str) -> str:
    return f"/dev/{_group()}/{name}"


def _mapping_name(name: str) -> str:
    return f"{name}-dmcrypt"


def _mapping(name: str) -> str:
    return f"/dev/mapper/{_mapping_name(name)}"
