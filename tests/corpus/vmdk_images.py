"""VMDK: what a descriptor may say, and a header."""

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from tests.corpus.case import CONTENT, GIB, KIB, MIB, By, Case, Sample, bytes_of, converted, patched

_SPARSE: Final = "subformat=monolithicSparse"
_STREAM: Final = "subformat=streamOptimized"
_DESCRIPTOR: Final = slice(512, 21 * 512)
TYPE: Final = b'createType="monolithicSparse"'
_EXTENT: Final = b'SPARSE "made"'
_PARENT: Final = b"parentCID=ffffffff"


def edited(work: Path, *, old: bytes, new: bytes) -> bytes:
    """Return a sparse image with other words in its descriptor."""
    data = converted(work, "vmdk", _SPARSE)
    descriptor = data[_DESCRIPTOR]
    assert descriptor.count(old) == 1
    length = len(descriptor)
    return patched(data, 512, descriptor.replace(old, new)[:length].ljust(length, b"\0"))


def text(*, kind: str = "monolithicFlat", extent: str = 'RW 99 FLAT "/etc/passwd" 0') -> bytes:
    """Return a descriptor that is all of the image."""
    return (
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="{kind}"\n\n{extent}\n\nddb.adapterType = "ide"\n'
    ).encode()


def with_footer(work: Path) -> bytes:
    """Return an image as ovftool writes it: the grain directory's place is told at the end."""
    return _footed(converted(work, "vmdk", _STREAM))


def _footed(data: bytes) -> bytes:
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    return patched(data, 56, b"\xff" * 8) + marker + data[:512] + bytes(512)


def longer(data: bytes, behind: bytes) -> bytes:
    """Return an image whose descriptor ends after one sector by the header, and not for QEMU."""
    words, _, _ = data[_DESCRIPTOR].partition(b"\0")
    assert len(words) < 512
    data = patched(data, 36, struct.pack("<Q", 1))
    return patched(data, 512, words.ljust(511, b"#") + b"\n" + behind + b"\0")


