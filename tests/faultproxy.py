"""An HTTP proxy that does to requests what networks and servers do: errors, slowness, cut connections, flipped bits.

    with FaultProxy(server.port) as proxy:
        settings = S3Config(endpoint=proxy.endpoint, ...)
        with proxy.inject(Fault(FaultKind.ANSWER, status=503, methods=("PUT",), count=2)) as injected: ...
        proxy.inject(Fault(FaultKind.SLOW, bytes_per_s=1e6, path=r"rank0000\\d")); ...; proxy.clear()
        proxy.down(); ...; proxy.up()          # connections are refused meanwhile, and those there are cut

Faults may be switched at any time, and hold from the next request on. The first one that matches a request is done to
it. Requests pass unchanged but for `Expect`, which the proxy answers itself: signatures stay valid.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import msgspec

_PIECE_BYTES = 64 * 2**10
_BETWEEN_HOPS = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}


class FaultKind(enum.StrEnum):
    """What can be done to a request."""

    ANSWER = "answer"  # the proxy answers with `status`; the server never sees the request
    ANSWER_AFTER = "answer_after"  # the server carries it out, and the client is told `status`
    SLOW = "slow"  # bodies go at `bytes_per_s`, both ways
    CUT_REQUEST = "cut_request"  # the connection breaks after `after_bytes` of the request's body
    CUT_RESPONSE = "cut_response"  # ... of the answer's body; with 0, before a word of the answer
    FLIP = "flip"  # one bit of the answer's body at `after_bytes`, or in its last byte if it is shorter


class Fault(msgspec.Struct, frozen=True):
    """One fault and what it befalls: requests with one of `methods` (none: all), with a target (path and query) and
    head in which `path` and `header` (regular expressions, the latter for "name: value" lines) are found; of those a
    part `probability`, and `count` of them at most (None: no end)."""

    kind: FaultKind
    status: int = 500
    bytes_per_s: float = 100e3
    after_bytes: int = 0
    methods: tuple[str, ...] = ()
    path: str = ""
    header: str = ""
    probability: float = 1.0
    count: int | None = None

    def befalls(self, method: str, target: str, head: str) -> bool:
        """Whether it is meant for such a request, count and probability aside."""
        meant = not self.methods or method in self.methods
        return bool(meant and re.search(self.path, target) and re.search(self.header, head, re.I | re.M))


class Injected:
    """A fault in force. hits: how many requests it befell. Ends with `remove`, or as a context."""

    def __init__(self, proxy: FaultProxy, fault: Fault) -> None:
        self.fault = fault
        self.hits = 0
        self._proxy = proxy

    def remove(self) -> None:
        """End it; nothing if it has ended."""
        self._proxy.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


class FaultProxy:
    """A proxy on a free port of 127.0.0.1 (the same for its whole life) for a server on another one."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.server_port = port
        self.port = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._injected: list[Injected] = []
        self._listener: _Listener | None = None
        self._requests = 0

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> int:
        """How many requests have come in so far."""
        return self._requests

    def inject(self, fault: Fault) -> Injected:
        """Put a fault in force, after those that are."""
        injected = Injected(self, fault)
        with self._lock:
            self._injected.append(injected)
        return injected

    def remove(self, injected: Injected) -> None:
        """End one fault; nothing if it has ended."""
        with self._lock, contextlib.suppress(ValueError):
            self._injected.remove(injected)

    def clear(self) -> None:
        """End all faults."""
        with self._lock:
            self._injected.clear()

    def up(self) -> None:
        """Listen (again)."""
        assert self._listener is None, "already up"
        self._listener = _Listener(self)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), name="faultproxy", daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()
            listener.cut_all()

    def choose(self, method: str, target: str, head: str) -> Fault | None:
        """The fault for a request that has come in; it counts as hit."""
        with self._lock:
            self._requests += 1
            for injected in self._injected:
                fault = injected.fault
                spent = fault.count is not None and injected.hits >= fault.count
                if not spent and fault.befalls(method, target, head) and self._random.random() < fault.probability:
                    injected.hits += 1
                    return fault
        return None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.down()


