"""qcow2 images in orders that no program writes and the format allows."""

import random
import struct
import zlib
from dataclasses import dataclass, field

from backports import zstd

from agent import qcow2

COMPRESSED = 1 << 62


@dataclass(kw_only=True)
class Plan:
    """What an image is like; `seed` decides the rest."""

    seed: int
    version: int = 3
    cluster_bits: int = 9
    sectors: int = 64
    compression: str = "zlib"
    extended_l2: bool = False
    tables: str = "anywhere"
    """Where they are: anywhere, first, or last."""
    ordered: bool = False
    """The data is in the order of the guest."""
    tight: bool = True
    """Compressed data follows compressed data at once."""
    kinds: tuple[str, ...] = ("hole", "zero", "reserved", "data", "packed", "zeros")


@dataclass(kw_only=True)
class Image:
    """The bytes, and where in them what is."""

    data: bytes
    l1: int
    l2: dict[int, int] = field(default_factory=dict)


def build(plan: Plan) -> Image:
    return _Writer(plan).build()


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = random.Random(plan.seed)
        self.cluster = 1 << plan.cluster_bits
        self.words = 2 if plan.extended_l2 else 1
        self.per_table = self.cluster // 8 // self.words
        self.guests = -(-plan.sectors * 512 // self.cluster)
        self.tables = -(-self.guests // self.per_table)

    def build(self) -> Image:
        kinds = [self.random.choice(self.plan.kinds) for _ in range(self.guests)]
        present = [
            index
            for index in range(self.tables)
            if any(kind != "hole" for kind in self._of_table(kinds, index))
        ]
        l1_clusters = -(-self.tables * 8 // self.cluster)
        tables: list[tuple[str, int, int]] = [("l1", 0, l1_clusters), ("refcounts", 0, 1)]
        tables += [("l2", index, 1) for index in present]
        content = [
            ("data", guest, 1)
            for guest, kind in enumerate(kinds)
            if kind in {"data", "zeros", "reserved"}
        ]
        areas = self._pack([guest for guest, kind in enumerate(kinds) if kind == "packed"])
        content += [
            ("area", number, -(-len(area) // self.cluster))
            for number, (area, _) in enumerate(areas)
        ]
        content += [("junk", 0, 1)] * self.random.randrange(4)
        if not self.plan.ordered:
            self.random.shuffle(content)
            self.random.shuffle(tables)
        units = {
            "first": lambda: tables + content,
            "last": lambda: content + tables,
            "anywhere": lambda: self._mixed(tables, content),
        }[self.plan.tables]()
        return self._lay_out(units, kinds, areas)

    def _of_table(self, kinds: list[str], index: int) -> list[str]:
        return kinds[index * self.per_table : (index + 1) * self.per_table]

    def _mixed(
        self, tables: list[tuple[str, int, int]], content: list[tuple[str, int, int]]
    ) -> list[tuple[str, int, int]]:
        marks = [True] * len(tables) + [False] * len(content)
        self.random.shuffle(marks)
        some, others = iter(tables), iter(content)
        return [next(some if mark else others) for mark in marks]

    def _pack(self, guests: list[int]) -> list[tuple[bytes, dict[int, tuple[int, int]]]]:
        """Return areas of compressed clusters, and offset and length of each in its area."""
        if not self.plan.ordered:
            self.random.shuffle(guests)
        areas = []
        while guests:
            count = self.random.randint(1, 12)
            area = b""
            places = {}
            for guest in guests[:count]:
                packed = self._compress(self._content(self.cluster))
                if not self.plan.tight:
                    area += bytes(self.random.choice((0, 0, 1, -len(area) % 512, 700)))
                places[guest] = (len(area), len(packed))
                area += packed
            areas.append((area, places))
            guests = guests[count:]
        return areas

    def _compress(self, data: bytes) -> bytes:
        if self.plan.compression == "zstd":
            return zstd.compress(data)
        stream = zlib.compressobj(wbits=-12)
        return stream.compress(data) + stream.flush()

    def _content(self, length: int) -> bytes:
        """Return bytes that compress, of whatever size: zeros, a few bytes, or much."""
        kind = self.random.random()
        if kind < 0.1:
            return bytes(length)
        if kind < 0.4:
            return bytes((self.random.randrange(256),)) * length
        some = self.random.randbytes(self.random.randint(1, length // 2))
        return (some + bytes(length))[:length]

    def _lay_out(
        self,
        units: list[tuple[str, int, int]],
        kinds: list[str],
        areas: list[tuple[bytes, dict[int, tuple[int, int]]]],
    ) -> Image:
        place: dict[tuple[str, int], int] = {}
        at = self.cluster
        for kind, number, clusters in units:
            place[kind, number] = at
            at += clusters * self.cluster
        data = bytearray(at)
        entries: dict[int, tuple[int, ...]] = {}
        for guest, kind in enumerate(kinds):
            entries[guest] = self._entry(guest, kind, place, data)
        for number, (area, places) in enumerate(areas):
            begin = place["area", number]
            data[begin : begin + len(area)] = area
            for guest, (offset, length) in places.items():
                entries[guest] = self._packed_entry(begin + offset, length)
        for kind, _, clusters in units:
            if kind == "junk":
                begin = place["junk", 0]
                data[begin : begin + clusters * self.cluster] = self.random.randbytes(self.cluster)
        l2 = {}
        for (kind, index), offset in place.items():
            if kind == "l2":
                l2[index] = offset
                first = index * self.per_table
                words = [
                    word
                    for guest in range(first, min(first + self.per_table, self.guests))
                    for word in entries[guest]
                ]
                struct.pack_into(f">{len(words)}Q", data, offset, *words)
                struct.pack_into(">Q", data, place["l1", 0] + 8 * index, offset | 1 << 63)
        self._put_header(data, place)
        kind, number, clusters = units[-1]
        if kind == "data" and self.random.random() < 0.5:
            data = data[: max(len(data.rstrip(b"\0")), at - self.cluster + 1)]
        elif kind == "area" and self.random.random() < 0.5:
            data = data[: at - clusters * self.cluster + len(areas[number][0])]
        return Image(data=bytes(data), l1=place["l1", 0], l2=l2)

    def _entry(
        self, guest: int, kind: str, place: dict[tuple[str, int], int], data: bytearray
    ) -> tuple[int, ...]:
        if kind in {"hole", "packed"}:
            return (0,) * self.words
        if self.plan.extended_l2:
            return self._extended_entry(guest, kind, place, data)
        zero = int(self.plan.version > 2)
        if kind == "zero":
            return (zero,)
        begin = place["data", guest]
        if kind == "data":
            data[begin : begin + self.cluster] = self._content(self.cluster)
        elif kind == "reserved":
            data[begin : begin + self.cluster] = b"\xee" * self.cluster
            return (begin | 1 << 63 | zero,)
        return (begin | 1 << 63,)

    def _extended_entry(
        self, guest: int, kind: str, place: dict[tuple[str, int], int], data: bytearray
    ) -> tuple[int, ...]:
        zeros = self.random.getrandbits(32)
        if kind == "zero":
            return (0, zeros << 32)
        begin = place["data", guest]
        data[begin : begin + self.cluster] = self._content(self.cluster)
        there = self.random.choice((0xFFFFFFFF, 0, self.random.getrandbits(32)))
        return (begin | 1 << 63, (zeros & ~there) << 32 | there)

    def _packed_entry(self, offset: int, length: int) -> tuple[int, ...]:
        shift = 70 - self.plan.cluster_bits
        sectors = (offset + length - 1) // 512 - offset // 512
        return (COMPRESSED | sectors << shift | offset, 0)[: self.words]

    def _put_header(self, data: bytearray, place: dict[tuple[str, int], int]) -> None:
        struct.pack_into(
            ">4sIQIIQIIQQIIQ", data, 0, qcow2.MAGIC, self.plan.version, 0, 0,
            self.plan.cluster_bits, self.plan.sectors * 512, 0, self.tables, place["l1", 0],
            place["refcounts", 0], 1, 0, 0,
        )  # fmt: skip
        if self.plan.version > 2:
            zstd_used = self.plan.compression == "zstd"
            incompatible = zstd_used << 3 | self.plan.extended_l2 << 4
            struct.pack_into(">QQQIIB", data, 72, incompatible, 0, 0, 4, 112, zstd_used)
