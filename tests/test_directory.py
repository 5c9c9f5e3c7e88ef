import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.directory import DISK_FORMATS, DirectorySource
from agent.errors import (
    ImageCorrupt,
    ImageNotFound,
    ImageSourceUnavailable,
    InsufficientFreeSpace,
    InvalidJob,
)

DATA = b"kernel" * 1000


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    return DirectorySource(tmp_path / "images")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "images"


def read(source: DirectorySource, image_id: str) -> bytes:
    with contextlib.closing(source.open(source.get(image_id), 0)) as body:
        return b"".join(body)


def test_added_image_is_two_files_for_owner_and_group(
    source: DirectorySource, directory: Path
) -> None:
    image = source.add(
        [DATA[:10], b"", DATA[10:]],
        disk_format="aki",
        name="vmlinuz",
        properties={"os_distro": "debian"},
        image_id="debian-kernel",
    )
    assert image == source.get("debian-kernel")
    assert image.container_format == "aki"
    assert image.digest == ("sha512", hashlib.sha512(DATA).hexdigest())
    assert {path.name for path in directory.iterdir()} == {
        "debian-kernel.json",
        "debian-kernel.data",
    }
    assert (directory / "debian-kernel.data").read_bytes() == DATA
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert json.loads((directory / "debian-kernel.json").read_text())["version"] == 1


@pytest.mark.parametrize("disk_format", DISK_FORMATS)
def test_every_known_format(source: DirectorySource, disk_format: str) -> None:
    image = source.add([DATA], disk_format=disk_format, name="x")
    assert source.get(image.id).disk_format == disk_format


def test_unknown_format_is_refused_with_the_known_ones(
    source: DirectorySource, directory: Path
) -> None:
    with pytest.raises(InvalidJob, match=r"disk_format must be one of raw, qcow2.*ploop"):
        source.add([DATA], disk_format="ploop", name="x")
    assert not directory.exists()


@pytest.mark.parametrize("image_id", ["../x", "a/b", "", ".x", "-x", "x" * 129, "a..b"])
def test_no_id_leads_out_of_the_directory(
    source: DirectorySource, tmp_path: Path, image_id: str
) -> None:
    with pytest.raises(InvalidJob, match="must be an image id"):
        source.add([DATA], disk_format="raw", name="x", image_id=image_id)
    with pytest.raises(ImageNotFound):
        source.get(image_id)
    assert list(tmp_path.iterdir()) == []


def test_bytes_under_an_id_never_change(source: DirectorySource) -> None:
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    with pytest.raises(InvalidJob, match="there is an image one"):
        source.add([b"other"], disk_format="raw", name="x", image_id="one")
    assert read(source, "one") == DATA


