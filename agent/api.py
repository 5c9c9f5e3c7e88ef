"""The API: HTTP and JSON over whatever is behind `Service`.

Translates, and decides nothing: what a request means is the service's
business. Where it is served is the business of `agent.listener`. Every answer
that is no success is `{"error": {code, message, hint, retriable}}`.
"""

import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any, Final, ParamSpec, Protocol, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from agent import api_bodies, api_errors
from agent.job import HostName, ImageId, JobRequest, Uuid
from agent.report import JobReport, Status
from agent.views import (
    COMPLETE_HEADER,
    AgentStatus,
    CacheStatus,
    Check,
    ConsolePiece,
    Decision,
    Event,
    GcReport,
    ImageEntry,
    InstanceView,
    Verification,
)

P = ParamSpec("P")
R = TypeVar("R")

LARGEST_JOB: Final = 4 << 20
"""Bytes of a job's JSON: domain_xml may have 1 MiB, and JSON may double it and more."""

_LARGEST_NUMBER: Final = 2**63 - 1
"""The most that SQLite and the kernel can count to."""

_SLICE_S: Final = 2.0
"""The longest a thread waits in the service on behalf of one request.

Between two slices it is seen whether the caller has gone or the listener stops."""

_WAITERS: Final = 512
"""Threads that may wait at the same time for jobs and events.

Other requests have a pool of their own, so waiting never keeps them out."""


class Service(Protocol):
    """What the agent does for its callers. May be called from any number of threads.

    Raises errors of `agent.errors`; anything else is a defect.
    """

    def submit(self, document: dict[str, object], *, request_id: str) -> JobReport:
        """Accept a job. `request_id` counts if the document has none.

        It is no part of what is compared under one idempotency key.
        """

    def job(self, job_id: str) -> JobReport: ...

    def jobs(self, status: Status | None) -> Sequence[JobReport]: ...

    def wait(self, job_id: str, timeout_s: float) -> JobReport:
        """Return the job when it is final, or as it is after `timeout_s`."""

    def cancel(self, job_id: str) -> JobReport: ...

    def events(self, since: int, timeout_s: float) -> Sequence[Event]:
        """Return the events after `since`; if there are none, wait up to `timeout_s` for one."""

    def images(self) -> Sequence[ImageEntry]: ...

    def image(self, image_id: str) -> ImageEntry: ...

    def remove_image(self, image_id: str) -> None: ...

    def fetch_image(self, image_id: str, *, request_id: str) -> JobReport: ...

    def why_image(self, image_id: str) -> Decision:
        """Return what the next `gc` would do with an image's base, and why."""

    def pin_image(self, image_id: str, seconds: float | None) -> ImageEntry:
        """Keep an image's base for so long; None for ever."""

    def unpin_image(self, image_id: str) -> ImageEntry: ...

    def verify_image(self, image_id: str) -> Verification:
        """Read an image's base from end to end, however long that takes."""

    def add_image(
        self,
        chunks: Iterator[bytes],
        *,
        disk_format: str,
        name: str | None,
        image_id: str | None,
        properties: dict[str, str],
    ) -> ImageEntry:
        """Register what `chunks` yields as an image; they raise if the caller goes away."""

    def cache(self) -> CacheStatus: ...

    def gc(self, *, dry_run: bool) -> GcReport: ...

    def instances(self) -> Sequence[InstanceView]: ...

    def instance(self, name_or_uuid: str) -> InstanceView: ...

    def delete_instance(self, name_or_uuid: str, *, request_id: str) -> JobReport: ...

    def console(self, name_or_uuid: str, offset: int) -> ConsolePiece:
        """Return a piece of what is kept of the guest's console, from byte `offset` on."""

    def status(self) -> AgentStatus: ...

    def live(self) -> bool: ...

    def ready(self) -> Sequence[Check]: ...


class Jobs(BaseModel):
    jobs: tuple[JobReport, ...]


class Images(BaseModel):
    images: tuple[ImageEntry, ...]


class Instances(BaseModel):
    instances: tuple[InstanceView, ...]


class Checks(BaseModel):
    checks: tuple[Check, ...]


JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
ImagePath = Annotated[ImageId, Path()]
InstancePath = Annotated[Uuid | HostName, Path()]