class _CutError(Exception):
    """The connection shall break here."""


class _Listener(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", proxy.port), _Handler)

    def keep(self, connection: socket.socket) -> None:
        """Remember a connection, to be cut with all others."""
        with self._lock:
            self._open.add(connection)

    def forget(self, connection: socket.socket) -> None:
        """It has ended."""
        with self._lock:
            self._open.discard(connection)

    def cut_all(self) -> None:
        """Break every connection."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this is for: not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.keep(self.connection)

    def finish(self) -> None:
        self.server.forget(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        head = "".join(f"{name}: {value}\n" for name, value in self.headers.items())
        fault = self.server.proxy.choose(self.command, self.path, head)
        try:
            if fault is not None and fault.kind is FaultKind.ANSWER:
                for _ in self._request_body(None):
                    pass
                self._answer_error(fault.status)
            else:
                self._pass_on(fault)
        except (_CutError, OSError, http.client.HTTPException):
            self._cut()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _pass_on(self, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.server_port, timeout=120)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _BETWEEN_HOPS:
                    upstream.putheader(name, value)
            upstream.endheaders()
            for piece in self._request_body(fault):
                upstream.send(piece)
            answer = upstream.getresponse()
            if fault is not None and fault.kind is FaultKind.ANSWER_AFTER:
                answer.read()
                self._answer_error(fault.status)
            else:
                self._give_back(answer, fault)
        finally:
            upstream.close()

    def _request_body(self, fault: Fault | None) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        cut_after = fault.after_bytes if fault is not None and fault.kind is FaultKind.CUT_REQUEST else None
        done = 0
        while left > 0 or cut_after is not None:
            if cut_after is not None and (done >= cut_after or left == 0):
                raise _CutError
            wanted = min(left, _piece_bytes(fault), cut_after - done if cut_after is not None else left)
            piece = self.rfile.read(wanted)
            if not piece:
                raise _CutError
            _pace(fault, len(piece))
            yield piece
            done, left = done + len(piece), left - len(piece)

    def _give_back(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        cut_after = fault.after_bytes if fault is not None and fault.kind is FaultKind.CUT_RESPONSE else None
        if cut_after == 0:
            raise _CutError
        has_length = answer.getheader("Content-Length") is not None
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _BETWEEN_HOPS:
                self.send_header(name, value)
        if not has_length and answer.status >= 200 and answer.status not in (204, 304):
            self.send_header("Connection", "close")  # its end is the end of the body
            self.close_connection = True
        self.end_headers()
        self.wfile.flush()
        done = 0
        while piece := answer.read(_piece_bytes(fault)):
            last = has_length and answer.length == 0
            if fault is not None and fault.kind is FaultKind.FLIP:
                piece = _flipped(piece, fault.after_bytes - done, last)
            if cut_after is not None and done + len(piece) >= cut_after:
                self.wfile.write(piece[: cut_after - done])
                raise _CutError
            _pace(fault, len(piece))
            self.wfile.write(piece)
            done += len(piece)
        if cut_after is not None:
            raise _CutError

    def _answer_error(self, status: int) -> None:
        code = {500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}.get(status, "Injected")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected fault</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """Break the client's connection with a reset, as a machine that dies does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)


def _piece_bytes(fault: Fault | None) -> int:
    if fault is None or fault.kind is not FaultKind.SLOW:
        return _PIECE_BYTES
    return max(1, min(_PIECE_BYTES, int(fault.bytes_per_s / 20)))


def _pace(fault: Fault | None, size_bytes: int) -> None:
    if fault is not None and fault.kind is FaultKind.SLOW:
        time.sleep(size_bytes / fault.bytes_per_s)


def _flipped(piece: bytes, at: int, last: bool) -> bytes:
    """The piece with a bit flipped at `at` (counted from its start) if that lies in it, or is beyond the last piece."""
    at = min(at, len(piece) - 1) if last else at
    if not 0 <= at < len(piece):
        return piece
    return piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]
