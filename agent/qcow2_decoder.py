"""Decodes a qcow2 image while its bytes arrive: in order, once, into a raw file.

Each cluster of the image goes, as it passes, to where the guest sees it. What
comes before the tables that tell where that is waits in a second file, the
spill, at the offset it has in the image; so do the tables themselves, from
which another process can go on. Programs that write qcow2 put each table
before its data, and hardly anything is spilled; an image with its tables at the
end makes the spill as long as itself, and never longer.

A checkpoint is `state`, and both files synced since. What a process wrote after
its last checkpoint is wiped out when another one resumes: the hash of the whole
image speaks of what was read again, not of what had been read before.

Memory is bounded whatever the image says: one byte for each cluster of the
file, 24 for each extent whose place is known but which has yet to come (tables
beyond that wait in the spill), and a few windows of the stream. That is some
64 MiB at worst and 10 MiB with what qemu-img writes. Images beyond the bounds,
and a few others, are `Unsupported`, which is known from the header alone;
qemu-img can do them.

However hostile the image, nothing is written beyond the virtual size, and each
cluster of the disk is written at most once.
"""

import base64
import binascii
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from agent import qcow2
from agent.qcow2_compression import Packed, Unpacker
from agent.qcow2_tables import (
    Claims,
    Extent,
    Geometry,
    Pending,
    beyond,
    claim_refcount_blocks,
    read_l1,
    read_l2,
)
from agent.sparse import SparseFile

HEAD = 64 << 10
"""Bytes of the image that `Decoder.begin` wants to see (or all, if there are fewer)."""

# 1 TiB of file in clusters of 64 KiB; 16 MiB of memory.
_MAX_CLUSTERS = 16 << 20
# 128 TiB of disk in clusters of 64 KiB; 2 MiB of memory.
_MAX_TABLES = 1 << 18
MAX_EXTENTS = 1 << 19
"""Extents whose place is known and that have yet to come; 12 MiB of memory.

Neighbours count as one, so an image that is in order has a handful; none of it
in order, this is 32 GiB of data in clusters of 64 KiB.
"""
# A table of larger ones may hold two million pieces; QEMU recommends this one.
_MAX_EXTENDED_BITS = 17

_WINDOW = 1 << 20
# A window of a usual image has far less; a hostile one, all of the disk's.
_READY = 1024


