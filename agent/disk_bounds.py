"""Whether all that the tables of an image point to is in its file.

An image that was cut before it was uploaded has the length and the hash that
its record says. QEMU would find out late, or read zeros in place of what is
missing; so every entry is looked at here, before any program of QEMU opens the
file. What the blocks hold is not looked at.

It reads a file that is whole, a part of a table at a time, and each table once:
an image that points to one twice is refused. So the time goes with the tables
in the file, not with what a header promises. All tables of 100 GiB were seen to
take 2 to 75 ms; of qcow2, whose entries say more, 1.6 s, and 3 s if extended.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from agent.cancellation import Cancellation
from agent.disk_tables import (
    SECTOR,
    ImageFile,
    Vdi,
    Vhd,
    Vhdx,
    VhdxLog,
    Vmdk,
    qcow2_header,
)
from agent.qcow2_tables import Claims, Geometry, read_l1, read_l2

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
    tables = _VmdkTables(file, vmdk)
    index = 0
    for part in file.entries(vmdk.directory, vmdk.tables, "<I", "the vmdk grain directory"):
        for sector in part:
            if sector:
                tables.look(index, sector * SECTOR)
                yield
            index += 1
        yield


class _VmdkTables:
    """The grain tables, each of which is looked at once.

    All of the directory may point to one table, and all of the tables to one
    grain; there would be no end of it. No program is known to write that.
    """

    def __init__(self, file: ImageFile, vmdk: Vmdk) -> None:
        self._file = file
        self._vmdk = vmdk
        # Where the last grain may begin that needs no closer look. There is room
        # for but a few behind it.
        self._safe = file.size - (2 * vmdk.grain + SECTOR if vmdk.compressed else vmdk.grain)
        self._last: set[int] = set()
        # A bit for each of so many bytes: that a table begins there. Two tables in
        # one of these would overlap.
        self._length = max(SECTOR, 4 * vmdk.per_table)
        self._begun = bytearray(file.size // self._length // 8 + 1)

    def look(self, table: int, offset: int) -> None:
        what = f"the vmdk grain table {table}"
        per_table = self._vmdk.per_table
        self._file.require(offset, 4 * per_table, what)
        self._begin(offset, what)
        for grains in self._file.entries(offset, per_table, "<I", what):
            if max(grains) * SECTOR > self._safe:
                self._look_closer(table * per_table, grains)

    def _begin(self, offset: int, what: str) -> None:
        at, bit = divmod(offset // self._length, 8)
        if self._begun[at] & 1 << bit:
            raise ValueError(f"{what} is at {offset:#x}, which is another table's place")
        self._begun[at] |= 1 << bit

    def _look_closer(self, first: int, grains: Iterable[int]) -> None:
        vmdk = self._vmdk
        for index, sector in enumerate(grains, first):
            rest = vmdk.capacity - index * vmdk.grain
            if rest <= 0:
                return
            offset = sector * SECTOR
            if vmdk.hole(sector) or offset <= self._safe:
                continue
            what = f"the vmdk grain {index}"
            if sector in self._last:
                raise ValueError(f"{what} is at {offset:#x}, which is another grain's place")
            self._last.add(sector)
            length = min(vmdk.grain, rest)
            if vmdk.compressed:
                offset, length = vmdk.packed(self._file, offset, what)
                if not vmdk.markers:
                    length = 1  # where it ends only the data itself tells
            self._file.require(offset, length, what)


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
    header = qcow2_header(file)
    geometry = Geometry(header=header, size=file.size, refcounts=(0, 0))
    begin, end = geometry.l1
    l1 = file.table(begin, end - begin, "the qcow2 L1 table")
    # No table is another one's as well: there would be no end of it.
    for index, offset in enumerate(read_l1(l1, geometry, Claims(geometry))):
        if offset:
            what = f"the qcow2 L2 table {index}"
            read_l2(file.table(offset, geometry.cluster, what), index, geometry)
            yield


_WALKS: Final[Mapping[str, Callable[[ImageFile], Iterator[None]]]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
    "vpc": _vhd,
}