class _Waiters:
    """Calls that may wait, in threads of their own."""

    def __init__(self) -> None:
        # A limiter belongs to an event loop, which there is none of yet.
        self._limiter: CapacityLimiter | None = None

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._limiter is None:
            self._limiter = CapacityLimiter(_WAITERS)
        call = functools.partial(function, *args, **kwargs)
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)


def create_app(service: Service) -> FastAPI:
    """Return the whole API on top of `service`."""
    app = _empty_app()
    waiters = _Waiters()
    _add_jobs(app, service, waiters)
    _add_events(app, service, waiters)
    _add_images(app, service, waiters)
    _add_instances(app, service)

    @app.get("/v1/cache")
    def cache() -> CacheStatus:
        return service.cache()

    @app.post("/v1/cache/gc")
    async def gc(*, dry_run: bool = False) -> GcReport:
        return await waiters.run(service.gc, dry_run=dry_run)

    @app.get("/v1/status")
    def status() -> AgentStatus:
        return service.status()

    _add_probes(app, service)
    return app


def create_metrics_app(service: Service) -> FastAPI:
    """Return what may be seen without any permission: /metrics, /healthz, /readyz."""
    app = _empty_app(schema_url=None)
    _add_probes(app, service)
    return app


def _empty_app(schema_url: str | None = "/v1/openapi.json") -> FastAPI:
    app = FastAPI(
        title="Bootwright",
        version="1",
        openapi_url=schema_url,
        docs_url=None,
        redoc_url=None,
        # With a default, FastAPI does not promise its own 422 any more.
        responses={"default": {"model": api_errors.Answer, "description": "Error"}},
    )
    # As FastAPI itself says to extend its schema.
    app.openapi = functools.partial(_openapi, app)  # type: ignore[method-assign]
    api_errors.install(app)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, with the job in it: the job is parsed by the service, not by FastAPI."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, job = models_json_schema(
        [(JobRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(job["$defs"])
    return schema


_JOB_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}}},
    }
}


def _add_jobs(app: FastAPI, service: Service, waiters: _Waiters) -> None:
    @app.post("/v1/jobs", status_code=202, openapi_extra=_JOB_BODY)
    async def submit(request: Request) -> JobReport:
        document = await api_bodies.document(request, LARGEST_JOB)
        accept = functools.partial(service.submit, document, request_id=request.state.request_id)
        return await anyio.to_thread.run_sync(accept)

    @app.get("/v1/jobs")
    def jobs(status: Status | None = None) -> Jobs:
        return Jobs(jobs=tuple(service.jobs(status)))

    @app.get("/v1/jobs/{job_id}")
    def job(job_id: JobId) -> JobReport:
        return service.job(job_id)

    @app.get("/v1/jobs/{job_id}/wait")
    async def wait(
        request: Request,
        job_id: JobId,
        timeout: Annotated[float, Query(ge=0, le=3600)] = 60.0,  # noqa: ASYNC109 - the name of the parameter in the URL
    ) -> JobReport:
        end = anyio.current_time() + timeout
        while True:
            left = max(0.0, end - anyio.current_time())
            report = await waiters.run(service.wait, job_id, min(left, _SLICE_S))
            if report.status.final or left <= _SLICE_S or await _ended(request):
                return report

    @app.delete("/v1/jobs/{job_id}", status_code=202)
    def cancel(job_id: JobId) -> JobReport:
        return service.cancel(job_id)


