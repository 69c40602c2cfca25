"""Serves a node's shards to other nodes and takes copies of theirs, over HTTP/1.1 with `checkpointing.transfer_auth`.

    GET, HEAD /shards/<generation>/<step>/<rank>    what `find` gives, from the first byte of Range on
    PUT       the same path, Content-Range bytes a-b/n    a part of a push; `bytes */n` and no body asks only

A PUT is answered with 201 when the whole shard has verified and is in place, and with 308 and the number of bytes that
are there when it is not complete. Refusals: 400 malformed, 401 not proven (no more than the number is said), 404 no
such shard, 409 an older generation or step, 416 no such range, 422 bytes that do not verify, 431 head too long, 503
busy, 507 no room.

A head has at most MAX_HEAD_BYTES, a body exactly the bytes that its proven head announced. A connection that has
proven nothing makes room for a new one when MAX_CONNECTIONS are open.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import io
import logging
import socket
import socketserver
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from checkpointing.copies import CopyRefusedError, CopyStore, Located, Refusal
from checkpointing.layout import ShardRef
from checkpointing.ratelimit import yield_to_training
from checkpointing.segment import Control
from checkpointing.transfer_auth import (
    CONTROL_HEADER,
    COUNTER_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    REASON_HEADER,
    RECEIVED_HEADER,
    AnswerHead,
    RequestHead,
    Session,
    check_key,
    new_nonce,
    parse_nonce,
)
from checkpointing.transfer_wire import (
    MAX_HEAD_BYTES,
    NONCE_PATH,
    RESUME_INCOMPLETE,
    Span,
    decode_control,
    encode_control,
    format_content_range,
    parse_content_range,
    parse_range,
    parse_shard_path,
)

logger = logging.getLogger("everstep.transfer")

MAX_CONNECTIONS = 256
_IDLE_S = 30.0
_POLL_S = 0.1
_CLOSE_S = 5.0
_BUFFER_BYTES = 2**16
_STATUS = {
    Refusal.OLD: HTTPStatus.CONFLICT,
    Refusal.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.CLOSED: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.NO_ROOM: HTTPStatus.INSUFFICIENT_STORAGE,
    Refusal.GAP: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    Refusal.DAMAGED: HTTPStatus.UNPROCESSABLE_ENTITY,
}


class TransferServer:
    """One node's server. find: called in the server's threads, for shards that are asked for."""

    def __init__(self, host: str, key: bytes, find: Callable[[ShardRef], Located | None], copies: CopyStore) -> None:
        self._host = host
        self._key = check_key(key)
        self._find = find
        self._copies = copies
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Listen on a free port, in daemon threads; returns the port. OSError if the host is not this machine's."""
        assert self._listener is None, "started twice"
        self._listener = _Listener(self._host, self._key, self._find, self._copies)
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(_POLL_S,), name="transfer", daemon=True
        )
        self._thread.start()
        return int(self._listener.server_address[1])

    def close(self) -> None:
        """Stop listening and cut connections under way."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener.cut_all()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, key: bytes, find: Callable[[ShardRef], Located | None], copies: CopyStore) -> None:
        self.key = key
        self.find = find
        self.copies = copies
        self._connections: dict[socket.socket, bool] = {}
        self._changed = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if len(self._connections) >= MAX_CONNECTIONS:
                stranger = next((held for held, proven in self._connections.items() if not proven), request)
                self._connections[stranger] = True  # so that it is not cut twice
                _cut(stranger)
            self._connections.setdefault(request, False)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._connections.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a transfer connection from %s failed", client_address)

    def proven(self, request: socket.socket) -> None:
        """The other end of this connection knows the key."""
        with self._changed:
            if request in self._connections:
                self._connections[request] = True

    def cut_all(self) -> None:
        with self._changed:
            for request in self._connections:
                _cut(request)
            self._changed.wait_for(lambda: not self._connections, _CLOSE_S)


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # its own thread has closed it
        request.shutdown(socket.SHUT_RDWR)


class _BoundedHeads(io.BufferedReader):
    """Reads bodies as they are, and no head that is longer than MAX_HEAD_BYTES."""

    head_left_bytes = MAX_HEAD_BYTES

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(self.head_left_bytes + 1)
        self.head_left_bytes -= len(line)
        if self.head_left_bytes < 0:
            raise http.client.LineTooLong("head")
        return line


class _Body:
    """Reads no further than a body goes."""

    def __init__(self, rfile: io.BufferedReader, size_bytes: int) -> None:
        self._rfile = rfile
        self.left_bytes = size_bytes

    def read_into(self, view: memoryview) -> int:
        count = self._rfile.readinto(view[: self.left_bytes])
        self.left_bytes -= count
        return count


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S
    disable_nagle_algorithm = True
    rbufsize = 0
    server: _Listener
    rfile: _BoundedHeads

    def setup(self) -> None:
        super().setup()
        yield_to_training(self.connection)
        self.rfile = _BoundedHeads(self.rfile, _BUFFER_BYTES)
        self._session: Session | None = None
        self._proof = ""

    def handle_one_request(self) -> None:
        """Answer one request; whatever is wrong with it, or with the connection, ends the connection quietly."""
        self.close_connection = True
        self._proof = ""
        self.rfile.head_left_bytes = MAX_HEAD_BYTES
        try:
            self.raw_requestline = self.rfile.readline()
            if self.raw_requestline and self.parse_request():
                self._serve()
        except http.client.LineTooLong:
            with contextlib.suppress(OSError):
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except OSError as error:
            logger.debug("a transfer connection ended: %s", error)
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also called by the base class, for heads that are no HTTP: the number, and no word more."""
        self.close_connection = True
        self._send(AnswerHead(status=int(code)))

    def log_message(self, format: str, *args: Any) -> None:
        """Strangers do not write in our log."""

    def handle_expect_100(self) -> bool:
        """Nobody of ours waits for it."""
        return True

    def _serve(self) -> None:
        if self._session is None:
            self._begin_session()
            return
        head = RequestHead(
            method=self.command,
            path=self.path,
            counter=self.headers.get(COUNTER_HEADER, ""),
            range=self.headers.get("Range", ""),
            content_range=self.headers.get("Content-Range", ""),
            content_length=self.headers.get("Content-Length", ""),
            control=self.headers.get(CONTROL_HEADER, ""),
        )
        proof = self.headers.get(PROOF_HEADER, "")
        if not self._session.admits(head, proof):
            self.send_error(HTTPStatus.UNAUTHORIZED)
            return
        self._proof = proof
        self.server.proven(self.connection)
        ref = parse_shard_path(head.path)
        if ref is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif head.method in ("GET", "HEAD"):
            self._give(head, ref)
        elif head.method == "PUT":
            self._take(head, ref)
        else:
            self.send_error(HTTPStatus.NOT_IMPLEMENTED)

    def _begin_session(self) -> None:
        theirs = parse_nonce(self.headers.get(NONCE_HEADER, ""))
        if self.command != "GET" or self.path != NONCE_PATH or theirs is None or "Content-Length" in self.headers:
            self.send_error(HTTPStatus.UNAUTHORIZED)
            return
        ours = new_nonce()
        self._session = Session(self.server.key, ours, theirs)
        self.send_response_only(HTTPStatus.OK)
        self.send_header(NONCE_HEADER, ours.hex())
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _give(self, head: RequestHead, ref: ShardRef) -> None:
        located = self.server.find(ref)
        if located is None or head.content_length not in ("", "0"):
            self._refuse(HTTPStatus.NOT_FOUND if located is None else HTTPStatus.BAD_REQUEST)
            return
        control = located.control
        try:
            span = parse_range(head.range, control.size_bytes)
        except ValueError as error:
            self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, str(error))
            return
        try:
            file = open(located.path, "rb", buffering=0)  # noqa: SIM115 - a file that is gone is a 404, not an error below
        except FileNotFoundError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file:
            answer = AnswerHead(
                status=HTTPStatus.PARTIAL_CONTENT if head.range else HTTPStatus.OK,
                content_length=str(span.end - span.start),
                content_range=format_content_range(span),
                control=encode_control(control),
            )
            self._send(answer)
            if head.method == "GET" and span.start < span.end:
                self._send_file(file, located.start_bytes + span.start, span.end - span.start)

    def _send_file(self, file: io.FileIO, start_bytes: int, size_bytes: int) -> None:
        sent = self.connection.sendfile(file, start_bytes, size_bytes)
        if sent != size_bytes:
            raise OSError(f"{Path(str(file.name)).name} ended early")

    def _take(self, head: RequestHead, ref: ShardRef) -> None:
        try:
            control = decode_control(head.control, ref)
            span = parse_content_range(head.content_range)
            if head.content_length != str(span.end - span.start) or span.total != control.size_bytes:
                raise ValueError("lengths do not agree")
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._receive(control, span)

    def _receive(self, control: Control, span: Span) -> None:
        body = _Body(self.rfile, span.end - span.start)
        cut = functools.partial(_cut, self.connection)
        try:
            received_bytes = self.server.copies.receive(control, span.start, span.end, body.read_into, cut)
        except CopyRefusedError as refused:
            self._refuse(_STATUS[refused.refusal], str(refused))
            return
        self.close_connection = self.close_connection or body.left_bytes > 0
        status = HTTPStatus.CREATED if received_bytes == control.size_bytes else RESUME_INCOMPLETE
        self._send(AnswerHead(status=status, received=str(received_bytes)))

    def _refuse(self, status: HTTPStatus, reason: str = "") -> None:
        """Say why and end the connection: a body may follow that nobody will read."""
        self.close_connection = True
        self._send(AnswerHead(status=status, reason=urllib.parse.quote(reason, safe=" ,:()/'")))

    def _send(self, answer: AnswerHead) -> None:
        self.send_response_only(answer.status)
        fields = {
            "Content-Length": answer.content_length,
            "Content-Range": answer.content_range,
            CONTROL_HEADER: answer.control,
            RECEIVED_HEADER: answer.received,
            REASON_HEADER: answer.reason,
        }
        if self._session is not None and self._proof:
            fields[PROOF_HEADER] = self._session.prove_answer(self._proof, answer)
        for name, value in fields.items():
            if value:
                self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
