"""The qcow2 format, as far as the agent itself reads and writes it.

Reads the header of an image, strictly: a header that breaks a rule of the
specification, or asks for more than QEMU would give, is refused before any
program of QEMU sees it. Writes new, empty disks. Data clusters are not its
business. The specification is QEMU's docs/interop/qcow2.txt.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.files import Together, joining
from agent.write_path import BLOCK, write_all

MAGIC = b"QFI\xfb"
MAX_VIRTUAL_SIZE = 64 << 40
"""Bytes; of the disks made here."""

_HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_DATA_FILE = 0x44415441

_CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in (1, 2, 3, 4))
_KNOWN_INCOMPATIBLE = 0x1F

# QEMU's own bounds (block/qcow2.h), so nothing it could open is refused here.
_MAX_L1_BYTES = 32 << 20
_MAX_REFCOUNT_BYTES = 8 << 20
# QEMU takes 65,536; each costs it memory, and an image worth booting has few.
_MAX_SNAPSHOTS = 1024
_SNAPSHOT_ENTRY_MIN = 40

_MAX_BACKING_NAME = 1023
_SHOWN = 200  # bytes of a name in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A header that passed `parse_header`; offsets and sizes are bytes."""

    version: int
    cluster_bits: int
    virtual_size: int
    l1_entries: int
    l1_offset: int
    extended_l2: bool
    compression: str
    """zlib or zstd."""


