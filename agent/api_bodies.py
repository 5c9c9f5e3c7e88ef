"""What comes with a request to the API: a job in JSON, the bytes of an image, its properties."""

import json
from collections.abc import Iterator, Sequence

import anyio.from_thread
from fastapi import Request

from agent.api_errors import BodyTooLarge
from agent.errors import InvalidJob


async def document(request: Request, limit: int) -> dict[str, object]:
    """Return the JSON object that is the request's body.

    Raises:
        InvalidJob: it is none, or has more than `limit` bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(
                f"the request has more than {limit} bytes", "no job needs as many; shorten it"
            )
    try:
        found = json.loads(bytes(body), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise InvalidJob(f"the request is not JSON: {e}", "send the job as one JSON object") from e
    if not isinstance(found, dict):
        raise InvalidJob(
            "the request is JSON, but not an object", "send the job as one JSON object"
        )
    return found


def chunks(request: Request) -> Iterator[bytes]:
    """The request's body for a thread that reads it piece by piece."""
    stream = request.stream()

    async def read() -> bytes | None:
        return await anext(stream, None)

    while (chunk := anyio.from_thread.run(read)) is not None:
        if chunk:
            yield chunk


def properties(pairs: Sequence[str]) -> dict[str, str]:
    """Return what was given as key=value. Raises: InvalidJob: one is not."""
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise InvalidJob(f"property {pair!r} is not key=value", "for example os_type=linux")
        found[key] = value
    return found


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object whose keys stand once: the last of two would win silently."""
    found: dict[str, object] = {}
    for key, value in pairs:
        key.encode()  # half a surrogate pair is a ValueError here, and a defect in an answer
        if key in found:
            raise ValueError(f"{key!r:.80} stands twice in one object")
        found[key] = value
    return found
