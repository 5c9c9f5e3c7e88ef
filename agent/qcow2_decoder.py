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
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from agent import qcow2
from agent.qcow2_compression import Packed, Unpacker
from agent.qcow2_l2 import L2Tables
from agent.qcow2_tables import (
    Claims,
    Geometry,
    Pending,
    beyond,
    claim_refcount_blocks,
)
from agent.qcow2_window import Window
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
        window: Window,
        max_extents: int,
    ) -> None:
        """`close` closes both."""
        self._max_extents = max_extents
        self._geometry = geometry
        self._claims = claims
        self._target = target
        self._window = window
        self._tables = L2Tables(geometry, window)
        self._plain = Pending()
        self._packed = Pending()
        # Up to here known compressed data covers the file, or its gaps are kept.
        self._covered = 0
        # The bytes dealt with.
        self._done = 0
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
            decoder._window.keep_of(head, 0, 0, min(len(head), HEAD))
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
        return self._window.offset

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, however many.

        Raises:
            ValueError: the image breaks a rule, which the message names.
            OSError: one of the files cannot be written.
        """
        if self.offset + len(chunk) > self._geometry.size:
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
        if self.offset != self._geometry.size:
            raise ValueError(f"the image ends after {self.offset} of {self._geometry.size} bytes")
        while self._tables.waiting:
            self._read_table(self._tables.waiting.popleft())
        self._unpacker.settle()
        self._target.flush()

    def close(self) -> None:
        """Let go of both files, without flushing; may be called again."""
        self._unpacker.close()
        self._target.close()
        self._window.close()

    def state(self) -> bytes:
        """Return what `resume` needs to go on at `offset`, once both files are synced.

        The first `HEAD` bytes must have been fed.

        Raises:
            ValueError, OSError: as `feed`.
        """
        if self.offset < min(HEAD, self._geometry.size):
            raise ValueError(f"there is nothing to go on from after {self.offset} bytes")
        self._unpacker.settle()
        self._window.save()
        state = _State(
            size=self._geometry.size,
            offset=self.offset,
            done=self._done,
            kept=self._window.base,
            claims=base64.b64encode(zlib.compress(self._claims.states, 1)).decode("ascii"),
            waiting=tuple(self._tables.waiting),
        )
        return _STATE.dump_json(state)

    def _restore(self, state: _State) -> None:
        """Become the decoder that gave `state`, and undo what it has done since."""
        self._done = state.done
        self._window.restore(state.kept, state.offset, self._geometry.size)
        if self._done < self._geometry.l1[1]:
            self._target.truncate(0)
            self._target.truncate(self.virtual_size)
            return
        # The claims are there already; these are thrown away.
        tables = self._tables
        tables.line_up(Claims(self._geometry))
        span = self._geometry.table_span
        waiting = set(state.waiting)
        for index in tables.passing(self._done, self._done):
            if index in waiting:
                tables.waiting.append(index)
                continue
            plain, packed = tables.read(index)
            self._plain.add(beyond(plain, self._done))
            self._packed.add([extent for extent in packed if extent[1] > self._done])
        for begin, end, guest in self._plain:
            self._target.wipe(guest, guest + end - begin)
        for _, _, guest in self._packed:
            self._target.wipe(guest, guest + self._geometry.cluster)
        for index in (*tables.waiting, *tables.ahead):
            self._target.wipe(index * span, (index + 1) * span)

    def _take(self, piece: bytes) -> None:
        window = self._window
        end = window.offset + len(piece)
        if end < self._geometry.size:
            end -= end % self._geometry.cluster
        if end <= self._done:
            window.add(piece)
            return
        window.open(piece)
        self._advance(end)
        # Compressed data that has passed in part only is needed again.
        first = self._packed.peek()
        window.move(end if first is None else max(window.base, min(end, first[0])))

    def _advance(self, end: int) -> None:
        """Deal with the clusters from `_done` to `end`; their bytes are in memory."""
        self._window.keep(*self._overlap(self._geometry.l1, end))
        begin, stop = self._overlap(self._geometry.refcounts, end)
        if begin < stop:
            claim_refcount_blocks(self._window.read(begin, stop), self._geometry, self._claims)
        tables = self._tables
        if not tables.known and self._geometry.l1[1] <= end:
            tables.line_up(self._claims)
        tables.waiting.extend(tables.passing(self._done, end))
        while tables.waiting and self._plain.count + self._packed.count < self._max_extents:
            self._read_table(tables.waiting.popleft())
        self._copy(end)
        self._decode(end)
        if tables.coming:
            for begin, stop in self._claims.free(self._done, end):
                self._window.keep(begin, stop)
        self._done = end

    def _overlap(self, area: tuple[int, int], end: int) -> tuple[int, int]:
        return max(area[0], self._done), min(area[1], end)

    def _read_table(self, index: int) -> None:
        """Claim what L2 table `index` points to, fetch what has passed, expect the rest."""
        done = self._done
        plain, packed = self._tables.read(index)
        if any(extent[0] < done for extent in packed):
            # Whoever decodes may find out that there is more in a cluster, and keep it.
            self._unpacker.settle()
        self._claims.own_data(plain)
        for begin, end, guest in packed:
            self._claims.share(begin, end, f"compressed data of guest offset {guest:#x}")
        for begin, end, guest in plain:
            for at in range(begin, min(end, done), _WINDOW):
                data = self._window.read(at, min(at + _WINDOW, end, done))
                self._target.write(data, 0, len(data), guest + at - begin)
        self._plain.add(beyond(plain, done))
        self._packed.add([extent for extent in packed if extent[1] > done])
        late = [extent for extent in packed if extent[1] <= done]
        step = max(1, _WINDOW // self._geometry.cluster)
        for position in range(0, len(late), step):
            self._unpacker.submit(
                [
                    Packed(memoryview(self._window.read(begin, end)), begin, end, guest, begin)
                    for begin, end, guest in late[position : position + step]
                ]
            )

    def _copy(self, end: int) -> None:
        """Write what is not compressed and lies before `end`."""
        while (extent := self._plain.peek()) is not None and extent[0] < end:
            begin, stop, guest = extent
            self._target.write(
                self._window.data,
                begin - self._window.base,
                min(stop, end) - self._window.base,
                guest,
            )
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

        window, base = (self._window.data, self._window.base) if self._tables.coming else (b"", 0)
        if window:
            self._claims.lose(self._done, end)
        view = memoryview(self._window.data)
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
            if begin >= self._window.base:
                data = view[begin - self._window.base : stop - self._window.base]
            else:
                data = memoryview(self._window.read(begin, stop))
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
        self._window.keep_of(data, base, begin, end)
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


def _open(target: Path, spill: Path, geometry: Geometry) -> tuple[SparseFile, Window]:
    """Return both files, which have their full lengths then."""
    opened = SparseFile(target, length=geometry.header.virtual_size)
    try:
        return opened, Window(SparseFile(spill, length=geometry.size))
    except BaseException:
        opened.close()
        raise
