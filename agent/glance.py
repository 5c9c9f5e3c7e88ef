"""Glance as an image source: records by python-glanceclient, bytes by keystoneauth.

glanceclient knows how to find and read a record. It cannot be used for the
bytes: it percent-encodes the `Range` header (the answer is 416), never takes a
broken body up again, and hides the status of an answer it does not understand.
So the bytes come through the keystoneauth session that glanceclient itself
stands on, which renews an expired token and repeats the request.

Nothing is retried here and no hash is checked. Every foreign error leaves as
one of `agent.errors`: `ImageSourceUnavailable` for what may pass, else final.
"""

import contextlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypedDict, TypeVar, cast

import glanceclient
import requests
from keystoneauth1.adapter import Adapter
from keystoneauth1.session import Session
from pydantic import BaseModel

from agent.errors import ImageNotFound, ImageSourceUnavailable
from agent.glance_body import GlanceBody, has_no_ranges, offset_of, range_of
from agent.glance_errors import FOREIGN, clock, refusal, translated
from agent.glance_record import SOURCE, Copies, copies_of, image_of
from agent.image import Image
from agent.job import image_id as canonical_image_id

_T = TypeVar("_T")

_REDIRECTS = 3
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_NAME_THE_PLACE = "have endpoint_override, or Keystone's catalog, name the place where Glance is"


class _Images(Protocol):
    def get(self, image_id: str) -> Mapping[str, object]: ...
    def image_import(self, image_id: str, method: str, *, stores: list[str]) -> object: ...


class _Catalog(TypedDict):
    """What finds Glance in the service catalog."""

    service_type: str
    service_name: str | None
    interface: list[str] | None
    region_name: str | None


class _Client(Protocol):
    @property
    def images(self) -> _Images: ...


class _List(BaseModel):
    """The answer to a question for images."""

    images: list[object]


