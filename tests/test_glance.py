"""What GlanceSource makes of Glance's answers, and of those of what stands before it."""

import logging
import random
import socket
from collections.abc import Callable, Iterator

import pytest
from keystoneauth1.identity import V3Password
from keystoneauth1.noauth import NoAuth
from keystoneauth1.plugin import BaseAuthPlugin
from keystoneauth1.session import Session

from agent.cancellation import Cancellation
from agent.errors import (
    BootwrightError,
    ImageNotActive,
    ImageNotAuthorized,
    ImageNotFound,
    ImageSourceUnavailable,
)
from agent.glance import GlanceSource
from agent.glance_errors import Declined
from agent.image import Image, require_active
from agent.transfer import RetryPolicy, Transfer
from tests.fake_glance import FakeGlance, Fault, fake_glance

DATA = random.Random(3).randbytes(300_000)


@pytest.fixture
def glance() -> Iterator[FakeGlance]:
    with fake_glance() as glance:
        yield glance


Make = Callable[..., GlanceSource]


@pytest.fixture
def source_at() -> Iterator[Make]:
    sessions: list[Session] = []

    def source_at(*endpoints: str, auth: BaseAuthPlugin | None = None) -> GlanceSource:
        session = Session(auth=auth or NoAuth(endpoint="http://127.0.0.1:1"), timeout=5)
        sessions.append(session)
        return GlanceSource(session, endpoints=endpoints, stall_timeout_s=5)

    yield source_at
    for session in sessions:
        session.session.close()


@pytest.fixture
def source(glance: FakeGlance, source_at: Make) -> GlanceSource:
    return source_at(glance.url)


def read(source: GlanceSource, image: Image) -> bytes:
    body = source.open(image, 0)
    try:
        return b"".join(body)
    finally:
        body.close()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# The record


def test_only_the_owners_own_strings_are_properties(
    glance: FakeGlance, source: GlanceSource
) -> None:
    image_id = glance.store(
        DATA,
        kernel_id="k",
        ramdisk_id="r",
        hw_disk_bus="virtio",
        odd=["not", "a", "string"],
        direct_url="file:///var/lib/glance/images/x",
        locations=[{"url": "file:///x", "metadata": {}}],
        min_disk=2,
        min_ram=512,
        virtual_size=1 << 30,
    )
    image = source.get(image_id)
    assert image.properties == {"kernel_id": "k", "ramdisk_id": "r", "hw_disk_bus": "virtio"}
    assert (image.kernel_id, image.ramdisk_id) == ("k", "r")
    assert (image.min_disk, image.min_ram, image.virtual_size) == (2, 512, 1 << 30)


@pytest.mark.parametrize(
    ("record", "digest"),
    [
        ({"os_hash_algo": "sha256", "os_hash_value": "AB"}, ("sha256", "ab")),
        ({"os_hash_algo": "SHA512", "os_hash_value": "ab"}, ("sha512", "ab")),
        ({"os_hash_algo": "whirlpool9", "os_hash_value": "ab", "checksum": "c"}, ("md5", "c")),
        ({"os_hash_algo": "shake_128", "os_hash_value": "ab", "checksum": "c"}, ("md5", "c")),
        ({"os_hash_algo": None, "os_hash_value": None, "checksum": "c"}, ("md5", "c")),
        ({"os_hash_algo": "sha512", "os_hash_value": None, "checksum": None}, None),
    ],
)
def test_digest_is_the_best_that_can_be_checked(
    glance: FakeGlance, source: GlanceSource, record: dict[str, str], digest: tuple[str, str]
) -> None:
    assert source.get(glance.store(DATA, **record)).digest == digest


@pytest.mark.parametrize(
    "status", ["queued", "saving", "importing", "deactivated", "killed", "deleted", "unheard-of"]
)
def test_inactive_image_has_a_record_but_may_not_be_used(
    glance: FakeGlance, source: GlanceSource, status: str
) -> None:
    image_id = glance.store(
        b"",
        status=status,
        name=None,
        disk_format=None,
        container_format=None,
        size=None,
        checksum=None,
        os_hash_algo=None,
        os_hash_value=None,
    )
    image = source.get(image_id)
    assert (image.status, image.name, image.disk_format, image.size) == (status, "", "", None)
    with pytest.raises(ImageNotActive, match=status) as caught:
        require_active(image)
    assert caught.value.hint


