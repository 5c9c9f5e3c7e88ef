"""Whether all that the tables of an image point to is in its file.

An image that was cut before it was uploaded has the length and the hash that
its record says. QEMU would find out late, or read zeros in place of what is
missing; so every entry is looked at here, before any program of QEMU opens the
file. What the blocks hold is not looked at.

It reads a file that is whole, a part of a table at a time. The tables of 100 GiB
take 5 to 40 ms.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from agent import qcow2
from agent.cancellation import Cancellation
from agent.disk_tables import SECTOR, ImageFile, Vdi, Vhd, Vhdx, VhdxLog, Vmdk
from agent.qcow2_tables import OFFSET, Geometry, read_l2

_QCOW2_HEADER: Final = 64 << 10  # bytes; the longest there is, with extensions
_VMDK_ZERO_GRAIN: Final = 1
_VHDX_LOG_SECTOR: Final = 4096
_VHDX_LOG_ENTRY: Final = b"loge"


def check(path: Path, format_: str, cancellation: Cancellation) -> None:
    """Look at all tables of an image that is not raw; `format_` is QEMU's name of it.

    Raises:
        ValueError: the entry that is wrong.
        OSError: the file cannot be read.
        BootwrightError: the reason of the cancellation.
    """
    with ImageFile.open(path) as file:
        for _ in _WALKS[format_](file):
            cancellation.check()


def _vmdk(file: ImageFile) -> Iterator[None]:
    vmdk = Vmdk.of(file)
    file.require(0, vmdk.overhead, "what comes before the grains of the vmdk")
    if vmdk.backup is not None:
        file.require(vmdk.backup, 4 * vmdk.tables, "the vmdk's second grain directory")
    # Where the last grain may begin that needs no closer look.
    safe = file.size - (2 * vmdk.grain + SECTOR if vmdk.compressed else vmdk.grain)
    table = 0
    for part in file.entries(vmdk.directory, vmdk.tables, "<I", "the vmdk grain directory"):
        for sector in part:
            if sector:
                what = f"the vmdk grain table {table}"
                for grains in file.entries(sector * SECTOR, vmdk.per_table, "<I", what):
                    if max(grains) * SECTOR > safe:
                        _vmdk_grains(file, vmdk, table * vmdk.per_table, grains)
            table += 1
        yield


def _vmdk_grains(file: ImageFile, vmdk: Vmdk, first: int, grains: Iterable[int]) -> None:
    for index, sector in enumerate(grains, first):
        rest = vmdk.capacity - index * vmdk.grain
        if rest <= 0:
            return
        if not sector or (sector == _VMDK_ZERO_GRAIN and vmdk.zero_grains):
            continue
        what = f"the vmdk grain {index}"
        offset, length = sector * SECTOR, min(vmdk.grain, rest)
        if vmdk.compressed:
            offset, length = vmdk.packed(file, offset, what)
            if not vmdk.markers:
                length = 1  # where it ends only the data itself tells
        file.require(offset, length, what)


def _vdi(file: ImageFile) -> Iterator[None]:
    vdi = Vdi.of(file)
    held = (file.size - vdi.data) // vdi.block
    for part in file.entries(vdi.map, vdi.blocks, "<I", "the vdi block map"):
        for block in part:
            if held <= block < vdi.UNALLOCATED:
                file.require(vdi.data + block * vdi.block, vdi.block, f"the vdi block {block}")
        yield


def _vhd(file: ImageFile) -> Iterator[None]:
    vhd = Vhd.of(file)
    if vhd is None:
        return
    length = vhd.bitmap + vhd.block
    last = (file.size - length) // SECTOR
    for part in file.entries(vhd.table, vhd.entries, ">I", "the vhd block table"):
        for sector in part:
            if last < sector != vhd.UNALLOCATED:
                file.require(sector * SECTOR, length, "a vhd block")
        yield


def _vhdx(file: ImageFile) -> Iterator[None]:
    vhdx = Vhdx.of(file)
    log = VhdxLog.of(file)
    if log is not None:
        yield from _vhdx_log(file, log)
    blocks = -(-vhdx.size // vhdx.block)
    count = blocks + (blocks - 1) // vhdx.ratio
    if 8 * count > vhdx.bat_length:
        raise ValueError(
            f"the vhdx block table has {vhdx.bat_length} bytes, too few for its {blocks} blocks"
        )
    first = 0
    for part in file.entries(vhdx.bat, count, "<Q", "the vhdx block table"):
        for position, entry in enumerate(part, first):
            state = entry & 7
            index, other = divmod(position, vhdx.ratio + 1)
            if state in vhdx.HOLES or other == vhdx.ratio:
                continue
            index = position - index
            if state != vhdx.PRESENT:
                raise ValueError(
                    f"the vhdx block {index} has the state {state}, which needs a parent"
                )
            # QEMU once wrote less than a whole one of the last.
            length = min(vhdx.block, vhdx.size - index * vhdx.block)
            file.require(entry >> 20 << 20, length, f"the vhdx block {index}")
        first += len(part)
        yield


def _vhdx_log(file: ImageFile, log: VhdxLog) -> Iterator[None]:
    """Look whether changes are in the log and nowhere else yet; QEMU would have to write them."""
    file.require(log.offset, log.length, "the vhdx log")
    for offset in range(log.offset, log.offset + log.length, _VHDX_LOG_SECTOR):
        entry = file.data(offset, 48, "the vhdx log")
        if entry.startswith(_VHDX_LOG_ENTRY) and entry[32:] == log.identity:
            raise ValueError(
                f"the vhdx was not closed: its log has changes (at {offset:#x}) that the disk does "
                "not have yet; attach it once to the hypervisor it comes from, and detach it"
            )
        yield


def _qcow2(file: ImageFile) -> Iterator[None]:
    header = qcow2.parse_header(file.data(0, _QCOW2_HEADER, "the qcow2 header"), file.size)
    geometry = Geometry(header=header, size=file.size, refcounts=(0, 0))
    index = 0
    for part in file.entries(header.l1_offset, geometry.tables, ">Q", "the qcow2 L1 table"):
        for entry in part:
            if entry & OFFSET:
                what = f"the qcow2 L2 table {index}"
                read_l2(file.table(entry & OFFSET, geometry.cluster, what), index, geometry)
                yield
            index += 1


_WALKS: Final[Mapping[str, Callable[[ImageFile], Iterator[None]]]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
    "vpc": _vhd,
}