def aliasing(work: Path) -> bytes:
    """Return an image of 4 GiB all of whose grains are one and the same."""
    # 65 grain tables of 512 entries, each for 64 KiB; all are the first one.
    data = converted(work, "vmdk", _SPARSE, content=CONTENT[: 64 << 10].ljust(4 * GIB >> 8, b"\0"))
    (directory,) = struct.unpack_from("<Q", data, 56)
    (table,) = struct.unpack_from("<I", data, directory * 512)
    (grain,) = struct.unpack_from("<I", data, table * 512)
    data = patched(data, table * 512, struct.pack("<I", grain) * 512)
    data = patched(data, 12, struct.pack("<Q", 4 * GIB // 512))
    return patched(data, directory * 512, struct.pack("<I", table) * 128)


def _text(data: bytes, _: Path) -> bytes:
    return data


_Make = Callable[[Path], bytes]


def _longer(work: Path, *, options: str, behind: bytes, end: Callable[[bytes], bytes]) -> bytes:
    return end(longer(converted(work, "vmdk", options), behind))


def _case(number: int, name: str, make: _Make, refused: str | None, by: By = By.INSPECTION) -> Case:
    return Case(
        number=number,
        name=name,
        disk_format="vmdk",
        make=lambda work: Sample(data=make(work), truth=CONTENT),
        refused=refused,
        by=by,
    )


def cases() -> Iterator[Case]:
    for options in (_SPARSE, _STREAM):
        yield _case(0, options, partial(converted, qemu_format="vmdk", options=options), None)
    yield _case(0, "vmdk with footer", with_footer, None)
    yield from _texts()
    yield from _descriptors()
    yield from _headers()
    yield Case(
        number=41,
        name="vmdk with one grain 65536 times",
        disk_format="vmdk",
        make=lambda work: Sample(data=aliasing(work)),
        refused="virtual size of 4294967296 bytes, the flavor's disk only 1073741824",
        by=By.CACHE,
        max_virtual_size=GIB,
    )
    yield _case(
        41,
        "vmdk with one grain table 128 times",
        aliasing,
        "grain table 1 is at 0x[0-9a-f]+, which is another table's place",
        By.CACHE,
    )


def _texts() -> Iterator[Case]:
    others = "needs other files; an image must be self-contained"
    yield _case(11, "flat extent at a host path", lambda _: text(), others)
    for kind, extent in (
        ("twoGbMaxExtentSparse", 'RW 99 SPARSE "x-s001.vmdk"'),
        ("twoGbMaxExtentFlat", 'RW 99 FLAT "x-f001.vmdk" 0'),
        ("vmfs", 'RW 99 VMFS "x-flat.vmdk"'),
        ("fullDevice", 'RW 99 FLAT "/dev/sda" 0'),
        ("custom", 'RW 99 FLAT "x" 0'),
    ):
        yield _case(
            12, f"text {kind}", partial(_text, text(kind=kind, extent=extent)),
            others,
        )  # fmt: skip
        yield _case(
            12,
            f"{kind} in a sparse file",
            partial(edited, old=TYPE, new=f'createType="{kind}"'.encode()),
            f"createType is {kind.lower()}",
        )
    for name, data in (("short", text()), ("long", text() + b"#" * 4096)):
        yield Case(
            number=35,
            name=f"{name} vmdk text as raw",
            disk_format="raw",
            make=bytes_of(partial(bytes, data)),
            refused="disk_format raw, but its bytes are vmdk",
        )
    yield _case(12, "COWD", lambda _: b"COWD\1\0\0\0" + CONTENT, "KDMV not found")


def _descriptors() -> Iterator[Case]:
    one = "must have one sparse extent, in the file itself"
    kind = "createType is"
    for number, name, old, new, refused in (
        (13, "second extent", _EXTENT, _EXTENT + b'\nRW 9 FLAT "/etc/passwd" 0', one),
        (14, "extent ..", _EXTENT, b'SPARSE ".."', one),
        (14, "extent with a backslash", _EXTENT, b'SPARSE "..\\x"', one),
        (14, "extent at a path", _EXTENT, b'SPARSE "/etc/passwd"', one),
        (14, "extent at a device", _EXTENT, b'FLAT "\\\\.\\PhysicalDrive0" 0', one),
        (14, "extent of another kind", _EXTENT, b'FLAT "made" 0', one),
        (15, "parent name", _PARENT, _PARENT + b'\nparentFileNameHint="/x"', "names a parent"),
        (15, "parent id", _PARENT, b"parentCID=12345678", "names a parent"),
        (17, "no createType", TYPE, b"", f"{kind} missing"),
        (17, "createType twice", TYPE, TYPE + b'\ncreateType="vmfs"', kind),
        (17, "createType of 70 letters", TYPE, b'createType="' + b"x" * 70 + b'"', kind),
        (17, "createType in capitals", TYPE, b'CREATETYPE="VMFS"', kind),
        (17, "createType with spaces", TYPE, b'createType = "vmfs"', kind),
        (
            17,
            "createType with escapes",
            TYPE,
            b'createType="\x1b[2J\x9b"'.replace(b"\x9b", b"\x7f"),
            r"createType is \\x1b\[2j\\x7f,",
        ),
        (17, "createType behind NUL", TYPE, b'\0createType="monolithicSparse"', kind),
        (17, "createType with CR", TYPE, b'createType="vmfs"\r', kind),
        (17, "words of nobody's", b"ddb.adapterType", b"surprise ddb.x", "Invalid VMDK descriptor"),
        (17, "no text", TYPE, b'createType="\xff\xfe"', "descriptor|createType"),
    ):
        yield _case(number, name, partial(edited, old=old, new=new), refused)

    parent = b'parentCID=deadbeef\nparentFileNameHint="/etc/passwd"\n'
    far = b"#".ljust(9 * KIB, b"#") + b"\n" + parent
    for name, options, behind, end in (
        ("parent", _SPARSE, parent, bytes),
        ("parent in the last sector", _SPARSE, far, bytes),
        ("parent of a stream", _STREAM, parent, bytes),
        ("parent of a stream with a footer", _STREAM, parent, _footed),
        ("parent in Latin-1", _SPARSE, b"\xe9\n" + parent, bytes),
    ):
        yield _case(
            15,
            f"{name} behind the descriptor's end",
            partial(_longer, options=options, behind=behind, end=end),
            "names a parent",
        )
    yield _case(
        0,
        "comment behind the descriptor's end",
        partial(_longer, options=_SPARSE, behind=b"# no more\n", end=bytes),
        None,
    )

    def elsewhere(work: Path) -> bytes:
        data = with_footer(work)
        return patched(data, len(data) - 1024 + 28, struct.pack("<Q", 4096))

    yield _case(16, "footer with another descriptor", elsewhere, "different descriptor")
    yield _case(16, "no footer where one is due", lambda w: with_footer(w)[:-512], "footer")


def _headers() -> Iterator[Case]:
    def field(at: int, value: int, options: str = _SPARSE) -> _Make:
        size = 4 if at == 44 else 8
        return lambda work: patched(
            converted(work, "vmdk", options), at, value.to_bytes(size, "little")
        )

    for grain in (0, 3, 1 << 63, 1 << 32):
        yield _case(48, f"grain of {grain}", field(20, grain), f"grain size is {grain} sectors")
    for entries in (0, 513, (1 << 32) - 1):
        yield _case(
            48, f"{entries} grain table entries", field(44, entries), f"tables of {entries} entries"
        )
    yield _case(48, "directory beyond the end", field(56, 1 << 40), "directory .*beyond")
    yield _case(48, "capacity 0", field(12, 0), "capacity of 0 sectors")
    yield _case(48, "capacity 2^55", field(12, 1 << 55), "directory .*beyond")
    for at in (0, 2):
        yield _case(48, f"descriptor at sector {at}", field(28, at), "Wrong descriptor location")
    yield _case(48, "descriptor longer than the file", field(36, 1 << 40), "not 1 to 2047")
    yield _case(48, "version 9", lambda w: patched(converted(w, "vmdk"), 4, b"\x09"), "version")
    longest = field(36, MIB // 512)
    yield _case(48, "descriptor of 1 MiB", longest, "descriptor has 2048 sectors")
