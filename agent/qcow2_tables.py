"""What the tables of a qcow2 image say of the image file's clusters.

Reads L1, L2 and refcount tables strictly, and keeps account of which cluster
of the file is spoken for. Opens no file and decodes no data. The specification
is QEMU's docs/interop/qcow2.txt; where QEMU is more lenient than it, an image
is refused here only for what no program that writes qcow2 is known to do.
"""

import heapq
import itertools
import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from agent import qcow2

Extent = tuple[int, int, int]
"""Begin and end in the file, and what the first byte is the guest's; in bytes.

The guest sees of an uncompressed extent just as many bytes; of a compressed
one a cluster.
"""

_COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00
_RESERVED = 0x3F00_0000_0000_01FE  # bits 1 to 8 and 56 to 61
_ZERO = 1
_SECTOR = 512

# What a cluster of the file is; one byte for each.
FREE, OWNED, PACKED, LOST = range(4)
"""Nobody's yet; a table's or one guest cluster's; compressed data's; the same,
and no longer to be had, because it has passed and all of it had been decoded."""

_UNCLAIMED = re.compile(rb"\x00+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What all tables of one image share; sizes are bytes."""

    header: qcow2.Header
    size: int
    """Of the image file."""
    refcounts: tuple[int, int]
    """Begin and end of the refcount table."""
    l1: tuple[int, int] = field(init=False)
    """Begin and end of the L1 table, as far as the virtual disk needs it."""
    cluster: int = field(init=False)
    table_span: int = field(init=False)
    """What one L2 table maps."""
    tables: int = field(init=False)
    """L2 tables the virtual disk needs; QEMU may keep a machine's state in more."""

    def __post_init__(self) -> None:
        cluster = 1 << self.header.cluster_bits
        span = cluster * (cluster // (16 if self.header.extended_l2 else 8))
        tables = -(-self.header.virtual_size // span)
        l1 = self.header.l1_offset
        for name, value in (
            ("cluster", cluster),
            ("table_span", span),
            ("tables", tables),
            ("l1", (l1, l1 + 8 * tables)),
        ):
            object.__setattr__(self, name, value)


class Claims:
    """Which cluster of the file is used for what, so that none is used twice."""

    def __init__(self, geometry: Geometry, states: bytes | None = None) -> None:
        """Begin with all clusters free, or with what `states` was.

        Raises:
            ValueError: `states` does not fit the image.
        """
        self._cluster = geometry.cluster
        count = -(-geometry.size // geometry.cluster)
        if states is not None and len(states) != count:
            raise ValueError(f"there are claims of {len(states)} clusters, not {count}")
        self.states = bytearray(count) if states is None else bytearray(states)

    def own(self, begin: int, end: int, what: str) -> None:
        """Claim the clusters of bytes `begin` to `end` for `what`, alone.

        Raises:
            ValueError: one of them is used already.
        """
        first, last = begin // self._cluster, -(-end // self._cluster)
        if self.states.count(FREE, first, last) != last - first:
            raise _used_twice(what, begin)
        self.states[first:last] = bytes((OWNED,)) * (last - first)

    def own_data(self, extents: Iterable[Extent]) -> None:
        """Claim the clusters of uncompressed data, given in the order of the guest.

        Raises:
            ValueError: one of them is used already.
        """
        before = None
        for begin, end, guest in extents:
            # Subclusters of one cluster make several extents, which is one claim.
            cluster = self._cluster
            joint = before == (begin // cluster, guest // cluster)
            first = (begin // cluster + 1) * cluster if joint else begin
            if first < end:
                self.own(first, end, f"data of guest offset {guest:#x}")
            before = (end - 1) // cluster, (guest + end - begin - 1) // cluster

    def share(self, begin: int, end: int, what: str) -> None:
        """Claim the clusters of compressed bytes, which may share them with others.

        Raises:
            ValueError: one of them is used otherwise, or has been let go.
        """
        for index in range(begin // self._cluster, -(-end // self._cluster)):
            if self.states[index] not in {FREE, PACKED}:
                raise _used_twice(what, begin)
            self.states[index] = PACKED

    def keep(self, index: int) -> None:
        """Note that all of cluster `index`, shared by compressed data, is kept."""
        self.states[index] = PACKED

    def lose(self, begin: int, end: int) -> None:
        """Note that the compressed data in bytes `begin` to `end` is not kept."""
        part = slice(begin // self._cluster, -(-end // self._cluster))
        states = bytes(self.states[part])
        self.states[part] = states.replace(bytes((PACKED,)), bytes((LOST,)))

    def free(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield begin and end in bytes of what nobody has claimed between both."""
        clusters = range(begin // self._cluster, -(-end // self._cluster))
        for found in _UNCLAIMED.finditer(self.states, clusters.start, clusters.stop):
            yield found.start() * self._cluster, min(found.end() * self._cluster, end)


def _used_twice(what: str, offset: int) -> ValueError:
    return ValueError(
        f"the qcow2 {what} at {offset:#x} overlaps something else: a table, or data of another "
        "cluster"
    )


def read_l1(data: bytes, geometry: Geometry, claims: Claims) -> "array[int]":
    """Return where the L2 table of each entry is, 0 for none, and claim them all.

    Raises:
        ValueError: the entry that is wrong.
    """
    offsets = _words(data)
    for index, entry in enumerate(offsets):
        offset = entry & OFFSET
        offsets[index] = offset
        if entry & ~(OFFSET | 1 << 63):
            raise ValueError(f"the qcow2 L1 entry {index} has reserved bits set ({entry:#x})")
        if offset:
            _check_place(offset, geometry, f"L2 table {index}")
            claims.own(offset, offset + geometry.cluster, f"L2 table {index}")
    return offsets


def claim_refcount_blocks(data: bytes, geometry: Geometry, claims: Claims) -> None:
    """Claim what a piece of the refcount table points to; the counts do not matter here.

    Raises:
        ValueError: the entry that is wrong.
    """
    for offset in _words(data):
        if offset:
            _check_place(offset, geometry, "refcount block")
            claims.own(offset, offset + geometry.cluster, "refcount block")


def _check_place(offset: int, geometry: Geometry, what: str) -> None:
    if offset % geometry.cluster or offset + geometry.cluster > geometry.size:
        raise ValueError(
            f"the qcow2 {what} is at {offset:#x}, which is not on a cluster or not within the "
            f"file's {geometry.size} bytes"
        )


def read_l2(data: bytes, index: int, geometry: Geometry) -> tuple[list[Extent], list[Extent]]:
    """Return the uncompressed and the compressed extents of L2 table `index`.

    Each in the order of the guest, neighbours as one, cut off at the virtual
    size and at the end of the file, and without what reads as zeros.

    Raises:
        ValueError: the entry that is wrong.
    """
    words = _words(data)
    bitmaps: Iterable[int | None] = itertools.repeat(None)
    if geometry.header.extended_l2:
        words, bitmaps = words[::2], words[1::2]
    begin = index * geometry.table_span
    end = min(begin + geometry.table_span, geometry.header.virtual_size)
    plain: list[Extent] = []
    packed: list[Extent] = []
    guests = range(begin, end, geometry.cluster)
    for guest, entry, bitmap in zip(guests, words, bitmaps, strict=False):
        if not entry and not bitmap:
            continue
        if entry & _COMPRESSED:
            packed.append(_compressed(entry, guest, geometry))
            continue
        for at, length in _allocated(entry, bitmap, guest, geometry):
            into = at - (entry & OFFSET)
            # The file may end within its last cluster; what is missing are zeros.
            stop = min(at + length, geometry.size, at + end - guest - into)
            if at < stop:
                _append(plain, at, stop, guest + into)
    return plain, packed


def beyond(extents: Iterable[Extent], offset: int) -> list[Extent]:
    """Return what of uncompressed `extents` is behind `offset`."""
    return [
        (max(begin, offset), end, guest + max(0, offset - begin))
        for begin, end, guest in extents
        if end > offset
    ]


def _append(extents: list[Extent], begin: int, end: int, guest: int) -> None:
    if extents:
        before, until, at = extents[-1]
        if until == begin and at + until - before == guest:
            extents[-1] = (before, end, at)
            return
    extents.append((begin, end, guest))


def _compressed(entry: int, guest: int, geometry: Geometry) -> Extent:
    bits = 70 - geometry.header.cluster_bits
    begin = entry & (1 << bits) - 1
    sectors = (entry >> bits & (1 << 62 - bits) - 1) + 1
    end = (begin // _SECTOR + sectors) * _SECTOR
    # The last sector counts in full, however little of it has been written.
    if end - geometry.size >= _SECTOR or begin >= geometry.size or begin >> 56:
        raise ValueError(
            f"the compressed data of guest offset {guest:#x} is at {begin:#x} to {end:#x}, "
            f"beyond the file's {geometry.size} bytes"
        )
    return begin, min(end, geometry.size), guest


def _allocated(
    entry: int, bitmap: int | None, guest: int, geometry: Geometry
) -> Iterable[tuple[int, int]]:
    """Return offset in the file and length of what an entry says is data."""
    offset = entry & OFFSET
    reserved = _RESERVED | (0 if bitmap is None else _ZERO)
    if entry & reserved or offset % geometry.cluster:
        raise ValueError(
            f"the qcow2 L2 entry of guest offset {guest:#x} has reserved bits set or is not on "
            f"a cluster ({entry:#x})"
        )
    if bitmap is None:
        zero = entry & _ZERO
        if zero and geometry.header.version < 3:
            raise ValueError(
                f"the qcow2 L2 entry of guest offset {guest:#x} says zero, which version 2 does "
                "not have"
            )
        runs = [] if zero else [(offset, geometry.cluster)]
    else:
        if bitmap >> 32 & bitmap:
            raise ValueError(
                f"the qcow2 L2 entry of guest offset {guest:#x} has subclusters that are both "
                f"data and zeros ({bitmap:#018x})"
            )
        piece = geometry.cluster // 32
        runs = [(offset + i * piece, piece) for i in range(32) if bitmap >> i & 1]
    if runs and not 0 < offset < geometry.size:
        raise ValueError(
            f"the qcow2 L2 entry of guest offset {guest:#x} points to {offset:#x}, not into the "
            f"file's {geometry.size} bytes"
        )
    return runs


def _words(data: bytes) -> "array[int]":
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


class Pending:
    """Extents that have yet to pass, in the order of the file.

    They come a table at a time, and take 24 bytes each.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, int]] = []
        self._batches: dict[int, tuple[array[int], int]] = {}
        self._serial = itertools.count()
        self.count = 0

    def add(self, extents: list[Extent]) -> None:
        """Take extents in any order."""
        if extents:
            self.count += len(extents)
            extents.sort()
            serial = next(self._serial)
            self._batches[serial] = array("Q", itertools.chain.from_iterable(extents)), 3
            heapq.heappush(self._heap, (*extents[0], serial))

    def peek(self) -> Extent | None:
        """Return the extent that begins first."""
        return self._heap[0][:3] if self._heap else None

    def pop(self) -> None:
        """Drop the extent that begins first."""
        self.count -= 1
        serial = self._heap[0][3]
        numbers, position = self._batches[serial]
        if position == len(numbers):
            heapq.heappop(self._heap)
            del self._batches[serial]
        else:
            self._batches[serial] = numbers, position + 3
            begin, end, guest = numbers[position : position + 3]
            heapq.heapreplace(self._heap, (begin, end, guest, serial))

    def cut(self, until: int) -> None:
        """Drop what is before `until` of the extent that begins first."""
        begin, end, guest, serial = self._heap[0]
        heapq.heapreplace(self._heap, (until, end, guest + until - begin, serial))

    def __iter__(self) -> Iterator[Extent]:
        """Yield all there are, table by table; they stay."""
        for begin, end, guest, serial in self._heap:
            yield begin, end, guest
            numbers, position = self._batches[serial]
            words = iter(numbers[position:])
            yield from zip(words, words, words, strict=True)