class Unsupported(Exception):
    """Perhaps a good image, but not for this decoder; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    version: int = 1
    size: int
    offset: int
    """The bytes fed."""
    done: int
    """Where the first cluster begins that has not been dealt with."""
    kept: int
    """Where compressed data begins that ends behind `done`; or `done`."""
    claims: str
    waiting: tuple[int, ...]
    """The L2 tables below `done` that have not been read yet."""


_STATE = TypeAdapter(_State)


class Decoder:
    """Of one image; made by `begin` or `resume`, for one thread.

    After an error it can only be closed.
    """

    def __init__(
        self,
        geometry: Geometry,
        claims: Claims,
        target: SparseFile,
        spill: SparseFile,
        max_extents: int,
    ) -> None:
        """`close` closes both files."""
        self._max_extents = max_extents
        self._geometry = geometry
        self._claims = claims
        self._target = target
        self._spill = spill
        # Where the L2 tables are, known once the L1 table has passed; their
        # order in the file; how many have passed; which of these are not read.
        self._lined_up = False
        self._tables: array[int] = array("Q")
        self._order: array[int] = array("L")
        self._passed = 0
        self._waiting: deque[int] = deque()
        self._plain = Pending()
        self._packed = Pending()
        # Up to here known compressed data covers the file, or its gaps are kept.
        self._covered = 0
        # The bytes fed, dealt with, and where the first is that is in memory.
        self._offset = self._done = self._base = 0
        self._data = b""
        self._tail = bytearray()
        self._unpacker = Unpacker(
            geometry.header.compression, geometry.cluster, self._put, self._keep_shared
        )

    @classmethod
    def begin(
        cls,
        head: bytes,
        target: Path,
        spill: Path,
        *,
        size: int,
        max_virtual_size: int = qcow2.MAX_VIRTUAL_SIZE,
        max_extents: int = MAX_EXTENTS,
    ) -> Self:
        """Begin; both files are made, or emptied.

        Args:
            head: the first `HEAD` bytes, which have to be fed all the same.
            size: bytes of the image.
            max_virtual_size: bytes.
            max_extents: about how many to keep in memory.

        Raises:
            Unsupported, ValueError: what is wrong with the header; there are
                no files then.
            OSError
        """
        geometry = _geometry(head, size, max_virtual_size)
        claims = Claims(geometry)
        claims.own(0, geometry.cluster, "header")
        claims.own(*geometry.refcounts, "refcount table")
        claims.own(*geometry.l1, "L1 table")
        target.unlink(missing_ok=True)
        spill.unlink(missing_ok=True)
        decoder = cls(geometry, claims, *_open(target, spill, geometry), max_extents)
        try:
            # For whoever resumes: it is needed before any other byte.
            decoder._spill.write(head, 0, min(len(head), HEAD), 0)
        except BaseException:
            decoder.close()
            raise
        return decoder

    @classmethod
    def resume(
        cls, state: bytes, target: Path, spill: Path, *, max_extents: int = MAX_EXTENTS
    ) -> Self:
        """Go on at `offset`, with both files at least as they were synced after `state`.

        Raises:
            ValueError: the state is damaged, or does not fit the spill.
            OSError
        """
        read = _STATE.validate_json(state)
        head_size = min(HEAD, read.size)
        if (
            read.version != 1
            or not 0 <= read.kept <= read.done <= read.offset <= read.size
            or read.offset < head_size
        ):
            raise ValueError("the decoder's state contradicts itself")
        with spill.open("rb") as opened:
            head = opened.read(head_size)
        try:
            geometry = _geometry(head, read.size, qcow2.MAX_VIRTUAL_SIZE)
            claims = Claims(geometry, zlib.decompress(base64.b64decode(read.claims)))
        except (Unsupported, binascii.Error, zlib.error) as e:
            raise ValueError(f"the decoder's state cannot be used: {e}") from e
        decoder = cls(geometry, claims, *_open(target, spill, geometry), max_extents)
        try:
            decoder._restore(read)
        except BaseException:
            decoder.close()
            raise
        return decoder

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk, and of the target from the start."""
        return self._geometry.header.virtual_size

    @property
    def offset(self) -> int:
        """Bytes fed; after `resume`, where to go on."""
        return self._offset

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, however many.

        Raises:
            ValueError: the image breaks a rule, which the message names.
            OSError: one of the files cannot be written.
        """
        if self._offset + len(chunk) > self._geometry.size:
            raise ValueError(f"the image goes on beyond its {self._geometry.size} bytes")
        step = max(_WINDOW, self._geometry.cluster)
        for begin in range(0, len(chunk), step):
            self._take(chunk if len(chunk) <= step else chunk[begin : begin + step])

    def finish(self) -> None:
        """Return when the target is whole and on stable storage.

        Raises:
            ValueError: the image was cut short, or breaks a rule.
            OSError
        """
        if self._offset != self._geometry.size:
            raise ValueError(f"the image ends after {self._offset} of {self._geometry.size} bytes")
        while self._waiting:
            self._read_table(self._waiting.popleft())
        self._unpacker.settle()
        self._target.flush()

    def close(self) -> None:
        """Let go of both files, without flushing; may be called again."""
        self._unpacker.close()
        self._target.close()
        self._spill.close()

    def state(self) -> bytes:
        """Return what `resume` needs to go on at `offset`, once both files are synced.

        The first `HEAD` bytes must have been fed.

        Raises:
            ValueError, OSError: as `feed`.
        """
        if self._offset < min(HEAD, self._geometry.size):
            raise ValueError(f"there is nothing to go on from after {self._offset} bytes")
        self._unpacker.settle()
        self._spill.write(bytes(self._tail), 0, len(self._tail), self._base)
        state = _State(
            size=self._geometry.size,
            offset=self._offset,
            done=self._done,
            kept=self._base,
            claims=base64.b64encode(zlib.compress(self._claims.states, 1)).decode("ascii"),
            waiting=tuple(self._waiting),
        )
        return _STATE.dump_json(state)

    def _restore(self, state: _State) -> None:
        """Become the decoder that gave `state`, and undo what it has done since."""
        self._offset, self._done, self._base = state.offset, state.done, state.kept
        self._spill.truncate(state.offset)
        self._spill.truncate(self._geometry.size)
        self._tail = bytearray(self._spill.read(state.kept, state.offset))
        if self._done < self._geometry.l1[1]:
            self._target.truncate(0)
            self._target.truncate(self.virtual_size)
            return
        # The claims are there already; these are thrown away.
        self._line_up(Claims(self._geometry))
        span = self._geometry.table_span
        waiting = set(state.waiting)
        for index in self._passing(self._done):
            if index in waiting:
                self._waiting.append(index)
                continue
            plain, packed = self._extents(index)
            self._plain.add(beyond(plain, self._done))
            self._packed.add([extent for extent in packed if extent[1] > self._done])
        for begin, end, guest in self._plain:
            self._target.wipe(guest, guest + end - begin)
        for _, _, guest in self._packed:
            self._target.wipe(guest, guest + self._geometry.cluster)
        for index in (*self._waiting, *self._order[self._passed :]):
            self._target.wipe(index * span, (index + 1) * span)

    def _take(self, piece: bytes) -> None:
        self._offset += len(piece)
        end = self._offset
        if end < self._geometry.size:
            end -= end % self._geometry.cluster
        if end <= self._done:
            self._tail += piece
            return
        self._data = b"".join((self._tail, piece)) if self._tail else piece
        self._advance(end)
        # Compressed data that has passed in part only is needed again.
        first = self._packed.peek()
        keep = end if first is None else max(self._base, min(end, first[0]))
        self._tail = bytearray(memoryview(self._data)[keep - self._base :])
        self._data, self._base = b"", keep

    def _advance(self, end: int) -> None:
        """Deal with the clusters from `_done` to `end`; their bytes are in `_data`."""
        self._keep(*self._overlap(self._geometry.l1, end))
        begin, stop = self._overlap(self._geometry.refcounts, end)
        if begin < stop:
            claim_refcount_blocks(self._bytes(begin, stop), self._geometry, self._claims)
        if not self._lined_up and self._geometry.l1[1] <= end:
            self._line_up(self._claims)
        for index in self._passing(end):
            self._waiting.append(index)
        while self._waiting and self._plain.count + self._packed.count < self._max_extents:
            self._read_table(self._waiting.popleft())
        self._copy(end)
        self._decode(end)
        if self._searching:
            for begin, stop in self._claims.free(self._done, end):
                self._keep(begin, stop)
        self._done = end

    @property
    def _searching(self) -> bool:
        """Whether there are tables yet that may point anywhere."""
        return not self._lined_up or self._passed < len(self._order) or bool(self._waiting)

    def _overlap(self, area: tuple[int, int], end: int) -> tuple[int, int]:
        return max(area[0], self._done), min(area[1], end)

    def _bytes(self, begin: int, end: int) -> bytes:
        """Return bytes that are in memory, or kept in the spill."""
        before = self._spill.read(begin, min(end, self._base)) if begin < self._base else b""
        inside = self._data[max(begin - self._base, 0) : max(end - self._base, 0)]
        return before + inside if before else inside

    def _keep(self, begin: int, end: int) -> None:
        """Put bytes that are in memory into the spill."""
        if begin < end:
            self._spill.write(self._data, begin - self._base, end - self._base, begin)

    def _line_up(self, claims: Claims) -> None:
        """Read the L1 table, all of which is in the spill by now."""
        data = self._spill.read(*self._geometry.l1)
        tables = self._tables = read_l1(data, self._geometry, claims)
        self._lined_up = True
        there = (index for index, offset in enumerate(tables) if offset)
        self._order = array("L", sorted(there, key=tables.__getitem__))

    def _passing(self, end: int) -> Iterator[int]:
        """Yield the L2 tables that have come to pass below `end`, kept in the spill."""
        while self._passed < len(self._order):
            index = self._order[self._passed]
            begin = self._tables[index]
            stop = begin + self._geometry.cluster
            if stop > end:
                return
            if begin >= self._done:
                self._keep(begin, stop)
            self._passed += 1
            yield index

    def _extents(self, index: int) -> tuple[list[Extent], list[Extent]]:
        begin = self._tables[index]
        data = self._spill.read(begin, begin + self._geometry.cluster)
        return read_l2(data, index, self._geometry)

    def _read_table(self, index: int) -> None:
        """Claim what L2 table `index` points to, fetch what has passed, expect the rest."""
        done = self._done
        plain, packed = self._extents(index)
        if any(extent[0] < done for extent in packed):
            # Whoever decodes may find out that there is more in a cluster, and keep it.
            self._unpacker.settle()
        self._claims.own_data(plain)
        for begin, end, guest in packed:
            self._claims.share(begin, end, f"compressed data of guest offset {guest:#x}")
        for begin, end, guest in plain:
            for at in range(begin, min(end, done), _WINDOW):
                data = self._bytes(at, min(at + _WINDOW, end, done))
                self._target.write(data, 0, len(data), guest + at - begin)
        self._plain.add(beyond(plain, done))
        self._packed.add([extent for extent in packed if extent[1] > done])
        late = [extent for extent in packed if extent[1] <= done]
        step = max(1, _WINDOW // self._geometry.cluster)
        for position in range(0, len(late), step):
            self._unpacker.submit(
                [
                    Packed(memoryview(self._bytes(begin, end)), begin, end, guest, begin)
                    for begin, end, guest in late[position : position + step]
                ]
            )

    def _copy(self, end: int) -> None:
        """Write what is not compressed and lies before `end`."""
        while (extent := self._plain.peek()) is not None and extent[0] < end:
            begin, stop, guest = extent
            self._target.write(self._data, begin - self._base, min(stop, end) - self._base, guest)
            if stop > end:
                self._plain.cut(end)
            else:
                self._plain.pop()

    def _decode(self, end: int) -> None:
        """Have decoded what is compressed and ends before `end`.

        While some tables are unknown, there may be more in a cluster than is
        known, unless known data covers it without a gap.
        """
        cluster = self._geometry.cluster
        gaps: set[int] = set()

        def gap(at: int) -> None:
            if at % cluster and self._done <= at < end:
                gaps.add(at // cluster)

        window, base = (self._data, self._base) if self._searching else (b"", 0)
        if window:
            self._claims.lose(self._done, end)
        view = memoryview(self._data)
        ready: list[Packed] = []
        while (extent := self._packed.peek()) is not None and extent[0] < end:
            begin, stop, guest = extent
            if begin > self._covered:
                gap(self._covered)
                gap(begin)
            self._covered = max(self._covered, stop)
            if stop > end:
                break
            self._packed.pop()
            following = self._packed.peek()
            if begin >= self._base:
                data = view[begin - self._base : stop - self._base]
            else:
                data = memoryview(self._bytes(begin, stop))
            until = stop if following is None else min(stop, following[0])
            ready.append(Packed(data, begin, stop, guest, until))
            if len(ready) == _READY:
                self._unpacker.submit(ready, window, base)
                ready = []
        if self._covered < end:
            gap(self._covered)
        if window:
            for index in gaps:
                self._keep_shared(index, window, base)
        self._unpacker.submit(ready, window, base)

    def _keep_shared(self, index: int, data: bytes, base: int) -> None:
        """Put the whole of a cluster with compressed data into the spill; any thread may."""
        begin = index * self._geometry.cluster
        end = min(begin + self._geometry.cluster, self._geometry.size)
        self._spill.write(data, begin - base, end - base, begin)
        self._claims.keep(index)

    def _put(self, guest: int, cluster: bytes) -> None:
        """Write what was compressed; any thread may."""
        length = min(len(cluster), self.virtual_size - guest)
        self._target.write(cluster, 0, length, guest)


def _geometry(head: bytes, size: int, max_virtual_size: int) -> Geometry:
    header = qcow2.parse_header(head, size)
    if header.virtual_size > max_virtual_size:
        raise ValueError(
            f"the qcow2 virtual size is {header.virtual_size} bytes, over {max_virtual_size}"
        )
    offset, clusters = struct.unpack_from(">QI", head, 48)
    end = offset + (clusters << header.cluster_bits)
    geometry = Geometry(header=header, size=size, refcounts=(offset, end))
    if size > _MAX_CLUSTERS * geometry.cluster or geometry.tables > _MAX_TABLES:
        raise Unsupported(
            f"a qcow2 of {size} bytes and a virtual size of {header.virtual_size} in clusters of "
            f"{geometry.cluster}"
        )
    if header.extended_l2 and header.cluster_bits > _MAX_EXTENDED_BITS:
        raise Unsupported(f"a qcow2 with subclusters in clusters of {geometry.cluster} bytes")
    return geometry


def _open(target: Path, spill: Path, geometry: Geometry) -> tuple[SparseFile, SparseFile]:
    """Return both files, which have their full lengths then."""
    opened = SparseFile(target, length=geometry.header.virtual_size)
    try:
        return opened, SparseFile(spill, length=geometry.size)
    except BaseException:
        opened.close()
        raise
