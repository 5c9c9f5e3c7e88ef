"""Content that has no header of its own: disks, file systems, and what pretends to be one."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.corpus import qcow2_images
from tests.corpus.case import CONTENT, GIB, MIB, By, Case, Sample, bytes_of

SIGNATURE: Final = b"\x55\xaa"
_STRUCTURED: Final = ("qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso")
_PLAIN: Final = ("raw", "ami", "aki", "ari")


def partition(flag: int, kind: int, first: int, chs: bytes = b"\0\2\0") -> bytes:
    return bytes([flag]) + chs + bytes([kind]) + b"\xff\xff\xff" + struct.pack("<II", first, 99)


def disk(*partitions: bytes, boot_code: bytes = b"") -> bytes:
    """Return a disk whose first sector is an MBR."""
    table = b"".join(partitions).ljust(64, b"\0")
    return boot_code.ljust(446, b"\0")[:446] + table + SIGNATURE + CONTENT


def iso(start: bytes = b"") -> bytes:
    return start[:32768].ljust(32768, b"\0") + b"\x01CD001\x01" + CONTENT


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("disk", CONTENT)
    return buffer.getvalue()


def _tar(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return buffer.getvalue()


def _case(number: int, name: str, data: bytes, refused: str | None, claim: str = "raw") -> Case:
    return Case(
        number=number,
        name=name,
        disk_format=claim,
        make=bytes_of(lambda: data),
        refused=refused,
    )


def _raw_as(claim: str) -> str:
    """Return how raw content is refused; qcow2 may be decoded before it is judged as a whole."""
    magic = "|there is no qcow2 magic" if claim == "qcow2" else ""
    return f"disk_format {claim}, but its bytes are raw{magic}"


def cases() -> Iterator[Case]:
    yield from _claims()
    yield from _partitioned()
    yield from _foreign()
    yield from _odd()


def _claims() -> Iterator[Case]:
    several = "several formats at once: iso, qcow2"
    both = iso(qcow2_images.honest())
    for claim in ("iso", "qcow2", "raw"):
        yield _case(21, f"iso and qcow2 as {claim}", both, several, claim)
    for claim in ("qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso", "gpt"):
        yield _case(
            25 if claim == "iso" else 23,
            f"raw as {claim}",
            CONTENT,
            _raw_as(claim),
            claim,
        )
    yield _case(25, "iso as raw", iso(), "disk_format raw, but its bytes are iso")
    yield _case(26, "iso", iso(), None, "iso")
    yield _case(26, "iso that boots from a disk", iso(disk(partition(0x80, 0, 0))), None, "iso")
    triple = iso(b"QFI\xfb" + disk(partition(0, 0xEE, 1))[4:])
    yield _case(27, "iso and GPT and qcow2", triple, several, "iso")
    yield _case(36, "magic elsewhere", bytes(512) + b"QFI\xfb" + CONTENT, None)
    for claim in ("ploop", "luks", "QCOW2", "", "raw\0", "../raw"):
        yield _case(38, f"disk_format {claim!r}", CONTENT, "disk_format .*is not supported", claim)


def _partitioned() -> Iterator[Case]:
    protective = partition(0, 0xEE, 1)
    for number, name, data in (
        (28, "MBR", disk(partition(0x80, 0x83, 2048))),
        (28, "GPT", disk(protective)),
        (29, "FAT superfloppy", disk(boot_code=b"\xeb\x3c\x90MSDOS5.0")),
        (29, "NTFS superfloppy", disk(boot_code=b"\xeb\x52\x90NTFS    ")),
        (29, "ext with boot sector", disk()),
        (30, "hybrid MBR", disk(protective, partition(0x80, 0x83, 2048))),
        (30, "GPT with legacy boot", disk(partition(0x80, 0xEE, 1, b"\0\1\0"))),
        (30, "odd boot flag", disk(partition(0x7F, 0x83, 2048))),
    ):
        yield _case(number, name, data, None)


def _foreign() -> Iterator[Case]:
    for number, content, magic in (
        (31, "luks", b"LUKS\xba\xbe\0\1"),
        (32, "qed", b"QED\0"),
        (32, "parallels", b"WithoutFreeSpace"),
        (32, "parallels", b"WithouFreSpacExt"),
        (32, "bochs", b"Bochs Virtual HD Image"),
        (32, "cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    ):
        refused = f"disk_format raw, but its bytes are {content}"
        yield _case(number, f"{content} as raw", magic + CONTENT, refused)
    dmg = CONTENT + b"koly".ljust(512, b"\0")
    yield _case(32, "dmg as raw", dmg, "disk_format raw, but its bytes are dmg")
    luks = b"LUKS\xba\xbe\0\1".ljust(164, b"\0") + struct.pack(">I", (1 << 31) - 1)
    yield _case(49, "luks with 2^31 iterations", luks + CONTENT, "bytes are luks")
    for name, data in (
        ("gzip", gzip.compress(CONTENT, mtime=0)),
        ("zip", _zip()),
        ("tar", _tar("disk.raw")),
        ("ova", _tar("machine.ovf")),
    ):
        yield _case(50, f"{name} as raw", data, None)


def _odd() -> Iterator[Case]:
    yield Case(
        number=51,
        name="16 TiB of nothing",
        disk_format="raw",
        make=_endless_zeros,
        refused=f"virtual size of {16 << 40} bytes, the flavor's disk only {GIB}",
        by=By.CACHE,
        max_virtual_size=GIB,
    )
    yield Case(
        number=51,
        name="16 TiB of nothing, no flavor",
        disk_format="raw",
        make=_endless_zeros,
        refused="needs up to [0-9]{14} bytes more",
        by=By.CACHE,
    )
    for length in (0, 1, 511, 512, 513):
        for claim in (*_STRUCTURED, *_PLAIN):
            refused = None
            if length == 0:
                refused = "it is empty"
            if claim in _STRUCTURED:
                refused = f"it is empty|{_raw_as(claim)}"
            yield _case(52, f"{length} bytes as {claim}", CONTENT[:length], refused, claim)


def _endless_zeros(_: Path) -> Sample:
    def zeros(_data: bytes, offset: int) -> Iterator[bytes]:
        for _ in range(offset, 16 << 40, MIB):
            yield bytes(MIB)

    return Sample(data=b"", size=16 << 40, answers=(zeros,))
