"""A client of the agent: each request of the API as a method.

Holds no state but the connection, and tries nothing again.
"""

import contextlib
import errno
import json
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from agent.report import ErrorReport, JobReport, Status
from agent.views import (
    COMPLETE_HEADER,
    AgentStatus,
    CacheStatus,
    ConsolePiece,
    Decision,
    Event,
    GcReport,
    ImageEntry,
    InstanceView,
    Verification,
)

M = TypeVar("M", bound=BaseModel)

_CONNECT_TIMEOUT_S: Final = 10.0

_TIMEOUT: Final = httpx.Timeout(60.0, connect=_CONNECT_TIMEOUT_S)

_CHUNK: Final = 1 << 20

_VERIFY_TIMEOUT_S: Final = 6 * 3600.0
"""A TiB takes half an hour to hash on a good day."""


class AgentUnavailable(Exception):
    """No agent answers; the message says why and what to do."""


class Refused(Exception):
    """The agent answered with an error."""

    def __init__(self, status: int, error: ErrorReport) -> None:
        super().__init__(status, error)
        self.status = status
        """Of HTTP."""
        self.error = error

    def __str__(self) -> str:
        return f"{self.error.code}: {self.error.message}"


class Client:
    """Not to be shared by threads. Every method raises `AgentUnavailable` and `Refused`."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        # No TLS is spoken on it. To load the host's certificate authorities, as httpx would do
        # all the same, takes 20 ms of each command.
        no_authorities = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(verify=no_authorities, uds=str(socket_path)),
            base_url="http://bootwright",
            timeout=_TIMEOUT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, document: Mapping[str, object]) -> JobReport:
        """Hand in a job."""
        body = json.dumps(document)
        return _read(JobReport, self._request("POST", "/v1/jobs", content=body))

    def jobs(self, status: Status | None = None) -> list[JobReport]:
        query = {} if status is None else {"status": status.value}
        return _read_list(JobReport, self._request("GET", "/v1/jobs", query), "jobs")

    def job(self, job_id: str) -> JobReport:
        return _read(JobReport, self._request("GET", f"/v1/jobs/{_quoted(job_id)}"))

    def wait(self, job_id: str, timeout_s: float) -> JobReport:
        """Return the job when it is final, or as it is after `timeout_s`."""
        response = self._request(
            "GET",
            f"/v1/jobs/{_quoted(job_id)}/wait",
            {"timeout": str(timeout_s)},
            timeout=_patient(read_s=timeout_s + 60.0),
        )
        return _read(JobReport, response)

    def cancel(self, job_id: str) -> JobReport:
        return _read(JobReport, self._request("DELETE", f"/v1/jobs/{_quoted(job_id)}"))

    def events(self, since: int = 0, job_id: str | None = None, *, follow: bool) -> Iterator[Event]:
        """Yield the events after `since`, of one job or of all; with `follow` without end."""
        query = {"since": str(since), "follow": str(follow).lower()}
        if job_id is not None:
            query["job"] = job_id
        with self._translated(), self._http.stream("GET", "/v1/events", params=query) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield Event.model_validate_json(line.removeprefix("data:"))

    def images(self) -> list[ImageEntry]:
        return _read_list(ImageEntry, self._request("GET", "/v1/images"), "images")

    def image(self, image_id: str) -> ImageEntry:
        return _read(ImageEntry, self._request("GET", f"/v1/images/{_quoted(image_id)}"))

    def remove_image(self, image_id: str) -> None:
        self._request("DELETE", f"/v1/images/{_quoted(image_id)}")

    def fetch_image(self, image_id: str) -> JobReport:
        return _read(JobReport, self._request("POST", f"/v1/images/{_quoted(image_id)}/fetch"))

    def why_image(self, image_id: str) -> Decision:
        return _read(Decision, self._request("GET", f"/v1/images/{_quoted(image_id)}/why"))

    def pin_image(self, image_id: str, seconds: float | None) -> ImageEntry:
        """Pin for so long; None for ever."""
        query = {} if seconds is None else {"seconds": str(seconds)}
        return _read(ImageEntry, self._request("PUT", f"/v1/images/{_quoted(image_id)}/pin", query))

    def unpin_image(self, image_id: str) -> ImageEntry:
        return _read(ImageEntry, self._request("DELETE", f"/v1/images/{_quoted(image_id)}/pin"))

    def verify_image(self, image_id: str) -> Verification:
        response = self._request(
            "POST",
            f"/v1/images/{_quoted(image_id)}/verify",
            timeout=_patient(read_s=_VERIFY_TIMEOUT_S),
        )
        return _read(Verification, response)

    def add_image(
        self,
        file: BinaryIO,
        *,
        disk_format: str,
        name: str | None,
        image_id: str | None,
        properties: Sequence[str],
    ) -> ImageEntry:
        """Send `file`, from where it stands to its end, as a new image."""
        given = {"disk_format": disk_format, "name": name, "id": image_id}
        query: dict[str, str | list[str]] = {k: v for k, v in given.items() if v is not None}
        query["property"] = list(properties)
        response = self._request(
            "POST",
            "/v1/images",
            query,
            content=iter(lambda: file.read(_CHUNK), b""),
            # The answer comes when the image is on the disk for good.
            timeout=_patient(read_s=3600.0),
        )
        return _read(ImageEntry, response)

    def cache(self) -> CacheStatus:
        return _read(CacheStatus, self._request("GET", "/v1/cache"))

    def gc(self, *, dry_run: bool) -> GcReport:
        response = self._request(
            "POST",
            "/v1/cache/gc",
            {"dry_run": str(dry_run).lower()},
            timeout=_patient(read_s=600.0),
        )
        return _read(GcReport, response)

    def instances(self) -> list[InstanceView]:
        return _read_list(InstanceView, self._request("GET", "/v1/instances"), "instances")

    def instance(self, name_or_uuid: str) -> InstanceView:
        path = f"/v1/instances/{_quoted(name_or_uuid)}"
        return _read(InstanceView, self._request("GET", path))

    def delete_instance(self, name_or_uuid: str) -> JobReport:
        path = f"/v1/instances/{_quoted(name_or_uuid)}"
        return _read(JobReport, self._request("DELETE", path))

    def console(self, name_or_uuid: str, offset: int = 0) -> ConsolePiece:
        """Return a piece of what is kept of a console, from byte `offset` on."""
        path = f"/v1/instances/{_quoted(name_or_uuid)}/console"
        response = self._request("GET", path, {"offset": str(offset)})
        return ConsolePiece(
            data=response.content,
            begins=response.headers.get("ETag", ""),
            complete=response.headers.get(COMPLETE_HEADER) != "false",
        )

    def status(self) -> AgentStatus:
        return _read(AgentStatus, self._request("GET", "/v1/status"))

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | list[str]] | None = None,
        *,
        content: str | Iterator[bytes] | None = None,
        timeout: httpx.Timeout = _TIMEOUT,
    ) -> httpx.Response:
        with self._translated():
            response = self._http.request(
                method, path, params=query, content=content, timeout=timeout
            )
        _check(response)
        return response

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        self._knock()
        try:
            yield
        except httpx.TimeoutException as e:
            raise AgentUnavailable(
                f"the agent at {self._socket_path} does not answer in time: look at its log "
                "(journalctl -u bootwright)"
            ) from e
        except httpx.TransportError as e:
            raise AgentUnavailable(
                f"the agent at {self._socket_path} broke off the connection ({e})"
            ) from e

    def _knock(self) -> None:
        """See whether anybody is there: httpx hides the reason, and leaves its socket open."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            try:
                probe.connect(str(self._socket_path))
            except OSError as e:
                raise AgentUnavailable(_why(e, self._socket_path)) from e


