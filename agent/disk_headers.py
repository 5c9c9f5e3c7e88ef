"""The headers of VHD, VHDX, VDI and VMDK, as far as the agent looks at them itself.

Each function raises ValueError with the rule that is broken and the byte it is
broken at. What is refused here QEMU would refuse as well, or would need another
file for, or absurd amounts of memory. qcow2 has a module of its own.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_SECTOR: Final = 512
_BLOCK: Final = 1 << 20
_MAX_VHDX_BLOCK: Final = 256 << 20
# VMware's own limits are 128 sectors and 512 entries; QEMU takes larger grains,
# and memory for each.
_MAX_GRAIN: Final = 2048
_MAX_TABLE_ENTRIES: Final = 512
_MAX_DESCRIPTOR: Final = 2047

VHD_MAGIC: Final = b"conectix"

VMDK_HEADER: Final = struct.Struct("<4sIIQQQQIQQ")
VMDK_DIRECTORY_AT_END: Final = (1 << 64) - 1
"""In place of where the grain directory is: a footer tells."""
# Where QEMU looks for the name of a parent, however long the header says that the
# descriptor is, and whatever a footer says (block/vmdk.c, vmdk_parent_open).
_VMDK_DESCRIPTOR: Final = slice(_SECTOR, 21 * _SECTOR)
_VMDK_EXTENT: Final = re.compile(r'(?:rw|rdonly) \d+ sparse "([^"]*)"')

VHDX_TABLE: Final = 64 << 10
"""Bytes at the start of VHDX metadata that hold the table; its items come behind."""
_VHDX_MAX_ITEMS: Final = 2047  # so many fit
_VHDX_PARENT_LOCATOR: Final = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
_VHDX_FILE_PARAMETERS: Final = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
_VHDX_SIZE: Final = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
_VHDX_SECTOR_SIZE: Final = bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f")


def vhd_size(footer: bytes, kind: int) -> int:
    """Return the bytes of the disk by a VHD footer (or its copy at the start of a dynamic disk)."""
    if len(footer) < 512:
        raise ValueError(f"the vhd footer is cut short after {len(footer)} of 512 bytes")
    current, cylinders, heads, sectors, found = struct.unpack_from(">QHBBI", footer, 48)
    if found == 4:
        raise ValueError(
            "the vhd is a differencing disk (type 4 at byte 60 of its footer); an image must be "
            "self-contained"
        )
    if found != kind:
        raise ValueError(f"the vhd type is {found} (byte 60 of its footer), not {kind}")
    # QEMU goes by one or the other, depending on the program that wrote the
    # file; but the largest geometry there is says only that the disk is larger.
    if (cylinders, heads, sectors) == (65535, 16, 255):
        return int(current)
    return int(max(current, cylinders * heads * sectors * _SECTOR))


def vdi_size(header: bytes, file_size: int | None) -> int:
    """Return the bytes of the disk by a VDI header; `file_size` where it is known."""
    if len(header) < 512:
        raise ValueError(f"the vdi header is cut short after {len(header)} of 512 bytes")
    (kind,) = struct.unpack_from("<I", header, 0x4C)
    if kind not in (1, 2):
        raise ValueError(f"the vdi type is {kind} (byte 0x4c), not 1 (dynamic) or 2 (static)")
    if any(header[0x1A8:0x1C8]):
        raise ValueError(
            "the vdi names another disk (link or parent UUID at bytes 0x1a8 to 0x1c7); an image "
            "must be self-contained"
        )
    (data_offset,) = struct.unpack_from("<I", header, 0x158)
    size, block, _, blocks, allocated = struct.unpack_from("<QIIII", header, 0x170)
    if block != _BLOCK:
        raise ValueError(f"the vdi block size is {block} bytes (byte 0x178), not {_BLOCK}")
    if blocks * block < size:
        raise ValueError(
            f"the vdi has {blocks} blocks (byte 0x180), too few for its {size} bytes (byte 0x170)"
        )
    end = data_offset + allocated * block
    if file_size is not None and end > file_size:
        raise ValueError(
            f"the vdi is cut short: it has {allocated} blocks (byte 0x184) up to byte {end}, "
            f"beyond the file's {file_size} bytes"
        )
    return int(size)


def check_vmdk_header(header: bytes, file_size: int | None) -> None:
    """Check the header of a sparse extent, and that there is one."""
    if header[:4] != b"KDMV":
        raise ValueError(
            "the vmdk is no sparse extent (no 4b 44 4d 56 at byte 0) and needs other files; an "
            "image must be self-contained"
        )
    if len(header) < VMDK_HEADER.size:
        raise ValueError(f"the vmdk header is cut short after {len(header)} of 64 bytes")
    (
        _, _, _, sectors, grain, _, descriptor, entries, _, directory,
    ) = VMDK_HEADER.unpack_from(header)  # fmt: skip
    if not sectors:
        # QEMU would not use the extent, but what a text in the file names.
        raise ValueError("the vmdk has a capacity of 0 sectors (byte 12)")
    if not 1 <= grain <= _MAX_GRAIN or grain & (grain - 1):
        raise ValueError(
            f"the vmdk grain size is {grain} sectors (byte 20), not a power of 2 up to {_MAX_GRAIN}"
        )
    for what, value, most in (
        ("descriptor has {} sectors (byte 36)", descriptor, _MAX_DESCRIPTOR),
        ("has grain tables of {} entries (byte 44)", entries, _MAX_TABLE_ENTRIES),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"the vmdk {what.format(value)}, not 1 to {most}")
    if directory == VMDK_DIRECTORY_AT_END or file_size is None:
        return
    end = directory * _SECTOR + -(-sectors // (grain * entries)) * 4
    if end > file_size:
        raise ValueError(
            f"the vmdk grain directory (byte 56) ends at {end}, beyond the file's {file_size} bytes"
        )


def vmdk_descriptor(head: bytes | bytearray) -> str:
    """Return the descriptor of a sparse extent as QEMU reads it, in lower case.

    It ends with a NUL, not where the header says. `head`: all the file, or its first 11 KiB.
    """
    text, _, _ = bytes(head[_VMDK_DESCRIPTOR]).partition(b"\0")
    return text.decode("latin-1").lower()


def check_vmdk_descriptor(descriptor: str, allowed: Sequence[str]) -> None:
    """Check a descriptor, given in lower case; `allowed` are names of subformats."""
    subtypes = re.findall(r'createtype\s*=\s*"?([^"\n]*)', descriptor)
    if len(subtypes) != 1 or subtypes[0] not in {name.lower() for name in allowed}:
        raise ValueError(
            f"the vmdk's createType is {', '.join(subtypes)[:80] or 'missing'}, which is not in "
            f"vmdk_allowed_types ({', '.join(allowed) or 'none are'})"
        )
    parents = re.findall(r"parentcid\s*=\s*(\S+)", descriptor)
    if "parentfilenamehint" in descriptor or set(parents) - {"ffffffff"}:
        raise ValueError("the vmdk descriptor names a parent; an image must be self-contained")
    extents = [
        line.strip()
        for line in descriptor.splitlines()
        if line.strip().startswith(("rw", "rdonly", "noaccess"))
    ]
    matched = _VMDK_EXTENT.fullmatch(extents[0]) if len(extents) == 1 else None
    if matched is None or re.search(r"[/\\]|\.\.", matched[1]):
        raise ValueError(
            "the vmdk descriptor must have one sparse extent, in the file itself, and has "
            f"{'; '.join(extents)[:120] or 'none'}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VhdxItems:
    """Where in the VHDX metadata the items are; bytes."""

    parameters: int
    size: int
    sector_size: int


def vhdx_items(table: bytes) -> VhdxItems:
    """Return where the items are, by the table at the start of the metadata."""
    (count,) = struct.unpack_from("<H", table, 10)
    if count > _VHDX_MAX_ITEMS:
        raise ValueError(f"the vhdx metadata has {count} entries, not up to {_VHDX_MAX_ITEMS}")
    entries = {
        table[at : at + 16]: struct.unpack_from("<I", table, at + 16)[0]
        for at in range(32, 32 + 32 * count, 32)
    }
    if _VHDX_PARENT_LOCATOR in entries:
        raise ValueError("the vhdx metadata has a parent locator; an image must be self-contained")

    def offset(identity: bytes, name: str) -> int:
        found = entries.get(identity, 0)
        if not VHDX_TABLE <= found < _BLOCK:
            raise ValueError(f"the vhdx {name} is at {found} in the metadata, or missing")
        return int(found)

    return VhdxItems(
        parameters=offset(_VHDX_FILE_PARAMETERS, "file parameters item"),
        size=offset(_VHDX_SIZE, "virtual size"),
        sector_size=offset(_VHDX_SECTOR_SIZE, "logical sector size"),
    )


def check_vhdx_parameters(parameters: bytes) -> None:
    block, flags = struct.unpack("<II", parameters)
    if not _BLOCK <= block <= _MAX_VHDX_BLOCK or block & (block - 1):
        raise ValueError(
            f"the vhdx block size is {block} bytes, not a power of 2 from {_BLOCK} to "
            f"{_MAX_VHDX_BLOCK}"
        )
    if flags & 2:
        raise ValueError("the vhdx has a parent (by its flags); an image must be self-contained")
