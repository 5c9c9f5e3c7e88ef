"""The bytes of an image, as Glance answers with them: which part of it they are, and the body.

Where they are asked for, and what comes of errors, is `agent.glance`'s business.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import cast

import requests
import urllib3

from agent.errors import ImageCorrupt, ImageNotActive, ImageSourceUnavailable
from agent.glance_errors import refusal
from agent.image import Image

# One read hands out what has arrived, this much at most. Measured over
# loopback with pieces of 1 MiB: 1.2 to 1.8 GiB/s and 0.3 to 0.5 s of CPU a GiB
# for read1, read and stream alike, curl 1.3 GiB/s. Only read1 keeps what came
# before a break, and lets the time-out between two reads mean what it says.
_PIECE = 1 << 20


class GlanceBody:
    """The bytes of one answer; see `agent.transfer.Body`."""

    def __init__(
        self,
        response: requests.Response,
        offset: int,
        what: str,
        asking: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.offset = offset
        self._response = response
        self._raw = cast("urllib3.HTTPResponse", response.raw)
        self._what = what
        self._asking = asking
        self._reading = threading.Lock()
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._read():
            yield piece

    def _read(self) -> bytes:
        with self._asking(), self._reading:
            if self._closed:
                raise ImageSourceUnavailable(f"{self._what}: the transfer was given up")
            return self._raw.read1(_PIECE, decode_content=False)

    def close(self) -> None:
        # The order matters: closing a socket does not wake the thread that
        # waits in recv() on it, shutting it down does; and only when that
        # thread is out may the buffers under it be freed.
        self._closed = True
        # It may have been read to its end, its connection being back in the pool.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._raw.shutdown()
        with self._reading:
            self._response.close()


def range_of(offset: int, end: int | None) -> str | None:
    """Return the `Range` header that asks for the bytes from `offset` on, up to `end`."""
    if end is not None:
        return f"bytes={offset}-{end - 1}"
    return f"bytes={offset}-" if offset else None


def offset_of(response: requests.Response, image: Image, what: str) -> int:
    """Return where in the image the body of `response` starts.

    Raises:
        ImageError: it is no such body; see `GlanceSource.open`.
    """
    status = response.status_code
    content_type = response.headers.get("Content-Type", "").lower()
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if status == 204:
        raise ImageNotActive(
            f"{what} has no data (204 No Content), though its status was {image.status!r}",
            "its store has lost the data, or its upload is not done: upload the image anew",
        )
    if status not in (200, 206):
        raise refusal(response, what)
    if content_type.startswith(("text/html", "application/json")):
        raise ImageSourceUnavailable(
            f"{what}: the answer is a page ({content_type}), not the image",
            "a proxy or a login page answers in Glance's place: check endpoint_override",
        )
    if encoding != "identity":
        raise ImageSourceUnavailable(
            f"{what}: the answer is encoded ({encoding}), though that was not asked for",
            "a proxy before Glance compresses: have it leave image data alone",
        )
    if status == 200:
        return 0
    part = _content_range(response)
    if part is None:
        raise ImageSourceUnavailable(f"{what}: a partial answer (206) that was not asked for")
    start, total = part
    if total is not None and image.size is not None and total != image.size:
        raise ImageCorrupt(
            f"{what} has {total} bytes, its record says {image.size}",
            "the record or the data is damaged: upload the image anew",
        )
    return start


def has_no_ranges(response: requests.Response) -> bool:
    """Whether this is how a store answers that does not serve parts of an image."""
    # A 206 that does not say which part it is will not do either.
    return response.status_code in (400, 416) or (
        response.status_code == 206 and _content_range(response) is None
    )


def _content_range(response: requests.Response) -> tuple[int, int | None] | None:
    value = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", value)
    if match is None:
        return None
    return int(match[1]), None if match[2] == "*" else int(match[2])
