"""Where an image that is not raw keeps its tables and blocks.

Reads the headers from a file that is whole, for those who follow the tables:
`disk_start` to the first blocks, `disk_bounds` to all of them. What it finds is
what QEMU's own drivers would go by (block/vmdk.c, vpc.c, vhdx.c, vdi.c).
Nothing is believed: what leads out of the file is an error. Of qcow2 there is
only where the header is; the rest has modules of its own.
"""

import contextlib
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from agent import disk_headers, qcow2

SECTOR: Final = 512
_PIECE: Final = 256 << 10  # bytes of a table to be had at a time

_QCOW2_HEADER: Final = 64 << 10  # bytes; the longest there is, with extensions

_VMDK_OVERHEAD_AT, _VMDK_COMPRESSION_AT = 64, 77
_VMDK_DEFLATE: Final = 1
_VMDK_ZERO_GRAIN: Final = 1
_VMDK_BACKUP, _VMDK_ZERO_GRAINS, _VMDK_MARKERS = 1 << 1, 1 << 2, 1 << 17
_VMDK_MARKER: Final = struct.Struct("<QI")  # sector in the disk, bytes of compressed data
# QEMU's bound, 128 MiB of memory.
_VMDK_MAX_TABLES: Final = 32 << 20

_VHD_DYNAMIC_HEADER: Final = struct.Struct(">8sQQIII")
_VHD_MAX_BLOCK: Final = 256 << 20

_VHDX_REGIONS_AT: Final = 192 << 10
_VHDX_REGION: Final = struct.Struct("<16sQII")
_VHDX_BAT: Final = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
_VHDX_METADATA: Final = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_MAX_REGIONS: Final = 2047
_VHDX_HEADERS_AT: Final = (64 << 10, 128 << 10)
_VHDX_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_VHDX_HEADER_LENGTH: Final = 4096  # bytes, as far as its checksum goes