def parse_header(data: bytes, file_size: int | None = None) -> Header:
    """Return the header that stands at the start of an image.

    Args:
        data: the first bytes of the file; 64 KiB are always enough.
        file_size: bytes, where it is known; then tables must end within.

    Raises:
        ValueError: the rule that is broken, with the byte it is broken at.
    """
    if data[:4] != MAGIC:
        raise ValueError("there is no qcow2 magic (51 46 49 fb) at byte 0")
    if len(data) < _HEADER_V2.size:
        raise ValueError(f"the qcow2 header is cut short after {len(data)} of 72 bytes")
    (
        _, version, backing_offset, backing_size, cluster_bits, virtual_size, encryption,
        l1_entries, l1_offset, refcount_offset, refcount_clusters, snapshots, snapshots_offset,
    ) = _HEADER_V2.unpack_from(data)  # fmt: skip
    if backing_offset:
        raise ValueError(
            f"the qcow2 header names a backing file (offset {backing_offset:#x} at byte 8)"
            f"{_named(data[backing_offset:][:backing_size])}; an image must be self-contained"
        )
    for what, value, least, most in (
        ("version (byte 4)", version, 2, 3),
        ("cluster_bits (byte 20)", cluster_bits, 9, 21),
        ("encryption method (byte 32)", encryption, 0, 0),
    ):
        if not least <= value <= most:
            raise ValueError(f"the qcow2 {what} is {value}, not {least} to {most}")
    if virtual_size == 0 or virtual_size % 512:
        raise ValueError(
            f"the qcow2 virtual size is {virtual_size} (byte 24), not a multiple of 512 above 0"
        )
    cluster = 1 << cluster_bits
    incompatible, compression, header_length = (
        _parse_v3(data, cluster) if version == 3 else (0, 0, _HEADER_V2.size)
    )
    _check_extensions(data[:cluster], header_length)
    extended_l2 = bool(incompatible & _EXTENDED_L2)
    if extended_l2 and cluster_bits < 14:
        raise ValueError(f"extended L2 entries need cluster_bits of 14, not {cluster_bits}")
    per_l1_entry = cluster * (cluster // (16 if extended_l2 else 8))
    for what, count, least, most in (
        ("L1 entries (byte 36)", l1_entries, -(-virtual_size // per_l1_entry), _MAX_L1_BYTES // 8),
        ("refcount clusters (byte 56)", refcount_clusters, 1, _MAX_REFCOUNT_BYTES // cluster),
        ("snapshots (byte 60)", snapshots, 0, _MAX_SNAPSHOTS),
    ):
        if not least <= count <= most:
            raise ValueError(f"the qcow2 header has {count} {what}, not {least} to {most}")
    _check_tables(
        (
            ("L1", 40, l1_offset, l1_entries * 8),
            ("refcount", 48, refcount_offset, refcount_clusters * cluster),
            ("snapshot", 64, snapshots_offset, snapshots * _SNAPSHOT_ENTRY_MIN),
        ),
        cluster,
        (1 << 63) - 1 if file_size is None else file_size,
    )
    return Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size=virtual_size,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        extended_l2=extended_l2,
        compression=("zlib", "zstd")[compression],
    )


def _parse_v3(data: bytes, cluster: int) -> tuple[int, int, int]:
    """Return the incompatible features, the compression type and the header's length."""
    if len(data) < 104:
        raise ValueError(f"the qcow2 header is cut short after {len(data)} of 104 bytes")
    incompatible, _, _, refcount_order, length = _HEADER_V3.unpack_from(data, 72)
    if incompatible & _DATA_FILE:
        name = b""
        with contextlib.suppress(ValueError):
            name = dict(_extensions(data[:cluster], length)).get(_EXTENSION_DATA_FILE, (0, b""))[1]
        raise ValueError(
            "the qcow2 header asks for an external data file (incompatible feature bit 2 at "
            f"byte 79){_named(name)}; an image must be self-contained"
        )
    if incompatible & _CORRUPT:
        raise ValueError(
            "the qcow2 image is marked corrupt (incompatible feature bit 1 at byte 79)"
        )
    if unknown := incompatible & ~_KNOWN_INCOMPATIBLE:
        raise ValueError(
            f"the qcow2 header has unknown incompatible features {unknown:#x} (bytes 72 to 79)"
        )
    if refcount_order > 6:
        raise ValueError(f"the qcow2 refcount_order is {refcount_order} (byte 96), over 6")
    if not 104 <= length <= min(cluster, len(data)) or length % 8:
        raise ValueError(
            f"the qcow2 header_length is {length} (byte 100), not a multiple of 8 from 104 to "
            f"the end of the first cluster"
        )
    compression = data[104] if length > 104 else 0
    if bool(incompatible & _COMPRESSION) != (compression != 0) or compression > 1:
        raise ValueError(
            f"the qcow2 compression type is {compression} (byte 104), and incompatible feature "
            f"bit 3 is {'set' if incompatible & _COMPRESSION else 'clear'}"
        )
    return incompatible, compression, length


def _check_extensions(data: bytes, position: int) -> None:
    for kind, (at, content) in _extensions(data, position):
        if kind == _EXTENSION_DATA_FILE:
            raise ValueError(
                f"the qcow2 header names an external data file (extension at byte {at})"
                f"{_named(content)}; an image must be self-contained"
            )


def _extensions(data: bytes, position: int) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Yield the kind of each header extension, the byte it is at, and its content.

    `data` ends with the first cluster or what is known of it.

    Raises:
        ValueError: one of them does not end within.
    """
    while position + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, position)
        if kind == _EXTENSION_END:
            return
        begin = position + _EXTENSION.size
        end = begin + -(-length // 8) * 8
        if end > len(data):
            raise ValueError(
                f"the qcow2 header extension {kind:#010x} at byte {position} has {length} bytes "
                f"and runs past byte {len(data)}"
            )
        yield kind, (position, data[begin : begin + length])
        position = end


def _named(name: bytes) -> str:
    """Return what to say of a name that whoever made the image has chosen, none perhaps."""
    if not name:
        return ""
    text = name[:_SHOWN].decode(errors="backslashreplace")
    return f", {text!r}{'…' if len(name) > _SHOWN else ''}"


def _check_tables(
    tables: Iterable[tuple[str, int, int, int]], cluster: int, file_size: int
) -> None:
    """Check each (name, byte of its field, offset, length), and that none lies in another."""
    taken: list[tuple[int, int, str]] = []
    for name, at, offset, length in tables:
        if length and (offset == 0 or offset % cluster):
            raise ValueError(
                f"the qcow2 {name} table is at {offset:#x} (byte {at}), not on a cluster behind "
                "the first"
            )
        if length and offset + length > file_size:
            raise ValueError(
                f"the qcow2 {name} table (byte {at}) ends at {offset + length}, beyond the "
                f"file's {file_size} bytes"
            )
        for begin, end, other in taken:
            if length and offset < end and begin < offset + length:
                raise ValueError(
                    f"the qcow2 {name} table (byte {at}) at {offset:#x} overlaps the {other} table"
                )
        taken.append((offset, offset + length, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a new disk is divided."""

    cluster_size: int = 1 << 16
    """Bytes, a power of two from 4 KiB to 2 MiB: what is taken from the file system at a time."""
    extended_l2: bool = False
    """Whether a 32nd of a cluster is taken and copied at a time; for 16 KiB and more."""

    @property
    def cluster_bits(self) -> int:
        return self.cluster_size.bit_length() - 1

    def l1_entries(self, virtual_size: int) -> int:
        per_table = self.cluster_size // (16 if self.extended_l2 else 8)
        return -(-virtual_size // (self.cluster_size * per_table))


DEFAULT_GEOMETRY = Geometry()


def create_overlay(
    target: Path,
    *,
    virtual_size: int,
    backing_file: Path,
    backing_format: str,
    geometry: Geometry = DEFAULT_GEOMETRY,
    mode: int = 0o640,
    together: Together | None = None,
) -> None:
    """Make an empty disk over `backing_file`, durably; about 1 ms, no process, 12 KiB on disk.

    It is there when `together` is published, if that is given.

    The backing format stands in the header, so QEMU never guesses it. The
    backing file is not opened. A target that exists is replaced.

    Args:
        virtual_size: bytes, exact: a multiple of 512, at most `MAX_VIRTUAL_SIZE`.

    Raises:
        ValueError: the size or the name of the backing file cannot be written
            in a header.
        InsufficientFreeSpace
    """
    name = os.fsencode(backing_file)
    if not backing_file.is_absolute() or len(name) > _MAX_BACKING_NAME:
        raise ValueError(
            f"a backing file needs an absolute path of at most {_MAX_BACKING_NAME} bytes, "
            f"not {backing_file}"
        )
    if not 0 < virtual_size <= MAX_VIRTUAL_SIZE or virtual_size % 512:
        raise ValueError(
            f"a virtual size is a multiple of 512 up to {MAX_VIRTUAL_SIZE}, not {virtual_size}"
        )
    # Cluster 0 holds the header, 1 the refcount table, 2 its only block (good for as
    # many clusters as it has half bytes), and the L1 table follows: zeros, so a hole.
    cluster = geometry.cluster_size
    l1_entries = geometry.l1_entries(virtual_size)
    clusters = 3 + -(-l1_entries * 8 // cluster)
    if l1_entries * 8 > _MAX_L1_BYTES or clusters > cluster // 2 or len(name) > cluster // 4:
        raise ValueError(
            f"a disk of {virtual_size} bytes needs larger clusters than {cluster} bytes"
        )
    text = backing_format.encode("ascii")
    extensions = b"".join((
        _EXTENSION.pack(_EXTENSION_BACKING_FORMAT, len(text)), text, bytes(-len(text) % 8),
        _EXTENSION.pack(_EXTENSION_END, 0),
    ))  # fmt: skip
    length = 112
    header = b"".join((
        _HEADER_V2.pack(
            MAGIC, 3, length + len(extensions), len(name), geometry.cluster_bits, virtual_size, 0,
            l1_entries, 3 * cluster, 1 * cluster, 1, 0, 0,
        ),
        _HEADER_V3.pack(_EXTENDED_L2 if geometry.extended_l2 else 0, 0, 0, 4, length),
        bytes(8),  # compression type zlib, and padding
        extensions,
        name,
    ))  # fmt: skip
    with (
        joining(together) as files,
        files.file(target, needed=3 * BLOCK, what="creating the qcow2 disk", mode=mode) as fd,
    ):
        os.ftruncate(fd, clusters * cluster)
        write_all(fd, memoryview(header), 0)
        write_all(fd, memoryview(struct.pack(">Q", 2 * cluster)), cluster)
        write_all(fd, memoryview(struct.pack(">H", 1) * clusters), 2 * cluster)
