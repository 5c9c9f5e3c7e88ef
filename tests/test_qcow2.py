"""qcow2 headers: ours judged by qemu-img, others' judged by ours."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agent import qcow2
from tests.qemu_images import needs_qemu_img

pytestmark = needs_qemu_img

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

sizes = st.one_of(
    st.sampled_from((512, 65536, 512 * MIB - 512, 512 * MIB, 512 * MIB + 512, 64 * TIB)),
    st.integers(1, 64 * TIB // 512).map(lambda sectors: sectors * 512),
)


def qemu_img(*words: str | Path) -> dict[str, Any]:
    done = subprocess.run(["qemu-img", *words], check=True, capture_output=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def create_empty(path: Path, size: int) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)


def check(path: Path) -> None:
    answer = qemu_img("check", "--output=json", "-f", "qcow2", path)
    assert answer["check-errors"] == 0
    assert not {"corruptions", "leaks"} & answer.keys()


geometries = st.one_of(
    st.just(qcow2.DEFAULT_GEOMETRY),
    st.builds(
        lambda bits, extended: qcow2.Geometry(cluster_size=1 << bits, extended_l2=extended),
        st.integers(14, 21),
        st.booleans(),
    ),
)


@given(sizes, geometries, st.sampled_from(("raw", "qcow2")), st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_qemu_finds_nothing_wrong_with_an_overlay(
    tmp_path: Path, size: int, geometry: qcow2.Geometry, backing_format: str, depth: int
) -> None:
    assume(geometry.l1_entries(size) <= 1 << 22)
    directory = tmp_path.joinpath(*["d" * 100] * depth)
    directory.mkdir(parents=True, exist_ok=True)
    base, target = directory / "base", tmp_path / "disk"
    if backing_format == "raw":
        base.write_bytes(b"x" * 4096)
    else:
        create_empty(base, 4096)
    qcow2.create_overlay(
        target,
        virtual_size=size,
        backing_file=base,
        backing_format=backing_format,
        geometry=geometry,
    )
    check(target)
    info = qemu_img("info", "--output=json", "-f", "qcow2", target)
    assert info["virtual-size"] == size
    assert info["backing-filename"] == str(base)
    assert info["backing-filename-format"] == backing_format
    assert info["cluster-size"] == geometry.cluster_size
    assert info["format-specific"]["data"]["extended-l2"] is geometry.extended_l2
    assert target.stat().st_blocks * 512 <= 4 * 4096


def test_a_backing_name_of_1023_bytes_is_read_back_whole(tmp_path: Path) -> None:
    directory = tmp_path
    while len(str(directory)) < 800:
        directory /= "d" * 100
    directory /= "d" * (1023 - len(str(directory)) - len("//base"))
    directory.mkdir(parents=True)
    base = directory / "base"
    base.write_bytes(b"x" * 4096)
    assert len(str(base)) == 1023
    qcow2.create_overlay(
        tmp_path / "disk", virtual_size=4096, backing_file=base, backing_format="raw"
    )
    info = qemu_img("info", "--output=json", "-f", "qcow2", tmp_path / "disk")
    assert info["backing-filename"] == str(base)
    with pytest.raises(ValueError, match="1023 bytes"):
        qcow2.create_overlay(
            tmp_path / "other",
            virtual_size=4096,
            backing_file=Path(str(base) + "x"),
            backing_format="raw",
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "geometry",
    [
        qcow2.DEFAULT_GEOMETRY,
        qcow2.Geometry(cluster_size=128 << 10, extended_l2=True),
        qcow2.Geometry(cluster_size=4096),
    ],
    ids=str,
)
def test_an_overlay_shows_its_base_and_takes_writes(
    tmp_path: Path, geometry: qcow2.Geometry
) -> None:
    base, target, out = tmp_path / "base", tmp_path / "disk", tmp_path / "out"
    base.write_bytes(b"\x11" * MIB)
    qcow2.create_overlay(
        target,
        virtual_size=2 * MIB,
        backing_file=base,
        backing_format="raw",
        geometry=geometry,
        mode=0o600,
    )
    assert target.stat().st_mode & 0o777 == 0o600
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x22 4096 4096", target],
        check=True,
        capture_output=True,
    )
    check(target)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, out], check=True)
    expected = bytearray(b"\x11" * MIB + bytes(MIB))
    expected[4096:8192] = b"\x22" * 4096
    assert out.read_bytes() == expected
    assert base.read_bytes() == b"\x11" * MIB


def test_a_disk_too_large_for_its_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="larger clusters"):
        qcow2.create_overlay(
            tmp_path / "disk",
            virtual_size=64 * TIB,
            backing_file=tmp_path / "base",
            backing_format="raw",
            geometry=qcow2.Geometry(cluster_size=4096),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -512, 511, 513, 64 * TIB + 512])
def test_sizes_that_cannot_be_exact_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 512"):
        qcow2.create_overlay(
            tmp_path / "disk",
            virtual_size=size,
            backing_file=tmp_path / "base",
            backing_format="raw",
        )
    assert list(tmp_path.iterdir()) == []


_OPTIONS = (
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "compression_type=zstd",
    "refcount_bits=1",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "preallocation=metadata",
)
# With these the tables of a large disk take gigabytes, or QEMU refuses.
_SMALL_ONLY = ("cluster_size=512", "preallocation=metadata")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (options, size)
        for options in _OPTIONS
        for size in (512, 10 * MIB, 100 * GIB)
        if size < GIB or options not in _SMALL_ONLY
    ],
)
def test_whatever_qemu_makes_is_accepted(tmp_path: Path, options: str, size: int) -> None:
    path = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size)], check=True
    )
    with path.open("rb") as f:
        header = qcow2.parse_header(f.read(65536), path.stat().st_size)
    assert header.virtual_size == size
    assert header.extended_l2 == ("extended_l2" in options)
    assert header.compression == ("zstd" if "zstd" in options else "zlib")


def good_header(tmp_path: Path) -> bytearray:
    create_empty(tmp_path / "good", GIB)
    return bytearray((tmp_path / "good").read_bytes())


@pytest.mark.parametrize(
    ("at", "form", "value", "rule"),
    [
        (0, ">I", 0, "magic"),
        (4, ">I", 1, "version"),
        (4, ">I", 4, "version"),
        (8, ">Q", 104, "backing file .* byte 8"),
        (20, ">I", 8, "cluster_bits"),
        (20, ">I", 22, "cluster_bits"),
        (20, ">I", 63, "cluster_bits"),
        (24, ">Q", 0, "virtual size"),
        (24, ">Q", GIB + 1, "virtual size"),
        (24, ">Q", (1 << 63) - 1, "virtual size"),
        (24, ">Q", 1 << 63, "L1 entries"),
        (32, ">I", 1, "encryption"),
        (32, ">I", 2, "encryption"),
        (36, ">I", 1, "L1 entries"),
        (36, ">I", 0xFFFFFFFF, "L1 entries"),
        (40, ">Q", 0, "L1 table"),
        (40, ">Q", 3 * 65536 + 512, "L1 table"),
        (40, ">Q", 1 << 40, "L1 table .* beyond"),
        (40, ">Q", (1 << 64) - 65536, "L1 table .* beyond"),
        (48, ">Q", 0, "refcount table"),
        (48, ">Q", 1 << 40, "refcount table .* beyond"),
        (56, ">I", 0, "refcount clusters"),
        (56, ">I", 129, "refcount clusters"),
        (60, ">I", 65536, "snapshots"),
        (60, ">I", 1, "snapshot table"),
        (72, ">Q", 1 << 1, "corrupt"),
        (72, ">Q", 1 << 2, "external data file"),
        (72, ">Q", 1 << 3, "compression type"),
        (72, ">Q", 1 << 5, "unknown incompatible"),
        (72, ">Q", 1 << 63, "unknown incompatible"),
        (96, ">I", 7, "refcount_order"),
        (100, ">I", 0, "header_length"),
        (100, ">I", 103, "header_length"),
        (100, ">I", 0xFFFFFFFF, "header_length"),
        (104, ">B", 1, "compression type"),
        (112, ">II", (0x44415441, 8), "external data file"),
        (112, ">II", (0x12345678, 0xFFFFFFFF), "extension"),
    ],
)
def test_a_broken_header_is_refused_by_its_rule(
    tmp_path: Path, at: int, form: str, value: int | tuple[int, int], rule: str
) -> None:
    data = good_header(tmp_path)
    struct.pack_into(form, data, at, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(ValueError, match=rule):
        qcow2.parse_header(bytes(data), len(data))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_the_parser_stumble(tmp_path: Path, data: st.DataObject) -> None:
    header = good_header(tmp_path)
    for _ in range(data.draw(st.integers(1, 6))):
        header[data.draw(st.integers(4, 160))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(header)))
    try:
        parsed = qcow2.parse_header(bytes(header[:cut]), len(header))
    except ValueError:
        return
    assert parsed.virtual_size % 512 == 0
    assert parsed.l1_offset + parsed.l1_entries * 8 <= len(header)
