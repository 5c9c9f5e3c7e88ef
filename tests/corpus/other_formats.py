"""VHD, VHDX and VDI."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.corpus.case import CONTENT, GIB, MIB, By, Case, Sample, converted, patched

_HEAD: Final = 256 << 10
_PARENT_LOCATOR: Final = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
_FILE_PARAMETERS: Final = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")

_Make = Callable[[Path], bytes]
_QEMU_NAMES: Final = {"vhd": "vpc"}


def _made(disk_format: str, options: str = "", content: bytes = CONTENT) -> _Make:
    qemu_format = _QEMU_NAMES.get(disk_format, disk_format)
    return lambda work: converted(work, qemu_format, options, content=content)


def _edited(disk_format: str, at: int, new: bytes) -> _Make:
    return lambda work: patched(_made(disk_format)(work), at, new)


def _case(
    number: int,
    name: str,
    disk_format: str,
    make: _Make,
    refused: str | None,
    *,
    by: By = By.INSPECTION,
    max_virtual_size: int | None = None,
) -> Case:
    return Case(
        number=number,
        name=name,
        disk_format=disk_format,
        make=lambda work: Sample(data=make(work), truth=CONTENT),
        refused=refused,
        by=by,
        max_virtual_size=max_virtual_size,
    )


def _differencing_vhdx(work: Path) -> bytes:
    data = _made("vhdx")(work)
    table = data.index(b"metadata", _HEAD)
    (count,) = struct.unpack_from("<H", data, table + 10)
    data = patched(data, table + 10, struct.pack("<H", count + 1))
    return patched(data, table + 32 + 32 * count, _PARENT_LOCATOR)


def _vhdx_parameters(block_size: int | None = None, flags: int | None = None) -> _Make:
    def make(work: Path) -> bytes:
        data = _made("vhdx")(work)
        table = data.index(b"metadata", _HEAD)
        entry = data.index(_FILE_PARAMETERS, table)
        (offset,) = struct.unpack_from("<I", data, entry + 16)
        if block_size is not None:
            data = patched(data, table + offset, struct.pack("<I", block_size))
        if flags is not None:
            data = patched(data, table + offset + 4, struct.pack("<I", flags))
        return data

    return make


def _aliasing_vdi(work: Path) -> bytes:
    """Return an image of 4 GiB all of whose blocks are one and the same."""
    data = converted(work, "vdi", content=CONTENT[:MIB].ljust(8 * MIB, b"\0"))
    (blocks_at, data_at) = struct.unpack_from("<II", data, 0x154)
    # 4096 entries need more room than the 8 there are; it is made before the data.
    blocks = bytes(4 * 4096)
    data = data[:blocks_at] + blocks + data[data_at:]
    data = patched(data, 0x158, struct.pack("<I", blocks_at + len(blocks)))
    data = patched(data, 0x170, struct.pack("<Q", 4 * GIB))
    return patched(data, 0x180, struct.pack("<I", 4096))


def _aliasing_vhdx(work: Path) -> bytes:
    data = _made("vhdx")(work)
    table = data.index(b"metadata", _HEAD)
    size = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
    (offset,) = struct.unpack_from("<I", data, data.index(size, table) + 16)
    return patched(data, table + offset, struct.pack("<Q", 4 * GIB))


def cases() -> Iterator[Case]:
    yield from _honest()
    differencing = "must be self-contained"
    yield _case(18, "parent locator", "vhdx", _differencing_vhdx, f"parent locator.*{differencing}")
    yield _case(18, "parent flag", "vhdx", _vhdx_parameters(flags=2), f"parent.*{differencing}")
    vhd = _edited("vhd", 60, struct.pack(">I", 4))
    yield _case(19, "differencing", "vhd", vhd, f"differencing.*{differencing}")
    yield _case(20, "parent UUID", "vdi", _edited("vdi", 0x1B8, b"\1" * 16), differencing)
    yield _case(20, "link UUID", "vdi", _edited("vdi", 0x1A8, b"\1" * 16), differencing)
    yield _case(20, "type", "vdi", _edited("vdi", 0x4C, struct.pack("<I", 4)), "vdi type is 4")
    for disk_format in ("vhdx", "vdi", "vhd"):
        yield _case(
            24,
            f"{disk_format} as raw",
            "raw",
            _made(disk_format),
            f"disk_format raw, but its bytes are {disk_format}",
        )
    too_large = "virtual size of 4294967296 bytes, the flavor's disk only 1073741824"
    for disk_format, make in (("vdi", _aliasing_vdi), ("vhdx", _aliasing_vhdx)):
        yield _case(
            41,
            f"{disk_format} of 4 GiB",
            disk_format,
            make,
            too_large,
            by=By.CACHE,
            max_virtual_size=GIB,
        )
    yield from _damaged()


def _honest() -> Iterator[Case]:
    for disk_format, options in (
        ("vhd", ""),
        ("vhd", "subformat=fixed"),
        ("vhd", "force_size=on"),
        ("vhdx", ""),
        ("vhdx", "subformat=fixed"),
        ("vdi", ""),
        ("vdi", "static=on"),
    ):
        name = f"{disk_format} {options}".strip()
        yield _case(0, name, disk_format, _made(disk_format, options), None)


def _damaged() -> Iterator[Case]:
    def regions(count: int) -> _Make:
        return _edited("vhdx", (192 << 10) + 8, struct.pack("<I", count))

    yield _case(48, "vhdx with 2048 regions", "vhdx", regions(2048), "vhdx")
    yield _case(48, "vhdx without regions", "vhdx", regions(0), "cut short|vhdx")
    for size in (0, MIB - 1, 3 * MIB, 1 << 31):
        make = _vhdx_parameters(block_size=size)
        yield _case(48, f"vhdx blocks of {size}", "vhdx", make, f"block size is {size}")

    def far_table(work: Path) -> bytes:
        data = _made("vhdx")(work)
        bat = data.index(bytes.fromhex("6677c22d23f600429d64115e9bfd4a08"), 192 << 10)
        return patched(data, bat + 16, struct.pack("<Q", 1 << 40))

    yield _case(48, "vhdx table beyond the end", "vhdx", far_table, "beyond the file", by=By.CACHE)
    for size in (0, 512, 3 * MIB, 1 << 31):
        make = _edited("vdi", 0x178, struct.pack("<I", size))
        yield _case(48, f"vdi blocks of {size}", "vdi", make, f"block size is {size}")
    for blocks in (0, 1):
        make = _edited("vdi", 0x180, struct.pack("<I", blocks))
        yield _case(48, f"vdi of {blocks} blocks", "vdi", make, f"{blocks} blocks")
    yield _case(48, "vdi of no size", "vdi", _edited("vdi", 0x170, bytes(8)), "virtual size is 0")
    for size in (0, 3 * MIB, 1 << 31):
        make = _edited("vhd", 512 + 32, struct.pack(">I", size))
        refused = f"vhd block size is {size} bytes"
        yield _case(48, f"vhd blocks of {size}", "vhd", make, refused, by=By.CACHE)