class ImageFile:
    """An image, for reading at any place."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Raises: OSError: it cannot be opened, or is a link."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield cls(fd)
        finally:
            os.close(fd)

    def require(self, offset: int, length: int, what: str) -> None:
        """Check that so many bytes are there.

        Raises:
            ValueError: the file ends before they do.
        """
        if offset + length > self.size:
            raise ValueError(
                f"{what} is at {offset:#x} to {offset + length:#x}, beyond the file's "
                f"{self.size} bytes"
            )

    def table(self, offset: int, length: int, what: str) -> bytes:
        """Return all the bytes asked for.

        Raises:
            ValueError: the file ends before they do.
        """
        self.require(offset, length, what)
        return os.pread(self._fd, length, offset)

    def data(self, offset: int, length: int, what: str) -> bytes:
        """As `table`, but the file may end within; QEMU sees zeros there."""
        if offset >= self.size:
            return self.table(offset, length, what)
        return os.pread(self._fd, length, offset)

    def number(self, offset: int, kind: str, what: str) -> int:
        """Return one entry of a table, of the `kind` that `struct` knows."""
        (value,) = struct.unpack(kind, self.table(offset, struct.calcsize(kind), what))
        return int(value)

    def entries(self, offset: int, count: int, kind: str, what: str) -> "Iterator[array[int]]":
        """Yield the entries of a table, a part of it at a time; `kind` as for `struct`.

        Raises:
            ValueError: the file ends before the table does.
        """
        length = count * struct.calcsize(kind)
        self.require(offset, length, what)
        foreign = (kind[0] == ">") == (sys.byteorder == "little")
        for at in range(offset, offset + length, _PIECE):
            words = array(kind[1])
            words.frombytes(os.pread(self._fd, min(_PIECE, offset + length - at), at))
            if foreign:
                words.byteswap()
            yield words


def qcow2_header(file: ImageFile) -> qcow2.Header:
    """Raises: ValueError: what is wrong with it."""
    return qcow2.parse_header(file.data(0, _QCOW2_HEADER, "the qcow2 header"), file.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vmdk:
    """A sparse extent; sizes and offsets are bytes."""

    capacity: int
    grain: int
    per_table: int
    """Grains a table is about."""
    overhead: int
    """What comes before the first grain, even if there is none."""
    tables: int
    directory: int
    backup: int | None
    """Another directory, for when the first is lost; QEMU reads it all the same."""
    zero_grains: bool
    """Whether the sector number 1 says that a grain is zeros."""
    compressed: bool
    markers: bool
    """Whether a length stands before each compressed grain."""

    @classmethod
    def of(cls, file: ImageFile) -> Self:
        """Raises: ValueError: what is wrong with the header, or the footer in its place."""
        header = file.table(0, SECTOR, "the vmdk header")
        fields = disk_headers.VMDK_HEADER.unpack_from(header)
        if fields[-1] == disk_headers.VMDK_DIRECTORY_AT_END:
            header = _vmdk_footer(file, header)
            fields = disk_headers.VMDK_HEADER.unpack_from(header)
        disk_headers.check_vmdk_header(header, file.size)
        _, _, flags, sectors, grain, _, _, per_table, backup, directory = fields
        tables = -(-sectors // (grain * per_table))
        if tables > _VMDK_MAX_TABLES:
            raise ValueError(f"the vmdk has {tables} grain tables, more than {_VMDK_MAX_TABLES}")
        (overhead,) = struct.unpack_from("<Q", header, _VMDK_OVERHEAD_AT)
        (compression,) = struct.unpack_from("<H", header, _VMDK_COMPRESSION_AT)
        return cls(
            capacity=sectors * SECTOR,
            grain=grain * SECTOR,
            per_table=per_table,
            overhead=overhead * SECTOR,
            tables=tables,
            directory=directory * SECTOR,
            backup=backup * SECTOR if flags & _VMDK_BACKUP else None,
            zero_grains=bool(flags & _VMDK_ZERO_GRAINS),
            compressed=compression == _VMDK_DEFLATE,
            markers=bool(flags & _VMDK_MARKERS),
        )

    def hole(self, sector: int) -> bool:
        """Return whether an entry of a grain table says that nothing of the grain is there."""
        return not sector or (sector == _VMDK_ZERO_GRAIN and self.zero_grains)

    def packed(self, file: ImageFile, offset: int, what: str) -> tuple[int, int]:
        """Return where the compressed bytes of a grain at `offset` are, and how many at most.

        Raises:
            ValueError: there cannot be so many.
        """
        if not self.markers:
            return offset, 2 * self.grain
        marker = file.table(offset, _VMDK_MARKER.size, what)
        length = int(_VMDK_MARKER.unpack(marker)[1])
        if not 0 < length <= 2 * self.grain:
            raise ValueError(
                f"{what} has {length} bytes of compressed data, not 1 to {2 * self.grain}"
            )
        return offset + len(marker), length


def _vmdk_footer(file: ImageFile, header: bytes) -> bytes:
    """Return what QEMU takes in place of the header, once it is sure to be one with it."""
    if file.size % SECTOR:
        # QEMU looks for it by whole sectors, inspection by bytes.
        raise ValueError(
            f"the vmdk has a footer, and {file.size} bytes, which is no multiple of {SECTOR}"
        )
    footer = file.table(file.size - 2 * SECTOR, SECTOR, "the vmdk footer")
    # Magic, version, flags, capacity, grain size; then descriptor and table size.
    for part in (slice(0, 48), slice(_VMDK_COMPRESSION_AT, _VMDK_COMPRESSION_AT + 2)):
        if footer[part] != header[part]:
            raise ValueError(
                f"the vmdk footer differs from its header in bytes {part.start} to {part.stop - 1}"
            )
    return footer


@dataclass(frozen=True, kw_only=True, slots=True)
class Vdi:
    """Sizes and offsets are bytes."""

    UNALLOCATED = 0xFFFFFFFE  # or one more
    map: int
    data: int
    block: int
    blocks: int

    @classmethod
    def of(cls, file: ImageFile) -> Self:
        """Raises: ValueError: what is wrong with the header."""
        header = file.table(0, SECTOR, "the vdi header")
        disk_headers.vdi_size(header, file.size)
        blocks_at, data_at = struct.unpack_from("<II", header, 0x154)
        block, _, blocks = struct.unpack_from("<III", header, 0x178)
        return cls(map=blocks_at, data=data_at, block=block, blocks=blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vhd:
    """A dynamic one; sizes and offsets are bytes."""

    UNALLOCATED = 0xFFFFFFFF
    table: int
    entries: int
    block: int
    bitmap: int
    """Before each block: one bit for each sector, in whole sectors. QEMU ignores them."""

    @classmethod
    def of(cls, file: ImageFile) -> Self | None:
        """Return None for a fixed one, which is plain but for its end.

        Raises:
            ValueError: what is wrong with a header.
        """
        footer = file.table(0, SECTOR, "the vhd footer")
        if not footer.startswith(disk_headers.VHD_MAGIC):
            return None
        (header_at,) = struct.unpack_from(">Q", footer, 16)
        header = file.table(header_at, 1024, "the vhd dynamic header")
        magic, _, table, _, entries, block = _VHD_DYNAMIC_HEADER.unpack_from(header)
        if magic != b"cxsparse":
            raise ValueError(f"the vhd has no dynamic header (63 78 73 70 …) at {header_at:#x}")
        if not SECTOR <= block <= _VHD_MAX_BLOCK or block & (block - 1):
            raise ValueError(
                f"the vhd block size is {block} bytes (byte 32 of its dynamic header), not a "
                f"power of 2 from {SECTOR} to {_VHD_MAX_BLOCK}"
            )
        bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR
        return cls(table=table, entries=entries, block=block, bitmap=bitmap)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vhdx:
    """Sizes and offsets are bytes."""

    HOLES = (0, 1, 2, 3, 5)  # not present, undefined, zero, unmapped in two versions
    PRESENT = 6
    size: int
    """Virtual."""
    bat: int
    bat_length: int
    block: int
    ratio: int
    """After so many entries of blocks stands one of something else."""

    @classmethod
    def of(cls, file: ImageFile) -> Self:
        """Raises: ValueError: what is wrong with the region table, or the metadata."""
        regions = _vhdx_regions(file)
        metadata, _ = regions[_VHDX_METADATA]
        items = disk_headers.vhdx_items(
            file.table(metadata, disk_headers.VHDX_TABLE, "the vhdx metadata")
        )
        parameters = file.table(metadata + items.parameters, 8, "the vhdx file parameters")
        disk_headers.check_vhdx_parameters(parameters)
        (block,) = struct.unpack_from("<I", parameters)
        size = file.number(metadata + items.size, "<Q", "the vhdx virtual size")
        sector = file.number(metadata + items.sector_size, "<I", "the vhdx sector size")
        if sector not in {512, 4096}:
            raise ValueError(f"the vhdx sector size is {sector} bytes, not 512 or 4096")
        bat, bat_length = regions[_VHDX_BAT]
        return cls(
            size=size,
            bat=bat,
            bat_length=bat_length,
            block=block,
            ratio=(sector << 23) // block,
        )


def _vhdx_regions(file: ImageFile) -> dict[bytes, tuple[int, int]]:
    """Return offset and length of each region by its identity."""
    what = "the vhdx region table"
    count = file.number(_VHDX_REGIONS_AT + 8, "<I", what)
    if count > _VHDX_MAX_REGIONS:
        raise ValueError(f"{what} has {count} entries, not up to {_VHDX_MAX_REGIONS}")
    table = file.table(_VHDX_REGIONS_AT + 16, count * _VHDX_REGION.size, what)
    regions: dict[bytes, tuple[int, int]] = {}
    for identity, at, length, _ in _VHDX_REGION.iter_unpack(table):
        if identity in regions:
            raise ValueError(f"{what} has a region twice")
        regions[identity] = at, length
    if not {_VHDX_BAT, _VHDX_METADATA} <= regions.keys():
        raise ValueError(f"{what} lacks the block table or the metadata")
    return regions


@dataclass(frozen=True, kw_only=True, slots=True)
class VhdxLog:
    """Where changes of a VHDX may be written that its tables do not know of yet."""

    identity: bytes
    """What its entries bear; older ones bear another."""
    offset: int
    length: int

    @classmethod
    def of(cls, file: ImageFile) -> Self | None:
        """Return None if there is none, as in each file that was closed.

        Raises:
            ValueError: the file has no header, of the two there should be.
        """
        headers = [
            _VHDX_HEADER.unpack_from(header)
            for header in (
                file.table(at, _VHDX_HEADER_LENGTH, "the vhdx header") for at in _VHDX_HEADERS_AT
            )
            if _vhdx_header_holds(header)
        ]
        if not headers:
            raise ValueError("the vhdx has no header whose checksum is right (at byte 65536)")
        # The one with the higher sequence number is the current one.
        _, _, _, _, _, identity, _, _, length, offset = max(headers, key=lambda header: header[2])
        if not any(identity):
            return None
        return cls(identity=identity, offset=offset, length=length)


def _vhdx_header_holds(header: bytes) -> bool:
    (checksum,) = struct.unpack_from("<I", header, 4)
    return header.startswith(b"head") and checksum == crc32c(header[:4] + bytes(4) + header[8:])


def crc32c(data: bytes) -> int:
    """Return Castagnoli's checksum; for a few KiB, as it is slow."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