def _add_events(app: FastAPI, service: Service, waiters: _Waiters) -> None:
    @app.get("/v1/events", response_class=StreamingResponse)
    async def events(
        request: Request,
        since: Annotated[int, Query(ge=0, le=_LARGEST_NUMBER)] = 0,
        job: str | None = None,
        *,
        follow: bool = True,
        last_event_id: Annotated[int | None, Header(ge=0, le=_LARGEST_NUMBER)] = None,
    ) -> StreamingResponse:
        if job is not None:
            await anyio.to_thread.run_sync(service.job, job)  # or there is no such job

        async def stream() -> AsyncIterator[str]:
            position = since if last_event_id is None else last_event_id
            while not await _ended(request):
                news = await waiters.run(service.events, position, _SLICE_S if follow else 0.0)
                for event in news:
                    position = event.seq
                    if job is None or event.job_id == job:
                        yield f"id: {event.seq}\nevent: job\ndata: {event.model_dump_json()}\n\n"
                if not news:
                    if not follow:
                        return
                    yield ":\n\n"  # shows a caller that has gone, and proxies that we have not

        return StreamingResponse(
            stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


def _add_images(app: FastAPI, service: Service, waiters: _Waiters) -> None:
    @app.get("/v1/images")
    def images() -> Images:
        return Images(images=tuple(service.images()))

    @app.post("/v1/images", status_code=201)
    async def add_image(
        request: Request,
        disk_format: Annotated[str, Query(pattern=r"^[a-z0-9]{1,16}$")],
        name: Annotated[str | None, Query(max_length=255)] = None,
        id: ImageId | None = None,  # noqa: A002 - the name of the parameter in the URL
        # FastAPI copies the default for each request.
        property: Annotated[list[str], Query(max_length=128)] = [],  # noqa: A002, B006
    ) -> ImageEntry:
        add = functools.partial(
            service.add_image,
            api_bodies.chunks(request),
            disk_format=disk_format,
            name=name,
            image_id=id,
            properties=api_bodies.properties(property),
        )
        return await waiters.run(add)

    @app.get("/v1/images/{image_id}")
    def image(image_id: ImagePath) -> ImageEntry:
        return service.image(image_id)

    @app.delete("/v1/images/{image_id}", status_code=204)
    def remove_image(image_id: ImagePath) -> None:
        service.remove_image(image_id)

    @app.post("/v1/images/{image_id}/fetch", status_code=202)
    def fetch_image(request: Request, image_id: ImagePath) -> JobReport:
        return service.fetch_image(image_id, request_id=request.state.request_id)

    @app.get("/v1/images/{image_id}/why")
    def why_image(image_id: ImagePath) -> Decision:
        return service.why_image(image_id)

    @app.put("/v1/images/{image_id}/pin")
    def pin_image(
        image_id: ImagePath, seconds: Annotated[float | None, Query(gt=0, le=1e10)] = None
    ) -> ImageEntry:
        return service.pin_image(image_id, seconds)

    @app.delete("/v1/images/{image_id}/pin")
    def unpin_image(image_id: ImagePath) -> ImageEntry:
        return service.unpin_image(image_id)

    @app.post("/v1/images/{image_id}/verify")
    async def verify_image(image_id: ImagePath) -> Verification:
        return await waiters.run(service.verify_image, image_id)


def _add_instances(app: FastAPI, service: Service) -> None:
    @app.get("/v1/instances")
    def instances() -> Instances:
        return Instances(instances=tuple(service.instances()))

    @app.get("/v1/instances/{name_or_uuid}")
    def instance(name_or_uuid: InstancePath) -> InstanceView:
        return service.instance(name_or_uuid)

    @app.delete("/v1/instances/{name_or_uuid}", status_code=202)
    def delete_instance(request: Request, name_or_uuid: InstancePath) -> JobReport:
        return service.delete_instance(name_or_uuid, request_id=request.state.request_id)

    @app.get("/v1/instances/{name_or_uuid}/console", response_class=Response)
    def console(
        name_or_uuid: InstancePath,
        offset: Annotated[int, Query(ge=0, le=_LARGEST_NUMBER)] = 0,
    ) -> Response:
        piece = service.console(name_or_uuid, offset)
        headers = {
            "ETag": f'"{piece.begins}"',
            COMPLETE_HEADER: "true" if piece.complete else "false",
        }
        return Response(piece.data, media_type="text/plain", headers=headers)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    def healthz() -> JSONResponse:
        live = service.live()
        return JSONResponse({"live": live}, status_code=200 if live else 503)

    @app.get("/readyz", response_model=Checks)
    def readyz() -> JSONResponse:
        checks = Checks(checks=tuple(service.ready()))
        ready = all(check.ok for check in checks.checks)
        return JSONResponse(checks.model_dump(), status_code=200 if ready else 503)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def _ended(request: Request) -> bool:
    """Whether nobody waits for the answer any more, or the listener stops."""
    return request.app.state.stopping.is_set() or await request.is_disconnected()