def test_of_two_adds_of_one_id_one_wins_whole(source: DirectorySource, directory: Path) -> None:
    both_write = threading.Barrier(2)
    refused: list[InvalidJob] = []

    def add(data: bytes) -> None:
        def chunks() -> Iterator[bytes]:
            yield data
            both_write.wait(10)

        try:
            source.add(chunks(), disk_format="raw", name="x", image_id="one")
        except InvalidJob as e:
            refused.append(e)

    threads = [threading.Thread(target=add, args=(data,)) for data in (b"first", b"second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(refused) == 1
    image = source.get("one")
    data = read(source, "one")
    assert image.digest == ("sha512", hashlib.sha512(data).hexdigest())
    assert len(list(directory.iterdir())) == 2


def test_broken_off_upload_leaves_nothing(source: DirectorySource, directory: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield DATA
        raise ConnectionResetError(errno.ECONNRESET, "the client is gone")

    with pytest.raises(ConnectionResetError):
        source.add(chunks(), disk_format="raw", name="x")
    assert list(directory.iterdir()) == []


def test_full_disk_leaves_nothing_and_says_so(source: DirectorySource, directory: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield DATA
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InsufficientFreeSpace, match="adding the image"):
        source.add(chunks(), disk_format="raw", name="x")
    assert list(directory.iterdir()) == []


_KILLED_ADD = """
import os, sys
from pathlib import Path
from agent.directory import DirectorySource

def chunks():
    yield b"half"
    print("writing", flush=True)
    sys.stdin.read()
    yield b"never"

DirectorySource(Path(sys.argv[1])).add(chunks(), disk_format="raw", name="x", image_id="one")
"""


def test_killed_add_leaves_no_image_and_its_rest_is_swept(
    source: DirectorySource, directory: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED_ADD, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as adder:
        assert adder.stdout is not None
        assert adder.stdout.readline() == b"writing\n"
        source.sweep()
        assert len(list(directory.iterdir())) == 1, "swept from under a running add"
        adder.kill()
        adder.wait(10)
    assert source.list() == ()
    source.sweep()
    assert list(directory.iterdir()) == []
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    assert read(source, "one") == DATA


def test_data_without_record_is_no_image_and_gives_way(
    source: DirectorySource, directory: Path
) -> None:
    directory.mkdir()
    (directory / "one.data").write_bytes(b"from a crash")
    with pytest.raises(ImageNotFound):
        source.get("one")
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    assert read(source, "one") == DATA


@pytest.mark.parametrize("change", [b"", DATA + b"!", DATA[:-1]])
def test_changed_length_is_corrupt(source: DirectorySource, directory: Path, change: bytes) -> None:
    image = source.add([DATA], disk_format="raw", name="x", image_id="one")
    (directory / "one.data").write_bytes(change)
    with pytest.raises(ImageCorrupt, match=rf"{len(change)} bytes, its record says {len(DATA)}"):
        source.open(image, 0)


def test_symbolic_links_are_not_followed(
    source: DirectorySource, directory: Path, tmp_path: Path
) -> None:
    image = source.add([DATA], disk_format="raw", name="x", image_id="one")
    for suffix in ("data", "json"):
        (directory / f"one.{suffix}").rename(tmp_path / suffix)
        (directory / f"one.{suffix}").symlink_to(tmp_path / suffix)
    with pytest.raises(ImageCorrupt, match="link"):
        source.open(image, 0)
    with pytest.raises(ImageCorrupt, match="link"):
        source.get("one")


def test_a_fifo_does_not_block(source: DirectorySource, directory: Path) -> None:
    image = source.add([DATA], disk_format="raw", name="x", image_id="one")
    (directory / "one.data").unlink()
    os.mkfifo(directory / "one.data")
    with pytest.raises(ImageCorrupt):
        source.open(image, 0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "the whole"),
        ("[]", "the whole"),
        ('{"id": "one"}', "name"),
        (None, "version"),
    ],
)
def test_record_that_is_none(
    source: DirectorySource,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    wrong: str,
) -> None:
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    source.add([DATA], disk_format="raw", name="y", image_id="two")
    path = directory / "one.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"version": 2}) if text is None else text
    )
    with pytest.raises(ImageCorrupt, match=wrong):
        source.get("one")
    assert [image.id for image in source.list()] == ["two"]
    assert "one.json" in caplog.text


def test_record_may_ask_for_a_disk_and_memory(source: DirectorySource, directory: Path) -> None:
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    path = directory / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_disk": 1, "min_ram": 64}))
    assert (source.get("one").min_disk, source.get("one").min_ram) == (1, 64)


def test_record_of_another_image(source: DirectorySource, directory: Path) -> None:
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    (directory / "two.json").write_bytes((directory / "one.json").read_bytes())
    with pytest.raises(ImageCorrupt, match="is the record of image one"):
        source.get("two")


def test_an_image_taken_out_by_hand_is_gone_and_readers_finish(
    source: DirectorySource, directory: Path
) -> None:
    image = source.add([DATA], disk_format="raw", name="x", image_id="one")
    body = source.open(image, 0)
    (directory / "one.json").unlink()
    assert source.list() == ()
    with pytest.raises(ImageNotFound):
        source.get("one")
    (directory / "one.data").unlink()
    with pytest.raises(ImageNotFound):
        source.open(image, 0)
    assert b"".join(body) == DATA
    body.close()
    source.add([DATA], disk_format="raw", name="x", image_id="one")
    assert read(source, "one") == DATA


def test_list_is_in_order_and_empty_without_a_directory(source: DirectorySource) -> None:
    assert source.list() == ()
    for image_id in ("b", "a", "c"):
        source.add([DATA], disk_format="raw", name="x", image_id=image_id)
    assert [image.id for image in source.list()] == ["a", "b", "c"]


def test_closed_body_gives_no_more(source: DirectorySource) -> None:
    body = source.open(source.add([DATA], disk_format="raw", name="x"), 0)
    body.close()
    with pytest.raises(ImageSourceUnavailable):
        next(iter(body))
