"""What every image source must do; each implementation passes the same tests."""

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from agent.cancellation import Cancellation
from agent.directory import DirectorySource
from agent.errors import ImageNotFound
from agent.glance import GlanceSource
from agent.image import Image
from agent.transfer import ImageSource, RetryPolicy, Transfer
from tests.fake_glance import fake_glance

DATA = random.Random(1).randbytes((3 << 20) + 12345)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    source: ImageSource
    store: Callable[[bytes], str]
    remove: Callable[[str], None]


@pytest.fixture(params=["glance", "directory"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    if request.param == "directory":
        directory = DirectorySource(tmp_path / "images")

        def add(data: bytes) -> str:
            image = directory.add(
                [data], disk_format="raw", name="disk", properties={"os_distro": "debian"}
            )
            return image.id

        def take_out(image_id: str) -> None:
            for kind in ("json", "data"):
                (tmp_path / "images" / f"{image_id}.{kind}").unlink()

        yield Case(source=directory, store=add, remove=take_out)
        return
    with fake_glance() as glance:
        session = Session(auth=NoAuth(endpoint=glance.url), timeout=10)
        source = GlanceSource(session, endpoints=[glance.url], stall_timeout_s=10)

        def store(data: bytes) -> str:
            return glance.store(data, os_distro="debian")

        def remove(image_id: str) -> None:
            del glance.images[image_id]

        yield Case(source=source, store=store, remove=remove)
        session.session.close()


def read(source: ImageSource, image: Image, offset: int) -> bytes:
    body = source.open(image, offset)
    try:
        assert body.offset <= offset
        return b"".join(body)[offset - body.offset :]
    finally:
        body.close()


def test_record_says_what_was_stored(case: Case) -> None:
    image_id = case.store(DATA)
    image = case.source.get(image_id)
    assert image == Image(
        id=image_id,
        name="disk",
        source=case.source.name,
        status="active",
        disk_format="raw",
        container_format="bare",
        size=len(DATA),
        digest=("sha512", hashlib.sha512(DATA).hexdigest()),
        properties={"os_distro": "debian"},
    )


def test_whole_image(case: Case) -> None:
    image = case.source.get(case.store(DATA))
    assert read(case.source, image, 0) == DATA


@pytest.mark.parametrize("offset", [1, 4095, 1 << 20, len(DATA) - 1])
def test_rest_of_an_image(case: Case, offset: int) -> None:
    image = case.source.get(case.store(DATA))
    assert read(case.source, image, offset) == DATA[offset:]


def test_pieces_are_never_empty_nor_larger_than_a_mebibyte(case: Case) -> None:
    image = case.source.get(case.store(DATA))
    body = case.source.open(image, 0)
    assert all(0 < len(piece) <= 1 << 20 for piece in body)
    body.close()


def test_an_image_of_no_bytes(case: Case) -> None:
    image = case.source.get(case.store(b""))
    assert image.size == 0
    transfer = Transfer(case.source, image, 0, RetryPolicy(), Cancellation())
    assert list(transfer) == []


@pytest.mark.parametrize(
    "image_id",
    [
        "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1",
        "no-such-image",
        "",
        "../../etc/passwd",
        "a/../../b",
        "a?b",
        "a%2fb",
        ".hidden",
        "-option",
        "a\n",
        "a" * 129,
    ],
)
def test_no_such_image(case: Case, image_id: str) -> None:
    case.store(DATA)
    with pytest.raises(ImageNotFound):
        case.source.get(image_id)


def test_image_deleted_between_record_and_data(case: Case) -> None:
    image = case.source.get(case.store(DATA))
    case.remove(image.id)
    with pytest.raises(ImageNotFound):
        case.source.open(image, 0)


def test_body_may_be_closed_early_and_twice(case: Case) -> None:
    image = case.source.get(case.store(DATA))
    body = case.source.open(image, 0)
    next(iter(body))
    body.close()
    body.close()
    assert read(case.source, image, 0) == DATA


def test_threads_share_a_source(case: Case) -> None:
    image_id = case.store(DATA)
    digests: list[str] = []

    def fetch() -> None:
        image = case.source.get(image_id)
        digest = hashlib.sha512(read(case.source, image, 0))
        digests.append(digest.hexdigest())

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert digests == [hashlib.sha512(DATA).hexdigest()] * 4


def test_transfer_takes_up_where_the_caller_is(case: Case) -> None:
    image = case.source.get(case.store(DATA))
    transfer = Transfer(case.source, image, 100, RetryPolicy(), Cancellation())
    assert b"".join(transfer) == DATA[100:]
    assert transfer.received == len(DATA) - 100
    assert transfer.resumes == 0
