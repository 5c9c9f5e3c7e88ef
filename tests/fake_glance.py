"""The image API v2 on loopback: as much of Glance as an image source sees.

It answers as a real Glance does (no ETag, 416 without Content-Range, 404 for
what is not a UUID, errors in HTML) and misbehaves on request: each `Fault` is
used up by one request for image data, in order.
"""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

_PAGE = b"<html><head><title>error</title></head><body>It went wrong.</body></html>"

_SCHEMA = {
    "name": "image",
    "properties": {"id": {"type": "string"}, "name": {"type": ["null", "string"]}},
    "additionalProperties": {"type": "string"},
    "links": [],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What one answer does that it should not."""

    status: int | None = None
    """Answered in place of what was asked for."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = _PAGE
    content_type: str | None = "text/html; charset=UTF-8"
    refuse: bool = False
    """Reset the connection before answering."""
    cut_after: int | None = None
    """Body bytes, then the connection is closed."""
    reset: bool = False
    """Close with RST."""
    silent: bool = False
    """Say nothing at all until the client goes away, or the fake is closed."""
    stall_after: int | None = None
    """Body bytes, then silence until the client goes away."""
    drip: int | None = None
    """Body bytes at full speed, then one every 20 ms."""
    ignore_range: bool = False
    shift: int = 0
    """A range starts this many bytes later than asked for, and says so."""
    no_content_range: bool = False
    total: int | None = None
    """The size of the image that Content-Range speaks of."""
    chunked: bool = False
    extra: bytes = b""
    """Sent after the image's own bytes."""
    end_after: int | None = None
    """The answer is well formed and as short as this."""


@dataclass(kw_only=True, slots=True)
class Stored:
    record: dict[str, Any]
    data: bytes


class FakeGlance:
    """Runs from construction to `close`."""

    def __init__(self) -> None:
        self.images: dict[str, Stored] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range of each request for image data."""
        self.tokens: set[str] | None = None
        """Those accepted; None for all and none."""
        self.record_fault: Fault | None = None
        """Answered to every request for a record."""
        self.list_fault: Fault | None = None
        """Answered to every request for a list."""
        self.ahead_s = 0.0
        """How far its clock is."""
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.glance = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def store(self, data: bytes, *, image_id: str | None = None, **record: Any) -> str:
        image_id = image_id or str(uuid.uuid4())
        self.images[image_id] = Stored(
            record={
                "id": image_id,
                "name": "disk",
                "status": "active",
                "disk_format": "raw",
                "container_format": "bare",
                "size": len(data),
                "virtual_size": None,
                "min_disk": 0,
                "min_ram": 0,
                "checksum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
                "os_hash_algo": "sha512",
                "os_hash_value": hashlib.sha512(data).hexdigest(),
                "owner": None,
                "visibility": "shared",
                "protected": False,
                "os_hidden": False,
                "created_at": "2026-01-01T00:00:00Z",
                "updated_at": "2026-01-01T00:00:00Z",
                "tags": [],
                "file": f"/v2/images/{image_id}/file",
                "self": f"/v2/images/{image_id}",
                "schema": "/v2/schemas/image",
                "stores": "local",
            }
            | record,
            data=data,
        )
        return image_id


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    glance: FakeGlance

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what many tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 10
    wbufsize = 0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        glance = self.server.glance
        if glance.tokens is not None and self.headers.get("X-Auth-Token") not in glance.tokens:
            self._answer(401, _PAGE, {"WWW-Authenticate": 'Keystone uri="http://127.0.0.1"'})
        elif self.path == "/v2/schemas/image":
            self._json(_SCHEMA)
        elif self.path == "/v2/images?limit=1":
            self._list()
        elif match := re.fullmatch(r"/v2/images/([^/]+)", self.path):
            self._record(match[1])
        elif match := re.fullmatch(r"/v2/images/([^/]+)/file", self.path):
            self._file(match[1])
        else:
            self._answer(404, _PAGE)

    def _list(self) -> None:
        if fault := self.server.glance.list_fault:
            self._fault(fault)
        else:
            self._json({"images": [kept.record for kept in self.server.glance.images.values()][:1]})

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.server.glance.ahead_s)

    def _record(self, image_id: str) -> None:
        fault = self.server.glance.record_fault
        if fault is not None:
            self._fault(fault)
        elif image_id in self.server.glance.images:
            self._json(self.server.glance.images[image_id].record)
        else:
            self._answer(404, _PAGE)

    def _file(self, image_id: str) -> None:
        glance = self.server.glance
        with glance.lock:
            glance.requests.append((self.path, self.headers.get("Range")))
            fault = glance.faults.pop(0) if glance.faults else Fault()
        if fault.silent:
            self._be_silent()
            return
        if fault.status is not None or fault.refuse:
            self._fault(fault)
            return
        stored = glance.images.get(image_id)
        if stored is None:
            self._answer(404, _PAGE)
            return
        if stored.record["status"] == "deactivated":
            self._answer(403, _PAGE)
            return
        if stored.record["status"] != "active":
            self._answer(204, b"")
            return
        self._data(stored.data, fault)

    def _data(self, data: bytes, fault: Fault) -> None:
        start = 0
        end = len(data)
        status = 200
        headers = {"Content-Type": "application/octet-stream"} | fault.headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not fault.ignore_range:
            start = int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            if start >= len(data):
                self._answer(416, _PAGE)
                return
            start += fault.shift
            status = 206
            if not fault.no_content_range:
                total = len(data) if fault.total is None else fault.total
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        body = (data[start:end] + fault.extra)[: fault.end_after]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.drip is not None:
            self.wfile.write(body[: fault.drip])
            self._trickle(body[fault.drip :])
        elif fault.stall_after is not None:
            self.wfile.write(body[: fault.stall_after])
            self._be_silent()
        elif fault.cut_after is not None:
            self.wfile.write(body[: fault.cut_after])
            self._cut(fault.reset)
        else:
            self.wfile.write(body)

    def _trickle(self, body: bytes) -> None:
        for byte in body:
            if self.server.glance.stopping.wait(0.02):
                break
            self.wfile.write(bytes((byte,)))
        self.close_connection = True

    def _be_silent(self) -> None:
        self.connection.settimeout(0.05)
        while not self.server.glance.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    break
        self.close_connection = True

    def _cut(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def _fault(self, fault: Fault) -> None:
        if fault.refuse:
            self._cut(reset=True)
        else:
            assert fault.status is not None
            self._answer(fault.status, fault.body, fault.headers, fault.content_type)

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), content_type="application/json")

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        content_type: str | None = "text/html; charset=UTF-8",
    ) -> None:
        with contextlib.suppress(ValueError):
            status = HTTPStatus(status)
        self.send_response(status)
        if content_type is not None:
            self.send_header("Content-Type", content_type)
        self.send_header("X-Openstack-Request-Id", "req-5f0c6d7e")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 204:
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def fake_glance() -> Iterator[FakeGlance]:
    glance = FakeGlance()
    try:
        yield glance
    finally:
        glance.close()