def test_active_image_may_be_used(glance: FakeGlance, source: GlanceSource) -> None:
    require_active(source.get(glance.store(DATA)))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=401), ImageNotAuthorized),
        (Fault(status=403), ImageNotAuthorized),
        (Fault(status=404), ImageNotFound),
        (Fault(status=400), Declined),
        (Fault(status=409), Declined),
        (Fault(status=429), ImageSourceUnavailable),
        (Fault(status=500), ImageSourceUnavailable),
        (Fault(status=503), ImageSourceUnavailable),
        (Fault(status=503, content_type=None), ImageSourceUnavailable),
        (Fault(status=502, body=b"\xff\xfe", content_type="text/plain"), ImageSourceUnavailable),
        (Fault(status=200), ImageSourceUnavailable),
        (Fault(status=200, body=b"{", content_type="application/json"), ImageSourceUnavailable),
        (Fault(status=200, body=b"[]", content_type="application/json"), ImageSourceUnavailable),
        (Fault(status=200, body=b"{}", content_type="application/json"), ImageSourceUnavailable),
        (
            Fault(status=200, body=b'{"id": "x", "status": 7}', content_type="application/json"),
            ImageSourceUnavailable,
        ),
        (
            Fault(
                status=200,
                body=b'{"id": "other", "status": "active"}',
                content_type="application/json",
            ),
            ImageSourceUnavailable,
        ),
        (Fault(refuse=True), ImageSourceUnavailable),
    ],
)
def test_answer_in_place_of_a_record(
    glance: FakeGlance, source: GlanceSource, fault: Fault, error: type[BootwrightError]
) -> None:
    glance.record_fault = fault
    with pytest.raises(error, match=f"image x at {glance.url}") as caught:
        source.get("x")
    assert caught.value.hint


# The bytes


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault(status=401), ImageNotAuthorized, "401 Unauthorized"),
        (Fault(status=403), ImageNotAuthorized, "deactivated"),
        (Fault(status=404), ImageNotFound, "404 Not Found"),
        (Fault(status=410), ImageNotFound, "410 Gone"),
        (Fault(status=204), ImageNotActive, "has no data"),
        (Fault(status=408), ImageSourceUnavailable, "408"),
        (Fault(status=425), ImageSourceUnavailable, "425"),
        (Fault(status=429), ImageSourceUnavailable, "limits requests"),
        (Fault(status=500), ImageSourceUnavailable, "500 Internal Server Error"),
        (Fault(status=504), ImageSourceUnavailable, "504"),
        (Fault(status=599), ImageSourceUnavailable, "599"),
        (Fault(status=200), ImageSourceUnavailable, "page"),
        (Fault(status=206, content_type="image/x"), ImageSourceUnavailable, "not asked for"),
        (Fault(status=302), ImageSourceUnavailable, "302"),
        (
            Fault(status=302, headers={"Location": "file:///etc/passwd"}),
            ImageSourceUnavailable,
            "away from HTTP",
        ),
        (Fault(headers={"Content-Encoding": "gzip"}), ImageSourceUnavailable, "gzip"),
        (Fault(refuse=True), ImageSourceUnavailable, "reset by peer|closed before"),
    ],
)
def test_answer_in_place_of_bytes(
    glance: FakeGlance,
    source: GlanceSource,
    fault: Fault,
    error: type[BootwrightError],
    says: str,
) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [fault]
    with pytest.raises(error, match=says) as caught:
        source.open(image, 0)
    assert f"image {image.id} at {glance.url}" in caught.value.message


def test_refusal_names_the_request_in_glances_log(glance: FakeGlance, source: GlanceSource) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(status=500)]
    with pytest.raises(ImageSourceUnavailable, match="req-5f0c6d7e in Glance's log"):
        source.open(image, 0)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("120", 120, 120),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
    ],
)
def test_retry_after_is_passed_on(
    glance: FakeGlance, source: GlanceSource, value: str, low: float, high: float
) -> None:
    image = source.get(glance.store(DATA))
    glance.faults = [Fault(status=503, headers={"Retry-After": value})]
    with pytest.raises(ImageSourceUnavailable) as caught:
        source.open(image, 0)
    assert caught.value.retry_after_s is not None
    assert low <= caught.value.retry_after_s <= high


def test_redirect_to_http_is_followed_and_a_circle_is_not(
    glance: FakeGlance, source: GlanceSource
) -> None:
    image = source.get(glance.store(DATA))
    here = Fault(status=302, headers={"Location": f"{glance.url}/v2/images/{image.id}/file"})
    glance.faults = [here]
    assert read(source, image) == DATA
    glance.faults = [here] * 10
    with pytest.raises(ImageSourceUnavailable, match="redirected more than 3 times"):
        source.open(image, 0)
    assert len(glance.faults) == 6


LED_AWAY = (
    # The same server by another name.
    "http://localhost:{port}/v2/images/{image}/file",
    "//localhost:{port}/v2/images/{image}/file",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://127.0.0.1.example.com/",
    "http://127.0.0.1@example.com/",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/",
)


@pytest.mark.parametrize("location", LED_AWAY)
def test_redirect_to_another_host_or_away_from_http_is_not_followed(
    location: str, glance: FakeGlance, source_at: Make
) -> None:
    glance.tokens = {"secret"}
    source = source_at(glance.url, auth=Renewable("secret"))
    image = source.get(glance.store(DATA))
    port = glance.url.rpartition(":")[2]
    away = Fault(status=307, headers={"Location": location.format(port=port, image=image.id)})
    glance.faults = [away]
    with pytest.raises(ImageSourceUnavailable, match=r"redirects to .*another host, or away from"):
        source.open(image, 0)
    assert len(glance.requests) == 1
    glance.record_fault = away
    with pytest.raises(ImageSourceUnavailable, match=r"redirects to .*another host, or away from"):
        source.get(image.id)


