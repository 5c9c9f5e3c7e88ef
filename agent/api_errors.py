"""How an error becomes an answer of the API: its status, its body, its request id.

Nothing that is not meant for the caller gets out: a defect is logged with its
traceback and answered as InternalError.
"""

import logging
import re
import uuid
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent import logs
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    IdempotencyConflict,
    ImageNotFound,
    ImageSourceUnavailable,
    InstanceExists,
    InsufficientFreeSpace,
    InternalError,
    InvalidJob,
    NotFound,
)
from agent.report import ErrorReport

LOG = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "X-Openstack-Request-Id"

_REQUEST_ID: Final = re.compile(r"req-[A-Za-z0-9._-]{1,100}")

_RETRY_AFTER_S: Final = 5
"""How soon an agent that is being restarted is worth asking again."""


class Answer(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorReport


class BodyTooLarge(InvalidJob):
    """A request larger than any job may be."""

    @property
    def code(self) -> str:
        return InvalidJob.__name__


_STATUS: Final[dict[type[BootwrightError], int]] = {
    BodyTooLarge: 413,
    InvalidJob: 400,
    NotFound: 404,
    ImageNotFound: 404,
    IdempotencyConflict: 409,
    InstanceExists: 409,
    BackendError: 409,
    AgentStopping: 503,
    ImageSourceUnavailable: 503,
    InsufficientFreeSpace: 507,
}


def install(app: FastAPI) -> None:
    """Make every error of `app` an answer of the one form."""

    @app.exception_handler(BootwrightError)
    async def own(_request: Request, error: BootwrightError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        sentences = []
        for detail in error.errors():
            place, *path = detail["loc"]
            if place == "path":
                # What cannot be a name of anything is the name of nothing.
                return answer(NotFound(f"{request.url.path}: nothing here can have that name"))
            name = ".".join(map(str, path))
            sentences.append(f"{name}: {detail['msg'].removeprefix('Value error, ')}")
        return answer(InvalidJob("; ".join(sentences), "the API is described in /v1/openapi.json"))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: the API has no such request"
        return answer(NotFound(message, "see /v1/openapi.json"), error.status_code)

    app.add_middleware(_Outermost)


def answer(error: BootwrightError, status: int | None = None) -> JSONResponse:
    """Return the answer for `error`; the status is the one of its class unless given."""
    if status is None:
        status = next((_STATUS[c] for c in type(error).__mro__ if c in _STATUS), 500)
    report = ErrorReport(
        code=error.code, message=error.message, hint=error.hint, retriable=error.retriable
    )
    return JSONResponse(
        {"error": report.model_dump(mode="json", exclude={"phase"})},
        status_code=status,
        headers={"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None,
    )


class _Outermost:
    """Gives each request its id, in the log and in the answer, and catches defects."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4()}"
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        with logs.bind(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                LOG.debug("the caller of %s %s has gone", scope["method"], scope["path"])
            except Exception:  # whatever it is, the caller gets an answer and the log the traceback
                LOG.exception("%s %s failed: a defect", scope["method"], scope["path"])
                if begun:
                    return  # half an answer is out, the server closes the connection
                error = InternalError(
                    "the agent could not answer because of a defect of its own",
                    f"look for {request_id} in the agent's log",
                )
                await answer(error)(scope, receive, send_with_id)
