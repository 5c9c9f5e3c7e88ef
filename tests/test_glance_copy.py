"""Having Glance copy an image to Ceph; a real Glance does it in functional/test_rbd.py."""

from collections.abc import Iterator

import pytest

from agent.cancellation import Cancellation
from agent.errors import Cancelled, ImageError, ImageNotAuthorized, ImageSourceUnavailable
from agent.glance_copy import GlanceCopy
from agent.glance_errors import Declined
from agent.glance_record import Copies, copies_of
from agent.image import Image

ID = "3c3a21ed-8cd4-40ed-903a-cffe43cf5a53"


def record(stores: str = "local", running: str = "", failed: str = "") -> Copies:
    return copies_of(
        {
            "id": ID,
            "status": "active",
            "disk_format": "raw",
            "stores": stores,
            "os_glance_importing_to_stores": running,
            "os_glance_failed_import": failed,
            "os_distro": "debian",
        },
        ID,
    )


IMAGE = record().image


class Stores:
    """A Glance that answers as it is told; the last answer for ever."""

    def __init__(self, *records: Copies, refusal: Exception | None = None) -> None:
        self._records = list(records)
        self._refusal = refusal
        self.asked: list[tuple[str, str]] = []
        self.looks = 0

    def copy(self, image_id: str, store: str) -> None:
        self.asked.append((image_id, store))
        if self._refusal is not None:
            raise self._refusal

    def copies(self, image_id: str) -> Copies:
        assert image_id == ID
        self.looks += 1
        return self._records.pop(0) if len(self._records) > 1 else self._records[0]


def bring(
    stores: Stores,
    *,
    cached: bool = False,
    limit_s: float = 600,
    cancellation: Cancellation | None = None,
) -> bool:
    ticks: Iterator[float] = iter(range(1000))
    copy = GlanceCopy(
        stores,
        store="ceph",
        is_cached=lambda image_id: cached and image_id == ID,
        interval_s=0.001,
        limit_s=limit_s,
        clock=lambda: next(ticks),
    )
    copied = copy.bring(IMAGE, cancellation or Cancellation())
    assert copied in (None, IMAGE)
    return copied is not None


def test_copy_is_asked_for_and_waited_for() -> None:
    # Glance has accepted it, has not begun yet, is at it, has a part of it there, is done.
    stores = Stores(
        record(),
        record(running="ceph"),
        record(stores="local,ceph", running="ceph"),
        record(stores="local,ceph"),
    )
    assert bring(stores)
    assert stores.asked == [(ID, "ceph")]


@pytest.mark.parametrize("answer", [Declined("409 Conflict"), Declined("400 Bad Request")])
def test_copy_that_somebody_else_has_asked_for_is_waited_for(answer: Exception) -> None:
    assert bring(Stores(record(running="ceph"), record(stores="local,ceph"), refusal=answer))
    assert bring(Stores(record(stores="ceph,local"), refusal=answer))


@pytest.mark.parametrize("refusal", [Declined("409 Conflict"), ImageNotAuthorized("403 Forbidden")])
def test_refusal_is_told_and_no_error(
    refusal: ImageError, caplog: pytest.LogCaptureFixture
) -> None:
    assert not bring(Stores(record(), refusal=refusal))
    assert f"no copy of image {ID} in Glance's store ceph, so it is fetched: {refusal}" in (
        caplog.text
    )


def test_failed_copy_is_told_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    # What has failed before counts no longer once it is being copied again.
    assert bring(Stores(record(running="ceph", failed="ceph"), record(stores="local,ceph")))
    assert not bring(Stores(record(running="ceph"), record(failed="other,ceph")))
    assert "it has failed" in caplog.text


def test_copy_that_takes_too_long_is_told_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    assert not bring(Stores(record(running="ceph")), limit_s=5)
    assert "it is not done after 5 s" in caplog.text


def test_wait_for_a_copy_leaves_the_job_time_for_a_fetch(caplog: pytest.LogCaptureFixture) -> None:
    cancellation = Cancellation(20, clock=lambda: 0)
    assert not bring(Stores(record(running="ceph")), cancellation=cancellation)
    assert "it is not done after 10 s" in caplog.text


def test_image_in_the_cache_is_not_waited_for() -> None:
    stores = Stores(record(running="ceph"))
    assert not bring(stores, cached=True)
    assert (stores.asked, stores.looks) == ([], 0)


def test_glance_that_does_not_answer_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    stores = Stores(record(running="ceph"), refusal=ImageSourceUnavailable("no answer in time"))
    assert not bring(stores)
    assert stores.looks == 0
    assert "so it is fetched: no answer in time" in caplog.text


def test_failure_of_an_earlier_copy_counts_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    before = record(failed="ceph")
    assert bring(Stores(before, record(running="ceph"), record(stores="local,ceph")))
    assert not bring(Stores(before))
    assert "it has failed" in caplog.text


def test_wait_for_a_copy_ends_with_the_job() -> None:
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    copy = GlanceCopy(
        Stores(record(running="ceph")),
        store="ceph",
        is_cached=lambda _: False,
        interval_s=600,
        limit_s=600,
    )
    with pytest.raises(Cancelled):
        copy.bring(IMAGE, cancellation)


def test_what_glance_notes_of_copies_is_no_property_of_the_image() -> None:
    assert IMAGE.properties == {"os_distro": "debian"}
    assert isinstance(IMAGE, Image)
