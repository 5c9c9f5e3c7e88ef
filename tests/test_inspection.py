"""Verdicts on streams of bytes: what must be refused, what must be accepted."""

import os
import random
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import inspection
from agent.errors import ImageUnacceptable
from agent.inspection import Inspection, Verdict
from tests.corpus import vmdk_images
from tests.corpus.case import VMDK_TYPES
from tests.qemu_images import needs_qemu_img

MIB = 1 << 20
GIB = 1 << 30
CONTENT = random.Random(7).randbytes(3 * MIB)
SIGNATURE = b"\x55\xaa"


def judge(
    data: bytes,
    disk_format: str,
    chunk: int = MIB,
    *,
    size: int | None = None,
    vmdk_types: Sequence[str] = VMDK_TYPES,
) -> Verdict:
    inspected = Inspection("img-1", disk_format, size=size, vmdk_types=vmdk_types)
    for begin in range(0, len(data), chunk):
        inspected.feed(memoryview(data)[begin : begin + chunk])
    return inspected.finish()


def refused(data: bytes, disk_format: str, rule: str) -> None:
    for chunk in (MIB, 100_003):
        with pytest.raises(ImageUnacceptable, match=rule) as caught:
            judge(data, disk_format, chunk)
        assert caught.value.message.startswith("image img-1: ")
        assert caught.value.hint


def made(
    directory: Path, format_: str, options: str = "", content: bytes = CONTENT, size: int = 0
) -> bytes:
    """What qemu-img makes of `content`, or of nothing at `size`."""
    path, raw = directory / "made", directory / "content"
    words = ["-o", options] if options else []
    if size:
        command = ["create", "-q", "-f", format_, *words, str(path), str(size)]
    else:
        raw.write_bytes(content)
        command = ["convert", "-f", "raw", "-O", format_, *words, str(raw), str(path)]
    subprocess.run(["qemu-img", *command], check=True, capture_output=True)
    return path.read_bytes()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


# --- what honest images look like -------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize(
    ("disk_format", "qemu_format", "options"),
    [
        ("qcow2", "qcow2", ""),
        ("qcow2", "qcow2", "compat=0.10"),
        ("qcow2", "qcow2", "extended_l2=on,cluster_size=128k"),
        ("qcow2", "qcow2", "compression_type=zstd"),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vhdx", "vhdx", ""),
        ("vhd", "vpc", ""),
        ("vhd", "vpc", "subformat=fixed"),
        ("vhd", "vpc", "force_size=on"),
        ("vdi", "vdi", ""),
        ("vdi", "vdi", "static=on"),
    ],
)
def test_what_qemu_img_makes_is_accepted(
    tmp_path: Path, disk_format: str, qemu_format: str, options: str
) -> None:
    data = made(tmp_path, qemu_format, options)
    for chunk in (len(data), MIB, 65_537, 4096):
        verdict = judge(data, disk_format, chunk, size=len(data))
        assert verdict.format == qemu_format
        assert len(CONTENT) <= verdict.virtual_size <= len(CONTENT) + 512 * 255 * 16
        if qemu_format != "vpc":
            assert verdict.virtual_size == len(CONTENT)


@needs_qemu_img
@pytest.mark.parametrize(
    ("disk_format", "qemu_format", "options", "within"),
    [
        ("qcow2", "qcow2", "", MIB),
        ("vmdk", "vmdk", "subformat=streamOptimized", MIB),
        ("vhdx", "vhdx", "", 4 * MIB),
        ("vhd", "vpc", "", MIB),
        ("vdi", "vdi", "", MIB),
    ],
)
def test_the_virtual_size_is_known_long_before_the_end(
    tmp_path: Path, disk_format: str, qemu_format: str, options: str, within: int
) -> None:
    data = made(tmp_path, qemu_format, options)
    inspected = Inspection("img-1", disk_format, vmdk_types=VMDK_TYPES)
    inspected.feed(data[:within])
    assert inspected.virtual_size is not None


