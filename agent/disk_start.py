"""What the disk within an image begins with, found without any program of QEMU.

A disk may begin with the header of yet another image, and that is to be known
before QEMU opens the outer one. So this goes from the header through the first
entries of the tables to the first blocks, as QEMU's own drivers do
(block/vmdk.c, vpc.c, vhdx.c, vdi.c), where they take what they read for good.

It reads a file that is whole, at most some hundred KiB of it, and believes
nothing: an entry that leads out of the file is an error.
"""

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agent import disk_headers, qcow2
from agent.qcow2_compression import unpacked
from agent.qcow2_tables import OFFSET, Geometry, read_l2

_SECTOR: Final = 512
_HEADER: Final = 64 << 10  # bytes; the longest there is, qcow2's with extensions

_VMDK_COMPRESSION_AT: Final = 77
_VMDK_DEFLATE: Final = 1
_VMDK_ZERO_GRAINS, _VMDK_MARKERS = 1 << 2, 1 << 17
_VMDK_ZERO_GRAIN: Final = 1
_VMDK_MARKER: Final = struct.Struct("<QI")  # sector in the disk, bytes of compressed data

_VDI_UNALLOCATED: Final = 0xFFFFFFFE  # or one more

_VHD_DYNAMIC_HEADER: Final = struct.Struct(">8sQQII")
_VHD_UNALLOCATED: Final = 0xFFFFFFFF
_VHD_MAX_BLOCK: Final = 256 << 20

_VHDX_REGIONS_AT: Final = 192 << 10
_VHDX_REGION: Final = struct.Struct("<16sQII")
_VHDX_BAT: Final = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
_VHDX_METADATA: Final = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_MAX_REGIONS: Final = 2047
_VHDX_HOLES: Final = (0, 1, 2, 3, 5)  # not present, undefined, zero, unmapped in two versions
_VHDX_PRESENT: Final = 6

_Block = Callable[[int, int], bytes]
"""From the number of a block and a count of bytes to its first ones; fewer, and the rest are 0."""


class _File:
    """An image, for reading at any place."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def table(self, offset: int, length: int, what: str) -> bytes:
        """Return all the bytes asked for.

        Raises:
            ValueError: the file ends before they do.
        """
        if offset + length > self.size:
            raise ValueError(
                f"{what} is at {offset:#x} to {offset + length:#x}, beyond the file's "
                f"{self.size} bytes"
            )
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


def read(path: Path, format_: str, length: int) -> bytes:
    """Return the first `length` bytes of the disk in an image that is not raw.

    `format_` is QEMU's name of it; `length` is no more than its virtual size.

    Raises:
        ValueError: the entry that is wrong.
        OSError: the file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _READERS[format_](_File(fd), length)
    finally:
        os.close(fd)


