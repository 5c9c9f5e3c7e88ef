"""The qcow2 decoder: every byte as `qemu-img convert` has it, or a reason why not.

BOOTWRIGHT_DECODER_EXAMPLES says how many images each test makes (60).
"""

import contextlib
import dataclasses
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.qcow2_decoder import HEAD, MAX_EXTENTS, Decoder, Unsupported
from tests.qcow2_images import COMPRESSED, Image, Plan, build
from tests.qemu_images import needs_qemu_img

pytestmark = needs_qemu_img

KIB = 1 << 10
MIB = 1 << 20

many = settings(
    max_examples=int(os.environ.get("BOOTWRIGHT_DECODER_EXAMPLES", "60")),
    # Each example writes its files anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def qemu(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def converted(tmp_path: Path, data: bytes) -> bytes:
    image, raw = tmp_path / "image", tmp_path / "expected"
    image.write_bytes(data)
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


@contextlib.contextmanager
def decoding(
    tmp_path: Path, data: bytes, *, max_virtual_size: int = 64 << 40, max_extents: int = MAX_EXTENTS
) -> Iterator[Decoder]:
    with contextlib.closing(
        Decoder.begin(
            data[:HEAD],
            tmp_path / "target",
            tmp_path / "spill",
            size=len(data),
            max_virtual_size=max_virtual_size,
            max_extents=max_extents,
        )
    ) as decoder:
        yield decoder


def decoded(tmp_path: Path, data: bytes, step: int = MIB, max_extents: int = MAX_EXTENTS) -> bytes:
    with decoding(tmp_path, data, max_extents=max_extents) as decoder:
        for begin in range(0, len(data), step):
            decoder.feed(data[begin : begin + step])
        decoder.finish()
        assert (tmp_path / "target").stat().st_size == decoder.virtual_size
    assert (tmp_path / "spill").stat().st_size == len(data)
    return (tmp_path / "target").read_bytes()


def holes_are_kept(target: Path) -> bool:
    content = target.read_bytes()
    data = sum(any(content[at : at + 4096]) for at in range(0, len(content), 4096))
    # More than four extents do not fit into an inode of ext4: a block lists up to 340.
    tree = -(-data // 340)
    return target.stat().st_blocks * 512 <= (data + tree) * 4096


standard = st.builds(
    Plan,
    seed=st.integers(0, 1 << 32),
    version=st.just(3),
    cluster_bits=st.sampled_from((9, 9, 9, 10, 12)),
    sectors=st.integers(1, 600),
    compression=st.sampled_from(("zlib", "zstd")),
    tables=st.sampled_from(("anywhere", "first", "last")),
    ordered=st.booleans(),
    tight=st.booleans(),
    kinds=st.sampled_from(
        (
            ("hole", "zero", "reserved", "data", "packed", "zeros"),
            ("data",),
            ("packed",),
            ("hole", "packed"),
            ("data", "packed"),
        )
    ),
)
version_2 = st.builds(
    Plan,
    seed=st.integers(0, 1 << 32),
    version=st.just(2),
    sectors=st.integers(1, 600),
    tables=st.sampled_from(("anywhere", "first", "last")),
    kinds=st.just(("hole", "data", "packed", "zeros")),
)
large_clusters = st.builds(
    Plan,
    seed=st.integers(0, 1 << 32),
    cluster_bits=st.integers(14, 17),
    sectors=st.integers(1, 4000),
    compression=st.sampled_from(("zlib", "zstd")),
    extended_l2=st.booleans(),
    tables=st.sampled_from(("anywhere", "first", "last")),
)
plans = st.one_of(standard, version_2, large_clusters)
steps = st.sampled_from((1, 100, 511, 4096, 65536, MIB))


@given(plans, steps, st.sampled_from((1, 20, MAX_EXTENTS)))
@many
def test_any_order_of_clusters_gives_what_qemu_makes_of_it(
    tmp_path: Path, plan: Plan, step: int, max_extents: int
) -> None:
    image = build(plan)
    step = max(step, len(image.data) // 2000)
    assert decoded(tmp_path, image.data, step, max_extents) == converted(tmp_path, image.data)
    assert holes_are_kept(tmp_path / "target")


@given(plans, st.integers(0, 1 << 32), st.sampled_from((1, 20, MAX_EXTENTS)))
@many
def test_an_interrupted_decode_ends_as_an_undisturbed_one(
    tmp_path: Path, plan: Plan, seed: int, max_extents: int
) -> None:
    """Also when the bytes after the checkpoint were other ones before than they are now."""
    data = build(plan).data
    chance = random.Random(seed)
    target, spill = tmp_path / "target", tmp_path / "spill"
    decoder = Decoder.begin(data[:HEAD], target, spill, size=len(data), max_extents=max_extents)
    while decoder.offset < len(data):
        position = decoder.offset
        if position >= min(HEAD, len(data)) and chance.random() < 0.3:
            state = decoder.state()
            wrong = bytearray(data[position : position + chance.randrange(200_000)])
            for _ in range(chance.randrange(1, 10)):
                if wrong:
                    wrong[chance.randrange(len(wrong))] ^= 1 << chance.randrange(8)
            with contextlib.suppress(ValueError):
                decoder.feed(bytes(wrong))
                decoder.state()
            decoder.close()
            decoder = Decoder.resume(state, target, spill, max_extents=max_extents)
            assert decoder.offset == position
        decoder.feed(data[position : position + chance.choice((1000, 5000, 70_000))])
    decoder.finish()
    decoder.close()
    assert target.read_bytes() == converted(tmp_path, data)


operations = st.lists(
    st.tuples(
        st.sampled_from(("data", "data", "packed", "zero", "zero -u", "discard", "snapshot")),
        st.integers(0, 1 << 40),
        st.integers(1, 300 * KIB),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=10,
)


def commands(operation: tuple[str, int, int, int], size: int, cluster: int) -> list[str]:
    kind, offset, length, pattern = operation
    if kind == "packed":
        offset = offset % size // cluster * cluster
        length = min(cluster, size - offset)
        return ["-c", f"write -c -P {pattern} {offset} {length}"]
    offset = offset % size // 512 * 512
    length = min(-(-length // 512) * 512, size - offset)
    verb = {
        "data": f"write -P {pattern}",
        "zero": "write -z",
        "zero -u": "write -z -u",
        "discard": "discard",
    }
    return ["-c", f"{verb[kind]} {offset} {length}"]


@given(
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from((512, 4096, 65536, 65536, 262144, 2 * MIB)),
            "compat": st.sampled_from(("0.10", "1.1", "1.1")),
            "preallocation": st.sampled_from(("off", "metadata")),
            "lazy_refcounts": st.booleans(),
            "extended_l2": st.booleans(),
            "zstd": st.booleans(),
            "refcount_bits": st.sampled_from((1, 16, 64)),
        }
    ),
    st.integers(1, 24 * KIB),
    operations,
    st.sampled_from(("as it is", "convert", "convert -c", "resize")),
)
@many
def test_what_qemu_writes_is_decoded_as_qemu_does(
    tmp_path: Path,
    options: dict[str, int | str],
    sectors: int,
    steps_taken: list[tuple[str, int, int, int]],
    last: str,
) -> None:
    size, cluster = sectors * 512, int(options["cluster_size"])
    named = [f"cluster_size={cluster}", f"compat={options['compat']}"]
    if options["compat"] != "0.10":
        if options["extended_l2"] and 16 * KIB <= cluster <= 128 * KIB:
            named.append("extended_l2=on")
        if options["zstd"]:
            named.append("compression_type=zstd")
        named += [f"lazy_refcounts={'on' if options['lazy_refcounts'] else 'off'}"]
        named += [f"refcount_bits={options['refcount_bits']}"]
    image, other = tmp_path / "disk", tmp_path / "other"
    form = ",".join(named)
    created = f"{form},preallocation={options['preallocation']}"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", created, image, str(size))
    snapshots = options["refcount_bits"] != 1 or options["compat"] == "0.10"
    for number, step in enumerate(steps_taken):
        if step[0] != "snapshot":
            # It refuses some, such as compressed data where there is other data.
            with contextlib.suppress(subprocess.CalledProcessError):
                qemu("qemu-io", "-d", "unmap", "-f", "qcow2", *commands(step, size, cluster), image)
        elif snapshots:
            qemu("qemu-img", "snapshot", "-c", f"s{number}", image)
    if last == "resize" and "snapshot" not in {step[0] for step in steps_taken}:
        new = str(max(512, size // 2 // 512 * 512))
        qemu("qemu-img", "resize", "--shrink", "-f", "qcow2", image, new)
    elif last.startswith("convert"):
        compress = ["-c"] if last == "convert -c" else []
        flags = [*compress, "-f", "qcow2", "-O", "qcow2", "-o", form]
        qemu("qemu-img", "convert", *flags, image, other)
        image = other
    data = image.read_bytes()
    assert decoded(tmp_path, data) == converted(tmp_path, data)


@given(plans, st.integers(0, 1 << 32))
@many
def test_damaged_tables_give_an_error_or_what_qemu_gives(
    tmp_path: Path, plan: Plan, seed: int
) -> None:
    image = build(plan)
    data = bytearray(image.data)
    chance = random.Random(seed)
    places = [(0, 120), (image.l1, 64)] + [(at, 512) for at in image.l2.values()] * 4
    for _ in range(chance.randrange(1, 4)):
        begin, length = chance.choice(places)
        at = min(begin + chance.randrange(length), len(data) - 1)
        data[at] = chance.choice((data[at] ^ 1 << chance.randrange(8), 0, 255))
    begun = time.monotonic()
    damaged = bytes(data)
    try:
        with decoding(tmp_path, damaged, max_virtual_size=64 * MIB) as decoder:
            size = decoder.virtual_size
            with contextlib.ExitStack() as stack:
                stack.callback(lambda: check_length(tmp_path / "target", size))
                for begin in range(0, len(damaged), 5000):
                    decoder.feed(damaged[begin : begin + 5000])
                decoder.finish()
    except (ValueError, Unsupported):
        return
    finally:
        assert time.monotonic() - begun < 20
    with contextlib.suppress(subprocess.CalledProcessError):  # it may look at more than we do
        assert (tmp_path / "target").read_bytes() == converted(tmp_path, damaged)


def check_length(target: Path, size: int) -> None:
    assert target.stat().st_size == size


def replaced(image: Image, table: int, entry: int, word: int) -> bytes:
    data = bytearray(image.data)
    struct.pack_into(">Q", data, image.l2[table] + 8 * entry, word)
    return bytes(data)


def l2_word(image: Image, table: int, entry: int) -> int:
    word: int = struct.unpack_from(">Q", image.data, image.l2[table] + 8 * entry)[0]
    return word


PLAIN = Plan(seed=1, sectors=200, kinds=("data",), ordered=True, tables="first")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (1 << 63 | 0, "no place|not into"),
        (1 << 63 | 512 * 100_000, "not into the file"),
        (1 << 63 | 0x200 | 1 << 56, "reserved bits"),
        (1 << 63 | 0x200 | 2, "reserved bits"),
        (COMPRESSED | 512 * 100_000, "beyond the file"),
        (COMPRESSED | 0x10, "overlaps"),
    ],
)
def test_an_entry_that_points_nowhere_is_refused(tmp_path: Path, word: int, reason: str) -> None:
    data = replaced(build(PLAIN), 0, 3, word)
    with pytest.raises(ValueError, match=reason):
        decoded(tmp_path, data)


@pytest.mark.parametrize("what", ["l1", "refcounts", "l2", "data"])
@pytest.mark.parametrize("tables", ["first", "last"])
def test_data_in_something_else_is_refused(tmp_path: Path, what: str, tables: str) -> None:
    image = build(Plan(seed=1, sectors=200, kinds=("data",), tables=tables))
    offset = {
        "l1": image.l1,
        "refcounts": struct.unpack_from(">Q", image.data, 48)[0],
        "l2": image.l2[1],
        "data": l2_word(image, 1, 7) & (1 << 56) - 1,
    }[what]
    with pytest.raises(ValueError, match="overlaps"):
        decoded(tmp_path, replaced(image, 0, 3, offset | 1 << 63))


def test_an_l2_table_that_is_used_twice_is_refused(tmp_path: Path) -> None:
    image = build(PLAIN)
    data = bytearray(image.data)
    data[image.l1 + 8 : image.l1 + 16] = data[image.l1 : image.l1 + 8]
    with pytest.raises(ValueError, match="overlaps"):
        decoded(tmp_path, bytes(data))


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("payload", ["short", "long", "bomb", "garbage"])
def test_compressed_data_of_another_size_is_refused(
    tmp_path: Path, compression: str, payload: str
) -> None:
    import zlib

    from backports import zstd

    plan = Plan(seed=3, sectors=128, cluster_bits=16, kinds=("packed",), compression=compression)
    image = build(plan)
    offset = l2_word(image, 0, 0) & (1 << 54) - 1
    content = {
        "short": bytes(65535),
        "long": bytes(65537),
        "bomb": bytes(40 * MIB),
        "garbage": b"\xff" * 100,
    }[payload]
    stream = zlib.compressobj(wbits=-12)
    packed = (
        stream.compress(content) + stream.flush()
        if compression == "zlib"
        else zstd.compress(content)
    )
    if payload == "garbage":
        packed = content
    data = bytearray(image.data)
    data += bytes(-len(data) % 65536)
    begin = len(data)
    data += packed + bytes(512)
    sectors = (begin + len(packed) - 1) // 512 - begin // 512
    struct.pack_into(">Q", data, image.l2[0], COMPRESSED | sectors << 54 | begin)
    assert offset
    with pytest.raises(ValueError, match="is not a cluster of 65536 bytes"):
        decoded(tmp_path, bytes(data))


def test_a_zstd_frame_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    image = build(Plan(seed=3, sectors=128, cluster_bits=16, kinds=("data",), compression="zstd"))
    data = bytearray(image.data)
    data += bytes(-len(data) % 65536)
    begin = len(data)
    # Magic, no checksum nor size, a window of 1 GiB, and one raw block of 16 bytes.
    data += bytes.fromhex("28b52ffd00a0") + (16 << 3 | 1).to_bytes(3, "little") + bytes(512)
    struct.pack_into(">Q", data, image.l2[0], COMPRESSED | begin)
    with pytest.raises(ValueError, match="is not a cluster"):
        decoded(tmp_path, bytes(data))


def test_one_compressed_cluster_for_a_whole_disk_costs_no_more_than_the_disk(
    tmp_path: Path,
) -> None:
    image = build(Plan(seed=2, sectors=1024, kinds=("packed",), tables="first"))
    data = bytearray(image.data)
    word = l2_word(image, 0, 0)
    for table, at in image.l2.items():
        count = min(64, 1024 - 64 * table)
        struct.pack_into(f">{count}Q", data, at, *[word] * count)
    assert decoded(tmp_path, bytes(data)) == converted(tmp_path, bytes(data))


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    data = build(PLAIN).data
    with decoding(tmp_path, data) as decoder:
        decoder.feed(data[:-1])
        with pytest.raises(ValueError, match="ends after"):
            decoder.finish()
    with decoding(tmp_path, data) as decoder, pytest.raises(ValueError, match="goes on beyond"):
        decoder.feed(data + b"x")


def test_a_virtual_size_over_the_limit_leaves_no_file(tmp_path: Path) -> None:
    data = build(PLAIN).data
    with pytest.raises(ValueError, match="virtual size"):
        Decoder.begin(
            data[:HEAD], tmp_path / "t", tmp_path / "s", size=len(data), max_virtual_size=512
        )
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_for_memory_is_left_to_qemu(tmp_path: Path) -> None:
    data = build(PLAIN).data
    with pytest.raises(Unsupported, match="clusters of 512"):
        Decoder.begin(data[:HEAD], tmp_path / "t", tmp_path / "s", size=1 << 40)
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    data = build(PLAIN).data
    with decoding(tmp_path, data) as decoder:
        with pytest.raises(ValueError, match="nothing to go on from"):
            decoder.state()
        decoder.feed(data)
        state = decoder.state()
    files = tmp_path / "target", tmp_path / "spill"
    for wrong in (
        b"",
        b"{}",
        state.replace(b'"version":1', b'"version":2'),
        state.replace(b'"size":', b'"size":1'),
        state.replace(b'"claims":"e', b'"claims":"f'),
    ):
        with pytest.raises(ValueError, match=r"state|State|claims"):
            Decoder.resume(wrong, *files)
    with contextlib.closing(Decoder.resume(state, *files)) as decoder:
        decoder.finish()
    assert files[0].read_bytes() == converted(tmp_path, data)


def test_what_qemu_writes_is_hardly_spilled(tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(4096) * 256)
    for compress in ([], ["-c"]):
        qemu("qemu-img", "convert", *compress, "-f", "raw", "-O", "qcow2", raw, image)
        assert decoded(tmp_path, image.read_bytes()) == raw.read_bytes()
        assert (tmp_path / "spill").stat().st_blocks * 512 <= 512 * KIB


def test_compressed_data_that_has_gone_by_is_not_made_up(tmp_path: Path) -> None:
    """A table behind the data that points to what others have used up already."""
    plan = Plan(seed=0, sectors=128, kinds=("packed",), ordered=True)
    images = (build(dataclasses.replace(plan, seed=seed)) for seed in range(100))
    mask = (1 << 61) - 1
    image = next(
        image
        for image in images
        if image.l1 < image.l2[0] < l2_word(image, 0, 0) & mask < image.l2[1]
        and l2_word(image, 0, 9) & mask < image.l2[1]
    )
    reasons = []
    for entry in range(10):
        data = replaced(image, 1, 0, l2_word(image, 0, entry))
        try:
            assert decoded(tmp_path, data, 512) == converted(tmp_path, data)
        except ValueError as e:
            reasons.append(str(e))
    assert any("overlaps" in reason for reason in reasons)