def raw_disks() -> dict[str, bytes]:
    def mbr(*entries: bytes, boot_code: bytes = b"") -> bytes:
        table = b"".join(entries).ljust(64, b"\0")
        return boot_code.ljust(446, b"\0")[:446] + table + SIGNATURE + CONTENT

    def entry(flag: int, kind: int, first: int, chs: bytes = b"\0\2\0") -> bytes:
        return bytes([flag]) + chs + bytes([kind]) + b"\xff\xff\xff" + struct.pack("<II", first, 99)

    return {
        "noise": CONTENT,
        "zeros": bytes(MIB),
        "one byte": b"x",
        "odd length": CONTENT[:513],
        "gzip": b"\x1f\x8b\x08\x00" + CONTENT,
        "text": b"just a text\n" * 1000,
        "MBR": mbr(entry(0x80, 0x83, 2048)),
        "protective MBR": mbr(entry(0, 0xEE, 1)),
        "hybrid MBR": mbr(entry(0, 0xEE, 1), entry(0x80, 0x83, 2048)),
        "legacy boot GPT": mbr(entry(0x80, 0xEE, 1, b"\0\1\0")),
        "odd boot flag": mbr(entry(0x7F, 0x83, 2048)),
        "NTFS superfloppy": mbr(boot_code=b"\xeb\x52\x90NTFS    "),
        "FAT superfloppy": mbr(boot_code=b"\xeb\x3c\x90MSDOS5.0"),
        "ext with boot sector": mbr(),
        "magic elsewhere": bytes(512) + b"QFI\xfb" + CONTENT,
    }


@pytest.mark.parametrize("name", raw_disks())
@pytest.mark.parametrize("disk_format", ["raw", "ami", "aki", "ari"])
def test_plain_content_is_raw(name: str, disk_format: str) -> None:
    data = raw_disks()[name]
    for size in (None, len(data)):
        assert judge(data, disk_format, size=size) == Verdict(format="raw", virtual_size=len(data))


def test_the_size_of_a_raw_image_is_known_early_when_the_source_tells_it() -> None:
    inspected = Inspection("img-1", "raw", size=10 * GIB, vmdk_types=())
    inspected.feed(CONTENT[: 256 << 10])
    assert inspected.settled
    assert inspected.virtual_size == 10 * GIB


def iso(start: bytes = b"") -> bytes:
    return start.ljust(32768, b"\0") + b"\x01CD001\x01" + CONTENT


def test_an_iso_is_an_iso_even_if_it_also_boots_from_a_disk() -> None:
    for data in (iso(), iso(bytes(446) + bytes(64) + SIGNATURE)):
        assert judge(data, "iso") == Verdict(format="iso", virtual_size=len(data))


def test_a_gpt_registration_needs_a_boot_signature() -> None:
    data = raw_disks()["protective MBR"]
    assert judge(data, "gpt").format == "raw"
    refused(CONTENT, "gpt", "registered with disk_format gpt, but its bytes are raw")


# --- claim and content ------------------------------------------------------------------------


@needs_qemu_img
def test_content_must_be_what_was_claimed(tmp_path: Path) -> None:
    contents = {
        "qcow2": made(tmp_path, "qcow2"),
        "vmdk": made(tmp_path, "vmdk", "subformat=streamOptimized"),
        "vhdx": made(tmp_path, "vhdx"),
        "vhd": made(tmp_path, "vpc"),
        "vdi": made(tmp_path, "vdi"),
        "iso": iso(),
        "raw": CONTENT,
    }
    for claim in (*contents, "ami", "aki", "ari"):
        for content, data in contents.items():
            if claim != content and (content != "raw" or claim not in ("ami", "aki", "ari")):
                refused(data, claim, f"disk_format {claim}, but its bytes are {content}")


