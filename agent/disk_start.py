"""What the disk within an image begins with, found without any program of QEMU.

A disk may begin with the header of yet another image, and that is to be known
before QEMU opens the outer one. So this goes from the header (`disk_tables`)
through the first entries of the tables to the first blocks, as QEMU's own
drivers do, where they take what they read for good.

It reads a file that is whole, at most some hundred KiB of it, and believes
nothing: an entry that leads out of the file is an error.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agent.disk_tables import SECTOR, ImageFile, Vdi, Vhd, Vhdx, Vmdk, qcow2_header
from agent.qcow2_compression import unpacked
from agent.qcow2_tables import OFFSET, Geometry, read_l2

_Block = Callable[[int, int], bytes]
"""From the number of a block and a count of bytes to its first ones; fewer, and the rest are 0."""


def read(path: Path, format_: str, length: int) -> bytes:
    """Return the first `length` bytes of the disk in an image that is not raw.

    `format_` is QEMU's name of it; `length` is no more than its virtual size.

    Raises:
        ValueError: the entry that is wrong.
        OSError: the file cannot be read.
    """
    with ImageFile.open(path) as file:
        return _READERS[format_](file, length)


def _assembled(length: int, block_size: int, block: _Block) -> bytes:
    found = bytearray()
    while len(found) < length:
        count = min(block_size, length - len(found))
        found += block(len(found) // block_size, count).ljust(count, b"\0")
    return bytes(found)


def _vmdk(file: ImageFile, length: int) -> bytes:
    vmdk = Vmdk.of(file)

    def block(index: int, count: int) -> bytes:
        table, within = divmod(index, vmdk.per_table)
        what = f"the vmdk grain table {table}"
        at = file.number(vmdk.directory + table * 4, "<I", f"the entry of {what}")
        if not at:
            return b""
        at = file.number(at * SECTOR + within * 4, "<I", what)
        if vmdk.hole(at):
            return b""
        what = f"the vmdk grain {index}"
        if not vmdk.compressed:
            return file.data(at * SECTOR, count, what)
        at, room = vmdk.packed(file, at * SECTOR, what)
        try:
            return zlib.decompressobj().decompress(file.data(at, room, what), count)
        except zlib.error as e:
            raise ValueError(f"{what} cannot be decompressed: {e}") from e

    return _assembled(length, vmdk.grain, block)


def _vdi(file: ImageFile, length: int) -> bytes:
    vdi = Vdi.of(file)

    def block(index: int, count: int) -> bytes:
        what = f"the vdi block {index}"
        entry = file.number(vdi.map + 4 * index, "<I", f"the entry of {what}")
        if entry >= vdi.UNALLOCATED:
            return b""
        return file.data(vdi.data + entry * vdi.block, count, what)

    return _assembled(length, vdi.block, block)


def _vhd(file: ImageFile, length: int) -> bytes:
    vhd = Vhd.of(file)
    if vhd is None:
        return file.data(0, length, "the disk").ljust(length, b"\0")
    table, entries, bitmap = vhd.table, vhd.entries, vhd.bitmap

    def block(index: int, count: int) -> bytes:
        what = f"the vhd block {index}"
        if index >= entries:
            raise ValueError(f"the vhd block table has {entries} entries, too few for its size")
        entry = file.number(table + 4 * index, ">I", f"the entry of {what}")
        if entry == Vhd.UNALLOCATED:
            return b""
        return file.data(entry * SECTOR + bitmap, count, what)

    return _assembled(length, vhd.block, block)


def _vhdx(file: ImageFile, length: int) -> bytes:
    vhdx = Vhdx.of(file)

    def block(index: int, wanted: int) -> bytes:
        # The entry of block n is not always the n-th; that of the first one is.
        if index:
            raise AssertionError("a vhdx block is longer than what is read here")
        entry = file.number(vhdx.bat, "<Q", "the vhdx block table")
        state, at = entry & 7, entry >> 20 << 20
        if state in vhdx.HOLES:
            return b""
        if state != vhdx.PRESENT:
            raise ValueError(f"the vhdx block 0 has the state {state}, which needs a parent")
        return file.data(at, wanted, "the vhdx block 0")

    return _assembled(length, vhdx.block, block)


def _qcow2(file: ImageFile, length: int) -> bytes:
    header = qcow2_header(file)
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


_READERS: Final[Mapping[str, Callable[[ImageFile, int], bytes]]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
    "vpc": _vhd,
}
