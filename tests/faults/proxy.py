"""A faulty network in front of the S3 server: an HTTP proxy that a test tells which requests go wrong, and how."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Fault(Enum):
    """What goes wrong with one request."""

    DROP = "dropped"  # the connection ends without an answer
    CUT = "cut"  # the answer ends half-way
    FLIP = "flipped"  # one bit of the answer's body is another
    SWALLOW = "swallowed"  # answered 200 and forgotten
    BUSY = "busy"  # 503 SlowDown


class Proxy(ThreadingHTTPServer):
    """Passes every request on, but for those `fault` names a fault for by method and path."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.fault: Callable[[str, str], Fault | None] = lambda *_: None
        self.faults = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    """A proxy that serves as long as the block lasts."""
    with Proxy(upstream) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def handle_expect_100(self) -> bool:
        """Let the client go on at once: written to a buffer alone, the leave would come with the answer."""
        ok = super().handle_expect_100()
        self.wfile.flush()
        return ok

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        self.server.faults += fault is not None
        if fault is Fault.DROP:
            self.close_connection = True
        elif fault is Fault.SWALLOW:
            self._answer(200, {"ETag": '"0"'}, b"")
        elif fault is Fault.BUSY:
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=10)
        # The Host the client signed goes along unchanged, or the signature would not fit.
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OURS}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        names = {name: value for name, value in answer.getheaders() if name.lower() not in _OURS}
        if fault is Fault.FLIP:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            # A store that errs does so in its checksums too.
            names = {name: value for name, value in names.items() if "checksum" not in name.lower()}
        self._answer(answer.status, names, content, cut=fault is Fault.CUT)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


_OURS = frozenset({"content-length", "transfer-encoding", "connection", "expect"})