@pytest.mark.parametrize(
    ("magic", "content"),
    [
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (b"WithoutFreeSpace", "parallels"),
        (b"WithouFreSpacExt", "parallels"),
        (b"Bochs Virtual HD Image", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
        (b"COWD", "vmdk"),
        (b"KDMV\x09\0\0\0", "vmdk"),
        (b"QFI\xfb\0\0\0\1", "qcow2"),
        (b"QFI\xfb", "qcow2"),
    ],
)
def test_other_formats_are_not_raw(magic: bytes, content: str) -> None:
    refused(magic + CONTENT, "raw", f"bytes are {content}")
    refused(magic, "raw", f"bytes are {content}")


def test_a_dmg_is_known_by_its_end() -> None:
    refused(CONTENT + b"koly".ljust(512, b"\0"), "raw", "bytes are dmg")


def test_a_text_that_is_a_vmdk_descriptor_is_not_raw() -> None:
    text = (
        b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
        b'createType="monolithicFlat"\nRW 99 FLAT "/etc/shadow" 0\n'
    )
    for data in (text, text + b"#" * 600):
        refused(data, "raw", "bytes are vmdk")
        refused(data, "vmdk", "needs other files")
    # However slowly it drips in:
    with pytest.raises(ImageUnacceptable, match="bytes are vmdk"):
        judge(text, "raw", chunk=1)


def test_unknown_formats_are_refused_at_once() -> None:
    for disk_format in ("ploop", "qed", "luks", "parallels", "", "QCOW2"):
        with pytest.raises(ImageUnacceptable, match="disk_format"):
            Inspection("img-1", disk_format, vmdk_types=())
    for container in ("ova", "docker", "compressed"):
        with pytest.raises(ImageUnacceptable, match="container_format"):
            Inspection("img-1", "qcow2", container_format=container, vmdk_types=())


@pytest.mark.parametrize(
    "disk_format", ["raw", "qcow2", "vhd", "vhdx", "vmdk", "vdi", "iso", "ami"]
)
def test_nothing_is_not_an_image(disk_format: str) -> None:
    refused(b"", disk_format, "it is empty")


@needs_qemu_img
def test_two_formats_at_once_are_none(tmp_path: Path) -> None:
    data = made(tmp_path, "qcow2", size=GIB)
    both = iso(data[:32768])
    for claim in ("qcow2", "iso", "raw"):
        refused(both, claim, "several formats at once: iso, qcow2")


# --- references to the outside ----------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize("backing", ["/etc/shadow", "../../x", "json:{}", "nbd://h/x"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_qcow2_with_a_backing_file_is_refused(tmp_path: Path, backing: str, compat: str) -> None:
    data = made(tmp_path, "qcow2", f"compat={compat}", size=GIB)
    name = backing.encode()
    data = patched(data, 4096, name)
    data = patched(data, 8, struct.pack(">QI", 4096, len(name)))
    refused(
        data, "qcow2", r"names a backing file \(offset 0x1000 at byte 8\), '" + re.escape(backing)
    )
    refused(patched(data, 16, bytes(4)), "qcow2", "backing file")


@needs_qemu_img
def test_a_qcow2_with_a_data_file_is_refused(tmp_path: Path) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data",
         tmp_path / "image", "1G"],
        check=True,
    )  # fmt: skip
    data = (tmp_path / "image").read_bytes()
    refused(data, "qcow2", f"external data file .*bit 2 at byte 79\\), '{tmp_path}/data';")
    refused(
        patched(data, 79, b"\0"),
        "qcow2",
        f"external data file \\(extension at byte 112\\), '{tmp_path}/data';",
    )
    refused(data[:200], "qcow2", "external data file .*bit 2 at byte 79")


VMDK = "subformat=monolithicSparse"


@needs_qemu_img
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('createType="monolithicSparse"', 'createType="monolithicFlat"', "createType is"),
        ('createType="monolithicSparse"', 'createType="twoGbMaxExtentSparse"', "createType is"),
        ('createType="monolithicSparse"', 'createType="vmfs"', "createType is"),
        ('createType="monolithicSparse"', f'createType="{"x" * 70}"', "createType is"),
        ('createType="monolithicSparse"', "", "createType is missing"),
        (
            'createType="monolithicSparse"',
            'createType="monolithicSparse"\ncreateType="custom"',
            "createType is",
        ),
        ('SPARSE "made"', 'SPARSE "/etc/shadow"', "one sparse extent"),
        ('SPARSE "made"', 'SPARSE "..\\x"', "one sparse extent"),
        ('SPARSE "made"', 'SPARSE ".."', "one sparse extent"),
        ('SPARSE "made"', 'FLAT "made" 0', "one sparse extent"),
        ('SPARSE "made"', 'SPARSE "made"\nRW 9 FLAT "x" 0', "one sparse extent"),
        ("parentCID=ffffffff", "parentCID=12345678", "names a parent"),
        (
            "parentCID=ffffffff",
            'parentCID=ffffffff\nparentFileNameHint="/x"',
            "names a parent",
        ),
        ("ddb.", "surprise ", "Invalid VMDK descriptor"),
    ],
)
def test_a_vmdk_that_needs_more_than_itself_is_refused(
    tmp_path: Path, old: str, new: str, rule: str
) -> None:
    data = made(tmp_path, "vmdk", VMDK)
    descriptor = data[512 : 512 + 20 * 512]
    assert old.encode() in descriptor
    changed = descriptor.replace(old.encode(), new.encode(), 1)[: len(descriptor)]
    refused(patched(data, 512, changed.ljust(len(descriptor), b"\0")), "vmdk", rule)


