"""The fault proxy does what its faults say, in front of a small server that knows ranges."""

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import requests

from functional.harness.fault_proxy import Answer, Fault, FaultProxy
from tests.waiting import AT_ONCE_S

BODY = bytes(range(256)) * 2000


class _Files(BaseHTTPRequestHandler):
    """Serves BODY at every path; `bytes=N-` is the only range it knows. PATCH echoes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            self.send_response(200)
            body = BODY
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
            body = BODY[start:]
        self._finish_with(body)

    def do_PATCH(self) -> None:
        self.send_response(200)
        self._finish_with(self.rfile.read(int(self.headers["Content-Length"])))

    def _finish_with(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing when the proxy hangs up early."""


@pytest.fixture
def upstream() -> Iterator[str]:
    with _Server(("127.0.0.1", 0), _Files) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


def fetch(proxy: FaultProxy, range_: str | None = None) -> requests.Response:
    headers = {} if range_ is None else {"Range": range_}
    return requests.get(f"{proxy.url}/image/file", headers=headers, timeout=10)


def received(proxy: FaultProxy) -> tuple[bytes, type[BaseException] | None]:
    """Read from a bare socket what the proxy sends, and how that ends."""
    host, port = proxy.url.removeprefix("http://").split(":")
    data = b""
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /image/file HTTP/1.1\r\nHost: test\r\n\r\n")
        try:
            while block := client.recv(65536):
                data += block
        except OSError as e:
            return data.partition(b"\r\n\r\n")[2], type(e)
    return data.partition(b"\r\n\r\n")[2], None


def test_without_faults_everything_passes(proxy: FaultProxy) -> None:
    whole, part = fetch(proxy), fetch(proxy, "bytes=511000-")
    patched = requests.patch(f"{proxy.url}/image", data=b"change", timeout=10)
    assert (whole.status_code, whole.content) == (200, BODY)
    assert (part.status_code, part.content) == (206, BODY[511000:])
    assert part.headers["Content-Range"] == "bytes 511000-511999/512000"
    assert patched.content == b"change"


def test_every_request_is_recorded(proxy: FaultProxy) -> None:
    fetch(proxy)
    fetch(proxy, "bytes=511000-")
    requests.get(f"{proxy.url}/image?x=1", timeout=10)
    assert [(e.method, e.path, e.range, e.status, e.sent) for e in proxy.exchanges] == [
        ("GET", "/image/file", None, 200, 512000),
        ("GET", "/image/file", "bytes=511000-", 206, 1000),
        ("GET", "/image?x=1", None, 200, 512000),
    ]
    assert len(proxy.matching) == 2


def test_each_fault_is_for_one_matching_request(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(answer=Answer(status=503)), Fault(answer=Answer(status=429))]
    other = requests.get(f"{proxy.url}/image", timeout=10)
    assert other.status_code == 200
    assert [fetch(proxy).status_code for _ in range(3)] == [503, 429, 200]
    assert proxy.faults == []


def test_the_fault_afterwards_stays(proxy: FaultProxy) -> None:
    proxy.afterwards = Fault(answer=Answer(status=503, body=b"", headers={"Retry-After": "1"}))
    answers = [fetch(proxy) for _ in range(2)]
    assert [(a.status_code, a.headers["Retry-After"]) for a in answers] == [(503, "1")] * 2
    proxy.afterwards = Fault()
    assert fetch(proxy).status_code == 200


@pytest.mark.parametrize("after", [0, 1, 65536, 100_001])
def test_cut_with_fin_delivers_exactly_so_much(proxy: FaultProxy, after: int) -> None:
    proxy.faults = [Fault(cut_after=after)]
    assert received(proxy) == (BODY[:after], None)
    assert proxy.matching[0].sent == after


def test_cut_with_reset_is_a_reset(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut_after=100_000, reset=True)]
    data, end = received(proxy)
    assert end is ConnectionResetError
    assert BODY[:100_000].startswith(data)


def test_refused_request_gets_no_answer(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(refuse=True)]
    assert received(proxy) == (b"", ConnectionResetError)
    assert proxy.matching[0].status is None


def test_stall_keeps_the_connection_open(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(stall_after=1000)]
    url = f"{proxy.url}/image/file"
    with requests.get(url, stream=True, timeout=0.3) as answer:
        assert answer.raw.read(1000) == BODY[:1000]
        with pytest.raises(requests.ConnectionError, match="timed out"):
            list(answer.iter_content(1))


def test_closing_the_proxy_ends_a_stall(upstream: str) -> None:
    with FaultProxy(upstream, [Fault(stall_after=1000)]) as proxy:
        answer = requests.get(f"{proxy.url}/image/file", stream=True, timeout=10)
    with answer, pytest.raises(requests.exceptions.ChunkedEncodingError):
        list(answer.iter_content(1000))


@pytest.mark.parametrize("at", [0, 65535, 65536, 511_999])
def test_one_bit_is_flipped(proxy: FaultProxy, at: int) -> None:
    proxy.faults = [Fault(flip_at=at)]
    content = fetch(proxy).content
    assert [i for i, (a, b) in enumerate(zip(content, BODY, strict=True)) if a != b] == [at]


def test_rate_is_kept(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(rate=2_000_000)]
    started = time.monotonic()
    assert fetch(proxy).content == BODY
    assert 0.2 < time.monotonic() - started < AT_ONCE_S


def test_dropped_length_hides_a_cut(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(drop_length=True, cut_after=1000)]
    answer = fetch(proxy)
    assert "Content-Length" not in answer.headers
    assert answer.content == BODY[:1000]


def test_ignored_range_is_a_plain_200(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(ignore_range=True)]
    answer = fetch(proxy, "bytes=1000-")
    assert (answer.status_code, answer.content) == (200, BODY)
    assert "Content-Range" not in answer.headers
    assert proxy.matching[0].range == "bytes=1000-"


def test_content_range_can_lie(proxy: FaultProxy) -> None:
    proxy.faults = [Fault(content_range="bytes 0-9/10")]
    answer = fetch(proxy, "bytes=1000-")
    assert answer.headers["Content-Range"] == "bytes 0-9/10"
    assert answer.content == BODY[1000:]


def test_chunked_request_is_refused(proxy: FaultProxy) -> None:
    answer = requests.put(f"{proxy.url}/image/file", data=iter([b"data"]), timeout=10)
    assert answer.status_code == 411


def test_dead_server_means_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(requests.ConnectionError):
        fetch(proxy)
