"""An HTTP proxy on loopback that misbehaves on purpose.

    with FaultProxy(glance.url, [Fault(cut_after=10_000_000)]) as proxy:
        ...  # fetch from proxy.url: the first try breaks, the second works

The nth request whose path ends with `only` gets the nth fault; when they have run out, the rest
get `afterwards`. Everything else passes through, and every request is recorded. A connection is
for one request. A chunked body is refused with 411: images are uploaded to Glance itself.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Self
from urllib.parse import urlsplit

_BLOCK = 1 << 16
_UPSTREAM_TIMEOUT = 60.0
# They belong to one connection; the body that http.client hands out is no longer chunked.
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding"})
# Closing a socket that lingers for zero seconds sends RST in place of FIN.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A response made up by the proxy."""

    status: int
    body: bytes = b"<html>fault injected</html>"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/html"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong with one request; what is not given goes right.

    Offsets are bytes of the body of this response, so of the range in a ranged one.
    """

    cut_after: int | None = None  # Close the connection after so many bytes.
    reset: bool = False  # Close with RST, not FIN; clients lose what they had not read yet.
    stall_after: int | None = None  # Then send no more and keep the connection open.
    flip_at: int | None = None  # Flip the lowest bit of this byte.
    rate: float | None = None  # Bytes a second.
    refuse: bool = False  # Reset the connection in place of an answer.
    answer: Answer | None = None  # Answer this without asking the server.
    drop_length: bool = False  # No Content-Length: only the connection's end ends the body.
    ignore_range: bool = False  # Hide Range from the server, which sends a 200 with everything.
    content_range: str | None = None  # Say this in Content-Range, whatever is sent.


@dataclass(kw_only=True, slots=True)
class Exchange:
    """One request and what became of it."""

    method: str
    path: str  # As the client sent it, with the query.
    headers: Mapping[str, str]  # Their names are in lower case.
    fault: Fault = Fault()  # A rate may be changed while the body is sent.
    status: int | None = None  # None when there was no answer.
    sent: int = 0  # Body bytes handed to the client's socket, counted just before.

    @property
    def range(self) -> str | None:
        """The Range header, as sent."""
        return self.headers.get("range")


class FaultProxy:
    """A proxy in front of one server; a context manager that runs it in threads.

    Args:
        upstream: `http://host:port` of the server.
        faults: for the first requests that match.
        only: the end of the path, without the query, of the requests that faults are for.

    Attributes:
        url: of the proxy, without a slash at the end.
        faults: those still to come, used up from the front; may be replaced at any time.
        afterwards: the fault of matching requests once there are no more.
        exchanges: all requests so far, oldest first; those still running go on counting.
    """

    def __init__(self, upstream: str, faults: Iterable[Fault] = (), *, only: str = "/file") -> None:
        self.faults = list(faults)
        self.afterwards = Fault()
        self.exchanges: list[Exchange] = []
        self._only = only
        self._lock = Lock()
        self._server = _Server(urlsplit(upstream).netloc, self._begin)
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.cut_connections()
        self._server.server_close()
        self._thread.join()

    def hurry(self) -> None:
        """Let everything through at once from now on, also what is being sent slowly."""
        self.faults, self.afterwards = [], Fault()
        for exchange in self.exchanges:
            exchange.fault = replace(exchange.fault, rate=None)

    @property
    def matching(self) -> list[Exchange]:
        """The exchanges that faults are for."""
        return [exchange for exchange in self.exchanges if self._matches(exchange.path)]

    def _matches(self, path: str) -> bool:
        return path.partition("?")[0].endswith(self._only)

    def _begin(self, method: str, path: str, headers: Mapping[str, str]) -> Exchange:
        lower = {name.lower(): value for name, value in headers.items()}
        exchange = Exchange(method=method, path=path, headers=lower)
        with self._lock:
            if self._matches(path):
                faults = self.faults  # A test may replace the list just now.
                exchange.fault = faults.pop(0) if faults else self.afterwards
            self.exchanges.append(exchange)
        return exchange


class _Server(ThreadingHTTPServer):
    # server_close() then waits for the threads, whose connections have been cut.
    daemon_threads = False
    request_queue_size = 128

    def __init__(
        self, upstream: str, begin: Callable[[str, str, Mapping[str, str]], Exchange]
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.begin = begin
        self._open: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: object) -> None:
        # Without the shutdown() of the base class, which sends FIN where RST is wanted.
        assert isinstance(request, socket.socket)
        self._open.discard(request)
        request.close()

    def cut_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that go away are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing; `FaultProxy.exchanges` is the log."""

    def _serve(self) -> None:
        self.close_connection = True
        exchange = self.server.begin(self.command, self.path, dict(self.headers))
        fault = exchange.fault
        if "Transfer-Encoding" in self.headers:
            self._reply(exchange, Answer(status=411))
        elif fault.refuse:
            self._reset_on_close()
        elif fault.answer is not None:
            self._reply(exchange, fault.answer)
        else:
            self._relay(exchange)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _reply(self, exchange: Exchange, answer: Answer) -> None:
        exchange.status, exchange.sent = answer.status, len(answer.body)
        headers = {**answer.headers, "Content-Length": str(len(answer.body))}
        self._send_head(answer.status, "Fault", headers)
        self.wfile.write(answer.body)

    def _relay(self, exchange: Exchange) -> None:
        fault = exchange.fault
        upstream = HTTPConnection(self.server.upstream, timeout=_UPSTREAM_TIMEOUT)
        with contextlib.closing(upstream):
            try:
                response = self._ask(upstream, hide_range=fault.ignore_range)
            except (OSError, HTTPException):
                self._reset_on_close()  # The server is not there: nor are we.
                return
            exchange.status = response.status
            left_out = _HOP_BY_HOP | ({"content-length"} if fault.drop_length else set())
            headers = {name.lower(): value for name, value in response.getheaders()}
            headers = {name: value for name, value in headers.items() if name not in left_out}
            if fault.content_range is not None:
                headers["content-range"] = fault.content_range
            self._send_head(response.status, response.reason, headers)
            self._send_body(response, exchange)

    def _ask(self, upstream: HTTPConnection, *, hide_range: bool) -> HTTPResponse:
        # With the client's own Host, so that links in the answer lead through the proxy.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP and not (hide_range and name.lower() == "range"):
                upstream.putheader(name, value)
        upstream.endheaders(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
        return upstream.getresponse()

    def _send_head(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        self.send_response_only(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _send_body(self, response: HTTPResponse, exchange: Exchange) -> None:
        fault = exchange.fault
        started = time.monotonic()
        while block := response.read1(self._room(exchange)):
            at = -1 if fault.flip_at is None else fault.flip_at - exchange.sent
            if 0 <= at < len(block):
                block = block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]
            exchange.sent += len(block)
            self.wfile.write(block)
            if (rate := exchange.fault.rate) is not None:
                time.sleep(max(0.0, started + exchange.sent / rate - time.monotonic()))
        if exchange.sent == fault.stall_after:
            self.connection.recv(1)  # Until the client hangs up or the proxy is closed.
        elif exchange.sent == fault.cut_after and fault.reset:
            self._reset_on_close()

    def _room(self, exchange: Exchange) -> int:
        """Return how many bytes the next block may have; 0 where the body breaks off."""
        fault = exchange.fault
        # A slow body comes in twentieths of a second, not in bursts of whole blocks.
        block = _BLOCK if fault.rate is None else min(_BLOCK, max(1, int(fault.rate / 20)))
        ends = (end for end in (fault.cut_after, fault.stall_after) if end is not None)
        return min([block, *(end - exchange.sent for end in ends)])

    def _reset_on_close(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