@needs_qemu_img
def test_a_vmdk_descriptor_ends_where_it_does_for_qemu(tmp_path: Path) -> None:
    parent = b'parentFileNameHint="/etc/passwd"\n'
    data = vmdk_images.longer(made(tmp_path, "vmdk", VMDK), parent)
    # QEMU goes by what is behind the end that the header tells.
    (tmp_path / "image").write_bytes(data)
    shown = subprocess.run(
        ["qemu-img", "info", "-f", "vmdk", tmp_path / "image"], check=True, capture_output=True
    )
    assert b"backing file: /etc/passwd" in shown.stdout
    refused(data, "vmdk", "names a parent")
    # And not by what is behind its 20 sectors.
    text = b"#" * (19 * 512 - 1) + b"\n"
    far = vmdk_images.longer(made(tmp_path, "vmdk", VMDK), text + parent)
    assert judge(far, "vmdk").format == "vmdk"


@needs_qemu_img
@pytest.mark.parametrize("chunk", [MIB, 4096])
def test_a_vmdk_of_a_subformat_that_is_allowed_is_accepted(tmp_path: Path, chunk: int) -> None:
    kind = b'createType="twoGbMaxExtentSparse"'
    other = vmdk_images.edited(tmp_path, old=vmdk_images.TYPE, new=kind)
    allowed = (*VMDK_TYPES, "twoGbMaxExtentSparse")
    with pytest.raises(ImageUnacceptable, match=r"is twogbmaxextentsparse, which .*streamOpt"):
        judge(other, "vmdk", chunk)
    verdict = judge(other, "vmdk", chunk, vmdk_types=allowed)
    assert verdict.format == "vmdk"
    # QEMU agrees.
    (tmp_path / "other").write_bytes(other)
    subprocess.run(
        ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", tmp_path / "other", tmp_path / "raw"],
        check=True,
    )
    assert (tmp_path / "raw").stat().st_size == verdict.virtual_size
    # All other rules stay: nothing but one sparse extent, in the file itself.
    flat = vmdk_images.text(kind="monolithicFlat")
    with pytest.raises(ImageUnacceptable, match="needs other files"):
        judge(flat, "vmdk", chunk, vmdk_types=("monolithicFlat",))
    extent = kind + b'\nRW 9 SPARSE "x-s002.vmdk"'
    split = vmdk_images.edited(tmp_path, old=vmdk_images.TYPE, new=extent)
    with pytest.raises(ImageUnacceptable, match="one sparse extent"):
        judge(split, "vmdk", chunk, vmdk_types=allowed)


@needs_qemu_img
@pytest.mark.parametrize("subformat", VMDK_TYPES)
def test_no_vmdk_is_accepted_if_none_is_allowed(tmp_path: Path, subformat: str) -> None:
    data = made(tmp_path, "vmdk", f"subformat={subformat}")
    for allowed in ((), *((name,) for name in VMDK_TYPES if name != subformat)):
        with pytest.raises(ImageUnacceptable, match="not in vmdk_allowed_types") as caught:
            judge(data, "vmdk", vmdk_types=allowed)
        assert (", ".join(allowed) or "none are") in caught.value.message