def _patient(read_s: float) -> httpx.Timeout:
    return httpx.Timeout(60.0, connect=_CONNECT_TIMEOUT_S, read=read_s)


def _quoted(name: str) -> str:
    # '.' and '..' would be taken for a way through the path.
    return quote(name, safe="") if name.strip(".") else "%2E" * len(name)


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        error = ErrorReport.model_validate(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        error = ErrorReport(
            code="InternalError",
            message=f"HTTP status {response.status_code} from what should be the agent",
            hint="is the socket the one of a bootwright agent?",
        )
    raise Refused(response.status_code, error)


def _read(model: type[M], response: httpx.Response) -> M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as e:
        raise _other_version(e) from e


def _read_list(model: type[M], response: httpx.Response, key: str) -> list[M]:
    try:
        # A type that is a value: pydantic takes it, mypy has no word for it.
        return TypeAdapter(dict[str, list[model]]).validate_json(  # type: ignore[valid-type]
            response.content
        )[key]
    except (ValidationError, KeyError) as e:
        raise _other_version(e) from e


def _other_version(error: Exception) -> AgentUnavailable:
    return AgentUnavailable(
        "the agent answers in words this command does not know: they are of different versions; "
        f"restart the agent after an upgrade ({error})"
    )


def _why(error: OSError, socket_path: Path) -> str:
    match error.errno:
        case errno.ENOENT:
            return (
                f"there is no agent at {socket_path}: start it with 'systemctl start bootwright', "
                "or name its socket with --socket"
            )
        case errno.ECONNREFUSED:
            return (
                f"the agent that made {socket_path} is gone: start it with "
                "'systemctl start bootwright', and see 'journalctl -u bootwright' for why it ended"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"permission denied on {socket_path}: run as root, or become a member of its "
                f"group ('ls -l {socket_path}' shows it) and log in again"
            )
        case _:
            return f"no connection to an agent at {socket_path}: {error}"