class GlanceSource:
    """An image source (agent/transfer.py) that may be shared by any number of threads."""

    name = SOURCE

    def __init__(
        self,
        session: Session,
        *,
        endpoints: Sequence[str] = (),
        service_type: str = "image",
        service_name: str | None = None,
        interfaces: Sequence[str] = (),
        region_name: str | None = None,
        stall_timeout_s: float = 60.0,
    ) -> None:
        """`session` has the credentials and must have a time-out.

        `endpoints`: URLs of one and the same Glance, used in turn when one
        fails; without any, the service catalog is asked. `stall_timeout_s`:
        the longest wait for the first byte of an answer, and for each further
        piece; the session's own time-out goes for connecting.

        Raises:
            ValueError: the session would wait for ever.
        """
        if session.timeout is None:
            raise ValueError("a session without a timeout waits for a silent Glance for ever")
        # Also for records and for Keystone, whose redirects keystoneauth follows itself.
        session.session.hooks["response"].append(_refuse_to_be_led_away)
        self._session = session
        self._catalog: _Catalog = {
            "service_type": service_type,
            "service_name": service_name,
            "interface": list(interfaces) or None,
            "region_name": region_name,
        }
        self._timeout = (session.timeout, stall_timeout_s)
        self._endpoints = tuple(_without_version(url) for url in endpoints)
        self._turn = 0
        self._clients: dict[str, _Client] = {}
        self._lock = threading.Lock()

    def get(self, image_id: str) -> Image:
        """Return the record of an image, whatever its status.

        Raises:
            ImageNotFound: there is none, or it is not for us.
            ImageNotAuthorized: Glance or Keystone refuses the credentials.
            ImageSourceUnavailable: no answer, or none that Glance would give.
        """
        # An id may come from a property of another image, where its owner can
        # write anything; it becomes a part of a URL.
        try:
            image_id = canonical_image_id(image_id)
        except ValueError as e:
            raise ImageNotFound(f"{image_id!r:.80} cannot be the id of an image: it {e}") from e
        return self._call("", image_id, lambda images: image_of(images.get(image_id), image_id))

    def copy(self, image_id: str, store: str) -> None:
        """Begin to copy an image to another store of this Glance.

        Raises:
            ImageNotAuthorized: it is not ours to ask for that.
            Declined: it may be there or on its way already.
            ImageError: as `get`.
        """
        self._call(
            f"copying to store {store} ",
            image_id,
            lambda images: images.image_import(image_id, "copy-image", stores=[store]),
        )

    def copies(self, image_id: str) -> Copies:
        """Return in which stores an image is, and on its way to; raises as `get`."""
        return self._call("", image_id, lambda images: copies_of(images.get(image_id), image_id))

    def _call(self, what: str, image_id: str, call: Callable[[_Images], _T]) -> _T:
        endpoint, turn = self._endpoint()
        with self._asking(turn, f"{what}image {image_id} at {_shown(endpoint)}"):
            return call(self._client(endpoint).images)

    def endpoints(self) -> tuple[str, ...]:
        """Return where Glance is, as configured or as the service catalog has it.

        Raises:
            ImageNotAuthorized, ImageSourceUnavailable: the catalog cannot be had.
        """
        return self._endpoints or (self._endpoint()[0],)

    def check(self, endpoint: str) -> float | None:
        """Ask one endpoint for a list of images; return its clock, seconds since the epoch.

        None if it does not tell the time.

        Raises:
            ImageNotAuthorized: Glance or Keystone refuses the credentials.
            ImageSourceUnavailable: no answer, or none that Glance would give.
        """
        what = f"the images at {_shown(endpoint)}"
        with self._asking(self._turn, what):
            response = self._session.get(
                f"{endpoint}/v2/images?limit=1",
                headers={"Accept": "application/json"},
                timeout=self._timeout,
                raise_exc=False,
                redirect=False,
            )
            if response.status_code in (404, 410):
                raise ImageSourceUnavailable(
                    f"{what}: {response.status_code}: there is no image API",
                    "check endpoint_override in [glance], or the endpoint in the service catalog",
                )
            if response.status_code != 200:
                raise refusal(response, what)
            _List.model_validate(response.json())
            return clock(response)

    def open(self, image: Image, offset: int, end: int | None = None) -> "GlanceBody":
        """Ask for the bytes from `offset` on, up to `end`.

        The body says where it really starts: a Glance whose store has no
        ranges sends the image from its beginning.

        Raises:
            ImageNotFound: the image has been deleted meanwhile.
            ImageNotActive: it has no data.
            ImageNotAuthorized: Glance or Keystone refuses the credentials.
            ImageCorrupt: Glance's data has another size than its record.
            ImageSourceUnavailable: no answer, or none that Glance would give.
        """
        endpoint, turn = self._endpoint()
        what = f"image {image.id} at {_shown(endpoint)}"

        def asking() -> contextlib.AbstractContextManager[None]:
            return self._asking(turn, what)

        with asking():
            response = self._request(endpoint, image, range_of(offset, end), what)
            if offset and end is None and has_no_ranges(response):
                response.close()
                response = self._request(endpoint, image, None, what)
            try:
                return GlanceBody(response, offset_of(response, image, what), what, asking)
            except BaseException:
                response.close()
                raise

    def _request(
        self, endpoint: str, image: Image, range_: str | None, what: str
    ) -> requests.Response:
        # A body may not come compressed: its bytes are what the hash is of,
        # and what the offsets count.
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        if range_ is not None:
            headers["Range"] = range_
        url = f"{endpoint}/v2/images/{image.id}/file"
        for _ in range(1 + _REDIRECTS):
            response = self._session.get(
                url,
                headers=headers,
                stream=True,
                timeout=self._timeout,
                raise_exc=False,
                # keystoneauth would leave the connection of each redirect open.
                redirect=False,
            )
            target = _redirected_to(response)
            if target is None:
                return response
            response.close()
            url = target
        raise ImageSourceUnavailable(
            f"{what}: redirected more than {_REDIRECTS} times", _NAME_THE_PLACE
        )

    def _endpoint(self) -> tuple[str, int]:
        turn = self._turn
        if self._endpoints:
            return self._endpoints[turn % len(self._endpoints)], turn
        # Every plugin that asks a Keystone has this; a fixed token or none has not.
        keystone = getattr(self._session.auth, "auth_url", None)
        where = f" at {_shown(keystone)}" if keystone else ""
        with self._asking(turn, f"Glance's endpoint in the catalog of Keystone{where}"):
            url = Adapter(self._session, **self._catalog).get_endpoint()
        if not url:
            raise ImageSourceUnavailable(
                f"the service catalog has no endpoint for {self._catalog['service_type']!r} "
                f"(region {self._catalog['region_name']}, interface {self._catalog['interface']})",
                "check region_name and valid_interfaces, or set endpoint_override in [glance]",
            )
        return _without_version(url), turn

    def _client(self, endpoint: str) -> _Client:
        # Kept, because a new one asks for the image schema first.
        with self._lock:
            if endpoint not in self._clients:
                self._clients[endpoint] = cast(
                    "_Client",
                    glanceclient.Client(
                        "2", session=self._session, endpoint_override=endpoint, **self._catalog
                    ),
                )
            return self._clients[endpoint]

    @contextlib.contextmanager
    def _asking(self, turn: int, what: str) -> Iterator[None]:
        """Translate what goes wrong; where another endpoint may do better, it is its turn."""
        try:
            yield
        except ImageSourceUnavailable:
            self._next_turn(turn)
            raise
        except _LedAway as e:
            self._next_turn(turn)
            raise ImageSourceUnavailable(f"{what}: {e}", _NAME_THE_PLACE) from e
        except FOREIGN as e:
            error = translated(e, what)
            if isinstance(error, ImageSourceUnavailable):
                self._next_turn(turn)
            raise error from e

    def _next_turn(self, turn: int) -> None:
        with self._lock:
            # Of many that failed at the same endpoint only the first one turns.
            if self._turn == turn:
                self._turn += 1


class _LedAway(Exception):
    """A redirect leads to where neither our token nor we ourselves have any business."""


def _refuse_to_be_led_away(response: requests.Response, **_: object) -> None:
    """Check each answer, before anybody follows where it leads.

    Whoever can redirect us could have us ask for anything in our name: another
    host would get the token, and there are hosts that answer only this one
    (169.254.169.254). One name for Glance and one for Keystone are enough.
    """
    target = _redirected_to(response)
    if target is None:
        return
    known, other = urllib.parse.urlsplit(response.url), urllib.parse.urlsplit(target)
    if known.hostname != other.hostname or other.scheme not in (known.scheme, "https"):
        response.close()
        raise _LedAway(
            f"{_shown(response.url)} redirects to {_shown(target)!r:.200}: to another host, or "
            "away from HTTP or TLS"
        )


def _redirected_to(response: requests.Response) -> str | None:
    location = response.headers.get("Location")
    if response.status_code not in _REDIRECT_STATUSES or location is None:
        return None
    return urllib.parse.urljoin(response.url, location)


def _without_version(url: str) -> str:
    """An endpoint without the `/v2` that old catalogs have at its end; each request adds it."""
    return re.sub(r"/v\d+(\.\d+)?$", "", url.rstrip("/"))


def _shown(url: str) -> str:
    """An endpoint for people: without the user and password a URL may hold."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")
    )