def _assembled(length: int, block_size: int, block: _Block) -> bytes:
    found = bytearray()
    while len(found) < length:
        count = min(block_size, length - len(found))
        found += block(len(found) // block_size, count).ljust(count, b"\0")
    return bytes(found)


def _vmdk(file: _File, length: int) -> bytes:
    header = file.table(0, _SECTOR, "the vmdk header")
    fields = disk_headers.VMDK_HEADER.unpack_from(header)
    if fields[-1] == disk_headers.VMDK_DIRECTORY_AT_END:
        header = _vmdk_footer(file, header)
        fields = disk_headers.VMDK_HEADER.unpack_from(header)
    disk_headers.check_vmdk_header(header, file.size)
    flags, grain, per_table, directory = fields[2], fields[4] * _SECTOR, fields[7], fields[9]
    (compression,) = struct.unpack_from("<H", header, _VMDK_COMPRESSION_AT)

    def block(index: int, count: int) -> bytes:
        what = f"the vmdk grain table {index // per_table}"
        at = file.number(directory * _SECTOR + index // per_table * 4, "<I", f"the entry of {what}")
        if not at:
            return b""
        at = file.number(at * _SECTOR + index % per_table * 4, "<I", what)
        if not at or (at == _VMDK_ZERO_GRAIN and flags & _VMDK_ZERO_GRAINS):
            return b""
        what = f"the vmdk grain {index}"
        if compression != _VMDK_DEFLATE:
            return file.data(at * _SECTOR, count, what)
        at, room = at * _SECTOR, 2 * grain
        if flags & _VMDK_MARKERS:
            marker = file.table(at, _VMDK_MARKER.size, what)
            at, room = at + len(marker), _VMDK_MARKER.unpack(marker)[1]
            if not 0 < room <= 2 * grain:
                raise ValueError(
                    f"{what} has {room} bytes of compressed data, not 1 to {2 * grain}"
                )
        try:
            return zlib.decompressobj().decompress(file.data(at, room, what), count)
        except zlib.error as e:
            raise ValueError(f"{what} cannot be decompressed: {e}") from e

    return _assembled(length, grain, block)


def _vmdk_footer(file: _File, header: bytes) -> bytes:
    """Return what QEMU takes in place of the header, once it is sure to be one with it."""
    if file.size % _SECTOR:
        # QEMU looks for it by whole sectors, inspection by bytes.
        raise ValueError(
            f"the vmdk has a footer, and {file.size} bytes, which is no multiple of {_SECTOR}"
        )
    footer = file.table(file.size - 2 * _SECTOR, _SECTOR, "the vmdk footer")
    # Magic, version, flags, capacity, grain size; then descriptor and table size.
    for part in (slice(0, 48), slice(_VMDK_COMPRESSION_AT, _VMDK_COMPRESSION_AT + 2)):
        if footer[part] != header[part]:
            raise ValueError(
                f"the vmdk footer differs from its header in bytes {part.start} to {part.stop - 1}"
            )
    return footer


def _vdi(file: _File, length: int) -> bytes:
    header = file.table(0, _SECTOR, "the vdi header")
    disk_headers.vdi_size(header, file.size)
    blocks_at, data_at = struct.unpack_from("<II", header, 0x154)
    (block_size,) = struct.unpack_from("<I", header, 0x178)

    def block(index: int, count: int) -> bytes:
        what = f"the vdi block {index}"
        entry = file.number(blocks_at + 4 * index, "<I", f"the entry of {what}")
        if entry >= _VDI_UNALLOCATED:
            return b""
        return file.data(data_at + entry * block_size, count, what)

    return _assembled(length, block_size, block)


def _vhd(file: _File, length: int) -> bytes:
    footer = file.table(0, _SECTOR, "the vhd footer")
    if not footer.startswith(disk_headers.VHD_MAGIC):
        # A fixed one is plain but for its end.
        return file.data(0, length, "the disk").ljust(length, b"\0")
    (header_at,) = struct.unpack_from(">Q", footer, 16)
    header = file.table(header_at, 1024, "the vhd dynamic header")
    magic, _, table, _, entries = _VHD_DYNAMIC_HEADER.unpack_from(header)
    (block_size,) = struct.unpack_from(">I", header, 32)
    if magic != b"cxsparse":
        raise ValueError(f"the vhd has no dynamic header (63 78 73 70 …) at {header_at:#x}")
    if not _SECTOR <= block_size <= _VHD_MAX_BLOCK or block_size & (block_size - 1):
        raise ValueError(
            f"the vhd block size is {block_size} bytes (byte 32 of its dynamic header), not a "
            f"power of 2 from {_SECTOR} to {_VHD_MAX_BLOCK}"
        )
    # One bit for each sector, in whole sectors, before the block; QEMU ignores them.
    bitmap = -(-block_size // _SECTOR // 8 // _SECTOR) * _SECTOR

    def block(index: int, count: int) -> bytes:
        what = f"the vhd block {index}"
        if index >= entries:
            raise ValueError(f"the vhd block table has {entries} entries, too few for its size")
        entry = file.number(table + 4 * index, ">I", f"the entry of {what}")
        if entry == _VHD_UNALLOCATED:
            return b""
        return file.data(entry * _SECTOR + bitmap, count, what)

    return _assembled(length, block_size, block)


def _vhdx(file: _File, length: int) -> bytes:
    what = "the vhdx region table"
    count = file.number(_VHDX_REGIONS_AT + 8, "<I", what)
    if count > _VHDX_MAX_REGIONS:
        raise ValueError(f"{what} has {count} entries, not up to {_VHDX_MAX_REGIONS}")
    table = file.table(_VHDX_REGIONS_AT + 16, count * _VHDX_REGION.size, what)
    regions: dict[bytes, int] = {}
    for identity, at, _, _ in _VHDX_REGION.iter_unpack(table):
        if identity in regions:
            raise ValueError(f"{what} has a region twice")
        regions[identity] = at
    if not {_VHDX_BAT, _VHDX_METADATA} <= regions.keys():
        raise ValueError(f"{what} lacks the block table or the metadata")
    metadata = regions[_VHDX_METADATA]
    items = file.table(metadata, disk_headers.VHDX_TABLE, "the vhdx metadata")
    parameters = metadata + disk_headers.vhdx_parameters_offset(items)
    disk_headers.check_vhdx_parameters(file.table(parameters, 8, "the vhdx file parameters"))
    block_size = file.number(parameters, "<I", "the vhdx block size")

    def block(index: int, wanted: int) -> bytes:
        # The entry of block n is not always the n-th; that of the first one is.
        if index:
            raise AssertionError("a vhdx block is longer than what is read here")
        entry = file.number(regions[_VHDX_BAT], "<Q", "the vhdx block table")
        state, at = entry & 7, entry >> 20 << 20
        if state in _VHDX_HOLES:
            return b""
        if state != _VHDX_PRESENT:
            raise ValueError(f"the vhdx block 0 has the state {state}, which needs a parent")
        return file.data(at, wanted, "the vhdx block 0")

    return _assembled(length, block_size, block)


def _qcow2(file: _File, length: int) -> bytes:
    header = qcow2.parse_header(file.data(0, _HEADER, "the qcow2 header"), file.size)
    geometry = Geometry(header=header, size=file.size, refcounts=(0, 0))
    entry_size = 16 if header.extended_l2 else 8
    found = bytearray(length)
    for index in range(-(-length // geometry.table_span)):
        entry = file.number(header.l1_offset + 8 * index, ">Q", "the qcow2 L1 table")
        at = entry & OFFSET
        if not at:
            continue
        # No more of it than counts here: a table may have 2 MiB.
        count = min(geometry.cluster, -(-length // geometry.cluster) * entry_size)
        table = file.table(at, count, f"the qcow2 L2 table {index}")
        plain, packed = read_l2(table, index, geometry)
        for begin, end, guest in plain:
            if guest < length:
                data = file.data(begin, min(end - begin, length - guest), "qcow2 data")
                found[guest : guest + len(data)] = data
        for begin, end, guest in packed:
            if guest < length:
                data = file.data(begin, end - begin, "qcow2 data")
                data = unpacked(header.compression, data, geometry.cluster)[: length - guest]
                found[guest : guest + len(data)] = data
    return bytes(found)


_READERS: Final[Mapping[str, Callable[[_File, int], bytes]]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
    "vpc": _vhd,
}