@needs_qemu_img
def test_a_vmdk_footer_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    data = made(tmp_path, "vmdk", "subformat=streamOptimized")
    # As ovftool writes it: the grain directory's place is told at the end.
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    honest = patched(data, 56, b"\xff" * 8) + marker + data[:512] + bytes(512)
    assert judge(honest, "vmdk").virtual_size == len(CONTENT)
    footer = len(honest) - 1024
    refused(patched(honest, footer + 28, struct.pack("<Q", 4096)), "vmdk", "different descriptor")
    refused(honest[:-512], "vmdk", "footer")


@needs_qemu_img
def test_differencing_disks_are_refused(tmp_path: Path) -> None:
    vhd = made(tmp_path, "vpc")
    refused(patched(vhd, 60, struct.pack(">I", 4)), "vhd", "differencing")
    vdi = made(tmp_path, "vdi")
    refused(patched(vdi, 0x1B8, b"\x01" * 16), "vdi", "names another disk")
    refused(patched(vdi, 0x4C, struct.pack("<I", 4)), "vdi", "vdi type is 4")
    vhdx = made(tmp_path, "vhdx")
    table = vhdx.index(b"metadata", 256 << 10)
    (count,) = struct.unpack_from("<H", vhdx, table + 10)
    entry = table + 32 + 32 * count
    changed = patched(vhdx, table + 10, struct.pack("<H", count + 1))
    locator = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
    refused(patched(changed, entry, locator), "vhdx", "parent locator")


# --- sizes ------------------------------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize("size", [0, (1 << 63) - 1, 1 << 62, (64 << 40) + 512, GIB + 1])
def test_absurd_virtual_sizes_are_refused(tmp_path: Path, size: int) -> None:
    qcow2 = made(tmp_path, "qcow2", size=GIB)
    refused(patched(qcow2, 24, struct.pack(">Q", size)), "qcow2", "virtual size|L1 entries")
    if size != GIB + 1:
        vdi = made(tmp_path, "vdi")
        refused(patched(vdi, 0x170, struct.pack("<Q", size)), "vdi", "virtual size|too few")


@needs_qemu_img
@pytest.mark.parametrize(
    ("disk_format", "qemu_format", "options"),
    [
        ("qcow2", "qcow2", ""),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vhdx", "vhdx", ""),
        ("vhd", "vpc", "subformat=fixed"),
    ],
)
def test_a_header_cut_short_is_refused(
    tmp_path: Path, disk_format: str, qemu_format: str, options: str
) -> None:
    data = made(tmp_path, qemu_format, options)
    for length in (1, 60, 511, 512, 513, 4096):
        with pytest.raises(ImageUnacceptable):
            judge(data[:length], disk_format)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_it_stumble(data: st.DataObject) -> None:
    magic = data.draw(st.sampled_from((b"QFI\xfb", b"KDMV\1\0\0\0", b"vhdxfile", b"conectix", b"")))
    claim = data.draw(st.sampled_from(("qcow2", "vmdk", "vhdx", "vhd", "vdi", "raw", "iso")))
    body = data.draw(st.binary(max_size=2000))
    filler = random.Random(len(body)).randbytes(data.draw(st.sampled_from((0, 300_000))))
    if data.draw(st.booleans()):
        filler = patched(filler.ljust(300_000, b"\0"), 196_608, b"regi" + body[:1000])
    content = magic + body + filler
    verdicts = set()
    for chunk in (7919, MIB):
        try:
            verdicts.add(judge(content, claim, chunk).format)
        except ImageUnacceptable:
            verdicts.add("refused")
    assert len(verdicts) == 1


# --- what a converted disk may hold -----------------------------------------------------------


@needs_qemu_img
def test_an_image_within_an_image_is_refused(tmp_path: Path) -> None:
    for format_, name in (("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi")):
        head = made(tmp_path, format_, size=GIB)[: inspection.HEAD]
        with pytest.raises(ImageUnacceptable, match=f"itself holds an image of format {name}"):
            inspection.refuse_nested("img-1", head)
    for honest in (*raw_disks().values(), iso()):
        inspection.refuse_nested("img-1", honest[: inspection.HEAD])


def test_the_tail_is_right_however_the_chunks_fall() -> None:
    data = os.urandom(300_000) + b"koly".ljust(512, b"\0")
    for chunk in (1000, 300_001, 300_511, 7):
        with pytest.raises(ImageUnacceptable, match="dmg"):
            judge(data, "raw", chunk)