def test_old_endpoint_with_a_version_works(glance: FakeGlance, source_at: Make) -> None:
    source = source_at(f"{glance.url}/v2/")
    assert read(source, source.get(glance.store(DATA))) == DATA


def test_a_session_that_would_wait_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout"):
        GlanceSource(Session())


# Where Glance is


def test_nobody_listens(source_at: Make) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ImageSourceUnavailable, match=f"{url}: Connection refused") as caught:
        source_at(url).get("x")
    assert "reaches" in caught.value.hint


def test_host_is_unknown(source_at: Make) -> None:
    with pytest.raises(ImageSourceUnavailable, match=r"glance\.invalid"):
        source_at("http://glance.invalid:9292").get("x")


def test_secrets_in_a_url_stay_there(source_at: Make, caplog: pytest.LogCaptureFixture) -> None:
    source = source_at(f"http://user:hidden@127.0.0.1:{closed_port()}")
    with (
        caplog.at_level(logging.DEBUG, "agent"),
        pytest.raises(ImageSourceUnavailable, match=r"127\.0\.0\.1") as caught,
    ):
        source.get("x")
    assert "hidden" not in str(caught.value)
    assert "hidden" not in caplog.text


def test_endpoints_take_turns_when_one_fails(glance: FakeGlance, source_at: Make) -> None:
    source = source_at(f"http://127.0.0.1:{closed_port()}", glance.url)
    image_id = glance.store(DATA)
    with pytest.raises(ImageSourceUnavailable):
        source.get(image_id)
    image = source.get(image_id)
    assert read(source, image) == DATA


def test_transfer_goes_on_at_another_endpoint(glance: FakeGlance, source_at: Make) -> None:
    image_id = glance.store(DATA)
    with fake_glance() as twin:
        twin.store(DATA, image_id=image_id)
        source = source_at(glance.url, twin.url)
        image = source.get(image_id)
        glance.faults = [Fault(cut_after=100_000)]
        transfer = Transfer(
            source, image, 0, RetryPolicy(), Cancellation(), uniform=lambda _low, _high: 0
        )
        assert b"".join(transfer) == DATA
        assert [wanted for _path, wanted in glance.requests] == [None]
        assert [wanted for _path, wanted in twin.requests] == ["bytes=100000-"]


def test_catalog_knows_the_endpoint(glance: FakeGlance, source_at: Make) -> None:
    source = source_at(auth=NoAuth(endpoint=glance.url))
    assert read(source, source.get(glance.store(DATA))) == DATA


def test_catalog_without_glance(source_at: Make) -> None:
    with pytest.raises(ImageSourceUnavailable, match="no endpoint for 'image'") as caught:
        source_at(auth=NoAuth()).get("x")
    assert "region_name" in caught.value.hint


# Who we are


class Renewable(BaseAuthPlugin):
    """Tokens one after the other, as long as there are any."""

    def __init__(self, *tokens: str) -> None:
        super().__init__()
        self.tokens = list(tokens)

    def get_token(self, session: Session) -> str | None:  # noqa: ARG002
        return self.tokens[0]

    def invalidate(self) -> bool:
        if len(self.tokens) == 1:
            return False
        self.tokens.pop(0)
        return True


def test_expired_token_is_renewed(glance: FakeGlance, source_at: Make) -> None:
    glance.tokens = {"first", "third"}
    source = source_at(glance.url, auth=Renewable("first", "second", "third"))
    image = source.get(glance.store(DATA))
    glance.tokens = {"third"}
    with pytest.raises(ImageNotAuthorized):
        source.open(image, 0)  # "second" is no better, and one renewal is all
    assert read(source, image) == DATA


def test_glance_without_authentication(glance: FakeGlance) -> None:
    session = Session(timeout=5)
    source = GlanceSource(session, endpoints=[glance.url])
    assert read(source, source.get(glance.store(DATA))) == DATA
    session.session.close()


def test_refused_token(glance: FakeGlance, source_at: Make) -> None:
    glance.tokens = set()
    with pytest.raises(ImageNotAuthorized, match="401") as caught:
        source_at(glance.url, auth=Renewable("bad")).get("x")
    assert "bad" not in caught.value.message


def test_keystone_is_away(glance: FakeGlance, source_at: Make) -> None:
    auth = V3Password(
        auth_url=f"http://127.0.0.1:{closed_port()}/v3",
        username="u",
        password="hidden",
        user_domain_id="default",
    )
    with pytest.raises(ImageSourceUnavailable, match="Connection refused") as caught:
        source_at(glance.url, auth=auth).get("x")
    assert "hidden" not in str(caught.value)
    with pytest.raises(ImageSourceUnavailable, match="Connection refused") as caught:
        source_at(auth=auth).get("x")
    assert f"Keystone at {auth.auth_url}: " in caught.value.message
