"""qcow2 by hand: a small honest image, and what becomes of it field by field.

cluster 0 header · 1 refcount table · 2 refcount block · 3 L1 · 4… L2 · data
"""

import functools
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from tests.corpus.case import (
    CONTENT,
    GIB,
    KIB,
    MIB,
    By,
    Case,
    Sample,
    bytes_of,
    converted,
    patched,
)

CLUSTER: Final = 64 * KIB
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
_L2_COVERS: Final = CLUSTER * CLUSTER // 8

_FIELDS: Final = {
    "version": (4, "I"),
    "backing_offset": (8, "Q"),
    "backing_size": (16, "I"),
    "cluster_bits": (20, "I"),
    "size": (24, "Q"),
    "encryption": (32, "I"),
    "l1_entries": (36, "I"),
    "l1_offset": (40, "Q"),
    "refcount_offset": (48, "Q"),
    "refcount_clusters": (56, "I"),
    "snapshots": (60, "I"),
    "snapshots_offset": (64, "Q"),
    "incompatible": (72, "Q"),
    "refcount_order": (96, "I"),
    "header_length": (100, "I"),
}
_EXTENSIONS: Final = 112  # where they begin in version 3


def data_offset(size: int) -> int:
    """Return where the data clusters of `image` begin."""
    return (4 + -(-size // _L2_COVERS)) * CLUSTER


def image(
    entries: Mapping[int, int], data: bytes = b"", *, size: int = MIB, version: int = 3
) -> bytes:
    """Return an image of `size` whose guest clusters have these L2 entries."""
    tables = -(-size // _L2_COVERS)
    length = data_offset(size) + len(data)
    clusters = -(-length // CLUSTER)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb", version, 0, 0, 16, size, 0, tables, 3 * CLUSTER, CLUSTER, 1, 0, 0,
    )  # fmt: skip
    if version == 3:
        header += struct.pack(">QQQII", 0, 0, 0, 4, _EXTENSIONS) + bytes(8)
    l2 = bytearray(tables * CLUSTER)
    for cluster, entry in entries.items():
        struct.pack_into(">Q", l2, cluster * 8, entry)
    l1 = b"".join(struct.pack(">Q", COPIED | (4 + i) * CLUSTER) for i in range(tables))
    return b"".join((
        header.ljust(CLUSTER, b"\0"),
        struct.pack(">Q", 2 * CLUSTER).ljust(CLUSTER, b"\0"),
        struct.pack(f">{clusters}H", *[1] * clusters).ljust(CLUSTER, b"\0"),
        l1.ljust(CLUSTER, b"\0"),
        bytes(l2),
        data,
    ))  # fmt: skip


@functools.cache
def honest(version: int = 3) -> bytes:
    """Return an image whose first two clusters are `CONTENT`'s."""
    first = data_offset(MIB)
    entries = {0: COPIED | first, 1: COPIED | (first + CLUSTER)}
    return image(entries, CONTENT[: 2 * CLUSTER], version=version)


TRUTH: Final = CONTENT[: 2 * CLUSTER].ljust(MIB, b"\0")


def with_fields(data: bytes, **fields: int) -> bytes:
    for name, value in fields.items():
        at, kind = _FIELDS[name]
        data = patched(data, at, struct.pack(f">{kind}", value))
    return data


def backed(name: str, *, version: int = 3, size: int | None = None) -> bytes:
    encoded = name.encode()
    data = patched(honest(version), 4096, encoded)
    length = len(encoded) if size is None else size
    return with_fields(data, backing_offset=4096, backing_size=length)


def extended(kind: int, content: bytes, length: int | None = None) -> bytes:
    """Return an image with one more header extension."""
    head = struct.pack(">II", kind, len(content) if length is None else length)
    return patched(honest(), _EXTENSIONS, head + content)


def compressed(blob: bytes, sectors: int, *, offset: int = 0, size: int = MIB) -> bytes:
    """Return an image every cluster of which is the same compressed one."""
    first = data_offset(size)
    # 16 cluster bits: 54 bits of offset, 8 of further sectors.
    entry = COMPRESSED | (sectors - 1) << 54 | (first + offset)
    return image(dict.fromkeys(range(size // CLUSTER), entry), blob, size=size)


def _deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


def expanding() -> bytes:
    """Return 0.8 MiB that hold 4 GiB of data, none of it zeros."""
    blob = _deflated(CONTENT[:100] * (CLUSTER // 100 + 1))[: 8 * KIB].ljust(8 * KIB, b"\0")
    return compressed(blob, 16, size=4 * GIB)


def _zstd_image(frame: bytes) -> bytes:
    data = compressed(frame.ljust(4 * KIB, b"\0"), 8)
    return patched(with_fields(data, incompatible=1 << 3), 104, b"\1")


def _bomb() -> bytes:
    """Return an image with a cluster whose stream goes on for 64 MiB."""
    blob = _deflated(b"bomb" * (16 * MIB))
    sectors = -(-len(blob) // 512)
    return compressed(blob.ljust(sectors * 512, b"\0"), sectors)


def _small_but_huge() -> bytes:
    """Return 2 TiB of nothing, all of it within what is read before the header is judged."""
    data = patched(with_fields(image({}), size=2 << 40, l1_entries=4096), 3 * CLUSTER, bytes(8))
    return data[: 3 * CLUSTER + 4096 * 8]


def _converted(options: str, work: Path) -> Sample:
    return Sample(data=converted(work, "qcow2", options), truth=CONTENT)


def _nested(inner: bytes, qemu_format: str, options: str, work: Path) -> Sample:
    return Sample(data=converted(work, qemu_format, options, content=inner.ljust(MIB, b"\0")))


_SELF_CONTAINED: Final = "must be self-contained"


def cases() -> Iterator[Case]:
    yield from _honest()
    yield from _references()
    yield from _claims()
    yield from _sizes()
    yield from _headers()
    yield from _clusters()


def _case(
    number: int, name: str, make: Callable[[], bytes], refused: str | None, by: By = By.INSPECTION
) -> Case:
    return Case(
        number=number,
        name=name,
        disk_format="qcow2",
        make=bytes_of(make, TRUTH),
        refused=refused,
        by=by,
    )


def _honest() -> Iterator[Case]:
    yield _case(0, "qcow2 v3", honest, None)
    yield _case(0, "qcow2 v2", lambda: honest(2), None)
    for name, options in (
        ("extended L2", "extended_l2=on"),
        ("zstd", "compression_type=zstd"),
        ("small clusters", "cluster_size=512"),
        ("large clusters", "cluster_size=2M"),
    ):
        yield Case(
            number=0,
            name=f"qcow2 with {name}",
            disk_format="qcow2",
            make=partial(_converted, options),
            refused=None,
        )


def _references() -> Iterator[Case]:
    names = "names a backing file.*" + _SELF_CONTAINED
    yield _case(1, "absolute backing file", lambda: backed("/etc/passwd"), names)
    yield _case(2, "relative backing file", lambda: backed("../../x", version=2), names)
    spec = 'json:{"driver":"file","filename":"/etc/passwd"}'
    yield _case(3, "json backing file", lambda: backed(spec), names)
    for url in ("nbd://h/x", "rbd:p/i", "ssh://h/x", "http://h/x"):
        yield _case(4, f"backing {url[:4]}", partial(backed, url), names)
    yield _case(5, "backing name of no length", lambda: backed("x", size=0), names)
    yield _case(6, "backing format only", lambda: extended(0xE2792ACA, b"raw\0\0\0\0\0", 3), None)
    bit = "external data file .*bit 2.*" + _SELF_CONTAINED
    yield _case(7, "data file bit", lambda: with_fields(honest(), incompatible=4), bit)
    data_file = 0x44415441
    extension = "external data file .extension.*" + _SELF_CONTAINED
    yield _case(8, "data file name", lambda: extended(data_file, b"/etc/x\0\0"), extension)
    quorum = (
        b'json:{"driver":"quorum","vote-threshold":1,"rewrite-corrupted":true,'
        b'"children":[{"driver":"file","filename":"/etc/passwd"}]}'
    )
    data = with_fields(extended(data_file, quorum), incompatible=4)
    yield _case(9, "quorum data file", lambda: data, bit)
    terminal = with_fields(extended(data_file, b"\x1b[2J\xff\n\xe2\x80\xae" * 90), incompatible=4)
    shown = r"data file .*, '\\x1b\[2J\\\\xff\\n\\u202e.{1,600}'…; an image"
    yield _case(9, "data file with escapes", lambda: terminal, shown)
    yield _case(10, "chain to itself", lambda: backed("image"), names)


def _claims() -> Iterator[Case]:
    for claim in ("raw", "ami", "aki", "ari", "vmdk", "vhdx", "iso"):
        yield Case(
            number=22 if claim == "raw" else 37 if claim[0] == "a" else 24,
            name=f"qcow2 as {claim}",
            disk_format=claim,
            make=bytes_of(honest),
            refused=f"disk_format {claim}, but its bytes are qcow2",
        )
    holds = "its virtual disk itself holds an image of format qcow2"
    yield Case(
        number=32,
        name="qcow v1 as raw",
        disk_format="raw",
        make=bytes_of(lambda: with_fields(honest(), version=1)),
        refused="disk_format raw, but its bytes are qcow2",
    )
    inner = (
        ("backing file", backed("/etc/passwd")),
        ("data file", with_fields(honest(), incompatible=4)),
        ("header", honest()),
    )
    for number, qemu_format, claim, options in (
        (33, "qcow2", "qcow2", ""),
        (33, "qcow2", "qcow2", "extended_l2=on"),
        (33, "qcow2", "qcow2", "cluster_size=512"),
        (34, "vmdk", "vmdk", "subformat=monolithicSparse"),
        (34, "vmdk", "vmdk", "subformat=streamOptimized"),
        (34, "vdi", "vdi", ""),
        (34, "vdi", "vdi", "static=on"),
        (34, "vhdx", "vhdx", ""),
        (34, "vhdx", "vhdx", "subformat=fixed"),
        (34, "vpc", "vhd", ""),
    ):
        for what, data in inner:
            for size_known in (True, False) if number == 33 else (True,):
                yield Case(
                    number=number,
                    name=f"{what} within {claim} {options}".strip()
                    + ("" if size_known else " of unknown size"),
                    disk_format=claim,
                    make=partial(_nested, data, qemu_format, options),
                    refused=holds,
                    by=By.CACHE,
                    size_known=size_known,
                )


def _sizes() -> Iterator[Case]:
    for size in ((1 << 63) - 512, (1 << 64) - 512, 1 << 63, (64 << 40) + 512):
        yield _case(39, f"size {size:#x}", partial(with_fields, honest(), size=size), "L1 entries")
    for size in (0, MIB + 1, (1 << 63) - 1):
        yield _case(
            39,
            f"size {size}",
            partial(with_fields, honest(), size=size),
            f"virtual size is {size} .byte 24., not a multiple of 512 above 0",
        )
    yield Case(
        number=40,
        name="one cluster 65536 times",
        disk_format="qcow2",
        make=bytes_of(expanding),
        refused="virtual size of 4294967296 bytes, the flavor's disk only 1073741824",
        by=By.CACHE,
        max_virtual_size=GIB,
    )
    yield Case(
        number=40,
        name="2 TiB in 224 KiB",
        disk_format="qcow2",
        make=bytes_of(_small_but_huge),
        refused="virtual size of 2199023255552 bytes, the flavor's disk only 1073741824",
        by=By.CACHE,
        max_virtual_size=GIB,
    )
    for difference, refused in ((-512, "the flavor's disk only"), (0, None), (512, None)):
        yield Case(
            number=42,
            name=f"flavor {difference:+d}",
            disk_format="qcow2",
            make=bytes_of(honest, TRUTH),
            refused=refused,
            by=By.CACHE,
            max_virtual_size=MIB + difference,
        )


def _headers() -> Iterator[Case]:
    beyond = "beyond the file's"
    for name, fields, refused in (
        ("huge L1", {"l1_entries": (1 << 32) - 1}, "L1 entries"),
        ("no L1", {"l1_entries": 0}, "L1 entries"),
        ("L1 beyond the end", {"l1_offset": 1 << 40}, beyond),
        ("L1 beyond all ends", {"l1_offset": (1 << 64) - CLUSTER}, beyond),
        ("L1 off a cluster", {"l1_offset": 3 * CLUSTER + 8}, "not on a cluster"),
        ("huge refcount table", {"refcount_clusters": (1 << 32) - 1}, "refcount clusters"),
        ("refcounts beyond the end", {"refcount_offset": 1 << 40}, beyond),
        ("cluster_bits 8", {"cluster_bits": 8}, "cluster_bits .byte 20. is 8, not 9 to 21"),
        ("cluster_bits 22", {"cluster_bits": 22}, "cluster_bits .byte 20. is 22"),
        ("cluster_bits 63", {"cluster_bits": 63}, "cluster_bits .byte 20. is 63"),
        ("refcount_order 7", {"refcount_order": 7}, "refcount_order is 7"),
        ("marked corrupt", {"incompatible": 2}, "marked corrupt"),
        ("unknown feature", {"incompatible": 1 << 5}, "unknown incompatible features 0x20"),
        ("unknown feature 63", {"incompatible": 1 << 63}, "unknown incompatible features"),
    ):
        yield _case(43, name, partial(with_fields, honest(), **fields), refused)
    yield _case(43, "dirty", lambda: with_fields(honest(), incompatible=1), None)
    for name, fields in (
        ("L1 in the header", {"l1_offset": 0}),
        ("L1 in the refcount table", {"l1_offset": CLUSTER}),
        ("refcounts in the L1", {"refcount_offset": 3 * CLUSTER}),
        ("snapshots in the L1", {"snapshots": 1, "snapshots_offset": 3 * CLUSTER}),
    ):
        yield _case(
            44,
            name,
            partial(with_fields, honest(), **fields),
            "not on a cluster behind the first|overlaps",
        )
    yield _case(
        46,
        "65536 snapshots",
        lambda: with_fields(honest(), snapshots=65536, snapshots_offset=CLUSTER),
        "65536 snapshots .byte 60., not 0 to 1024",
    )
    yield _case(
        46,
        "snapshots beyond the end",
        lambda: with_fields(honest(), snapshots=3, snapshots_offset=1 << 30),
        beyond,
    )
    yield _case(
        46, "extension of 4 GiB", lambda: extended(0x12345678, b"", (1 << 32) - 1), "runs past"
    )
    yield _case(46, "unknown extension", lambda: extended(0x12345678, b"harmless"), None)
    for length in (0, 103, 105, CLUSTER + 8, (1 << 32) - 1):
        yield _case(
            47,
            f"header_length {length}",
            partial(with_fields, honest(), header_length=length),
            f"header_length is {length}",
        )
    for method in (1, 2, 3):
        yield _case(
            47,
            f"encryption {method}",
            partial(with_fields, honest(), encryption=method),
            f"encryption method .byte 32. is {method}",
        )


def _clusters() -> Iterator[Case]:
    decoded = "is not the qcow2 it claims to be: the .*"
    overlaps = "data of guest offset 0x10000 .* overlaps something else"
    for name, target, reason in (
        ("header", 0, "L2 entry of guest offset 0x10000 points to 0x0"),
        ("refcount table", CLUSTER, overlaps),
        ("L1", 3 * CLUSTER, overlaps),
    ):
        make = partial(bytes, image({1: COPIED | target}))
        yield _case(44, f"guest cluster is the {name}", make, decoded + reason, By.CACHE)
    data = image({0: COPIED | (data_offset(MIB) + 512)}, CONTENT[:MIB])
    refused = decoded + "L2 entry of guest offset 0x0 .* is not on a cluster"
    yield _case(44, "cluster off a cluster", partial(bytes, data), refused, By.CACHE)
    data = patched(honest(), 3 * CLUSTER, struct.pack(">Q", 4 * CLUSTER + 512))
    refused = decoded + "L2 table 0 is at 0x40200"
    yield _case(44, "L2 off a cluster", partial(bytes, data), refused, By.CACHE)
    blob = _deflated(CONTENT[:CLUSTER])
    # RFC 8878: a window descriptor of 0xf8 asks for 2 TiB.
    window = b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x02\x00\x20" + bytes(8)
    for name, data, reason in (
        ("beyond the end", compressed(blob, 256, offset=100 * CLUSTER), "beyond the file's"),
        ("noise", compressed(b"\xff" * 4096, 8), "is not a cluster of 65536 bytes"),
        ("stream longer than its cluster", _bomb(), "it has more bytes"),
        ("zstd window of 2 TiB", _zstd_image(window), "Frame requires too much memory"),
    ):
        refused = f"{decoded}compressed data of guest offset 0x0.*{reason}"
        yield _case(45, f"compressed {name}", partial(bytes, data), refused, By.CACHE)
