"""One client connection to a transfer server, and one shard on its way from there."""

from __future__ import annotations

import contextlib
import http.client
import io
import urllib.parse
from collections.abc import Callable, Iterator
from http import HTTPStatus

from checkpointing.checksum import Checksum
from checkpointing.incoming import write_at
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
    new_nonce,
    parse_nonce,
    same_proof,
)
from checkpointing.transfer_wire import NONCE_PATH, RESUME_INCOMPLETE, decode_control, parse_content_range

_TAKEN = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.CREATED, RESUME_INCOMPLETE)
_WORDS = {
    HTTPStatus.NOT_FOUND: "has no such shard",
    HTTPStatus.UNAUTHORIZED: "refused: it does not have this job's key, or is no transfer server of this job",
}


class TransferError(Exception):
    """A transfer failed for good; the message is one line with the peer's address and why."""


class CutError(Exception):
    """The connection broke or could not be made: worth another try."""


class Link:
    """A connection on which both ends have proven themselves, one request at a time."""

    def __init__(self, address: str, key: bytes, timeout_s: float) -> None:
        self.address = address
        self._connection = http.client.HTTPConnection(address, timeout=timeout_s)
        self._connection.auto_open = 0  # a new connection needs new nonces
        self._proof = ""
        self._response: http.client.HTTPResponse | None = None
        nonce = new_nonce()
        try:
            with _cuts():
                self._connection.connect()
                yield_to_training(self._connection.sock)
                self._connection.request("GET", NONCE_PATH, headers={NONCE_HEADER: nonce.hex()})
                response = self._connection.getresponse()
                response.read()
            theirs = parse_nonce(response.getheader(NONCE_HEADER, ""))
            if theirs is None:
                raise TransferError(f"{address}: {_WORDS[HTTPStatus.UNAUTHORIZED]}")
        except BaseException as error:
            self.close()
            if isinstance(error.__cause__, TimeoutError):  # a silence was waited for already
                raise TransferError(f"{address}: no answer within {timeout_s:g} s") from error
            raise
        self._session = Session(key, theirs, nonce)

    def next_counter(self) -> str:
        """For the head of the next request."""
        return self._session.next_counter()

    def send_head(self, head: RequestHead) -> None:
        """Send a request's head with its proof. CutError."""
        self._proof = self._session.prove_request(head)
        fields = {
            "Range": head.range,
            "Content-Range": head.content_range,
            "Content-Length": head.content_length,
            CONTROL_HEADER: head.control,
            COUNTER_HEADER: head.counter,
            PROOF_HEADER: self._proof,
        }
        with _cuts():
            self._connection.putrequest(head.method, head.path, skip_accept_encoding=True)
            for name, value in fields.items():
                if value:
                    self._connection.putheader(name, value)
            self._connection.endheaders()

    def send_file(self, source: io.FileIO, start_bytes: int, size_bytes: int) -> None:
        """Send a part of the body. CutError; TransferError if the file ends before it."""
        with _cuts():
            sent = self._connection.sock.sendfile(source, start_bytes, size_bytes)
        if sent != size_bytes:
            raise TransferError(f"{self.address}: the file to send has ended early")

    def answer(self) -> AnswerHead:
        """The answer to the request that was sent, proven. CutError; TransferError if it is a refusal or a forgery."""
        with _cuts():
            self._response = self._connection.getresponse()
            if self._response.length == 0:
                self._response.read()
        field = self._response.getheader
        head = AnswerHead(
            status=self._response.status,
            content_length=field("Content-Length", ""),
            content_range=field("Content-Range", ""),
            control=field(CONTROL_HEADER, ""),
            received=field(RECEIVED_HEADER, ""),
            reason=field(REASON_HEADER, ""),
        )
        if not same_proof(self._session.prove_answer(self._proof, head), field(PROOF_HEADER, "")):
            raise TransferError(f"{self.address}: {_WORDS[HTTPStatus.UNAUTHORIZED]} (status {head.status})")
        if head.status not in _TAKEN:
            words = urllib.parse.unquote(head.reason) or _WORDS.get(HTTPStatus(head.status), "refused")
            raise TransferError(f"{self.address}: {words} (status {head.status})")
        return head

    def read_into(self, view: memoryview) -> memoryview:
        """The next bytes of the answer's body, as many as `view` takes. CutError if there are fewer."""
        assert self._response is not None
        with _cuts():
            count = self._response.readinto(view)
        if count == 0:
            raise CutError("connection cut")
        return view[:count]

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._response is not None:
            self._response.close()
        self._connection.close()


class Download:
    """A shard that is being fetched into a file: how much of it is there, and what it should be.

    check: says in words what is wrong with the shard that the peer has, before any byte of it is read.
    """

    def __init__(
        self, address: str, ref: ShardRef, fd: int, start_bytes: int, check: Callable[[Control], str | None]
    ) -> None:
        self.ref = ref
        self.control: Control | None = None
        self.done_bytes = 0
        self._address = address
        self._fd = fd
        self._start_bytes = start_bytes
        self._check = check
        self._running = Checksum()

    def expect(self, answer: AnswerHead) -> None:
        """An answer that promises the rest. TransferError if it is not the rest of what came before."""
        try:
            control = decode_control(answer.control, self.ref)
            span = parse_content_range(answer.content_range)
        except ValueError as error:
            raise TransferError(f"{self._address}: sent no proper answer ({error})") from error
        if self.control is not None and control != self.control:
            raise TransferError(f"{self._address}: the shard was replaced by another while it was sent")
        if (span.start, span.end, span.total) != (self.done_bytes, control.size_bytes, control.size_bytes):
            raise TransferError(f"{self._address}: answered with another range than asked for")
        if problem := self._check(control):
            raise TransferError(f"{self._address}: {problem}")
        self.control = control

    def add(self, data: memoryview) -> None:
        """Write the next bytes. OSError if the file cannot be written."""
        write_at(self._fd, data, self._start_bytes + self.done_bytes)
        self._running.update(data)
        self.done_bytes += len(data)

    def verify(self) -> None:
        """TransferError unless all bytes together have the checksum that was promised."""
        if self.control is None or self._running.hex() != self.control.checksum:
            raise TransferError(f"{self._address}: the bytes that came do not have the shard's checksum")


def parse_size(text: str, at_most_bytes: int, address: str) -> int:
    """A size that an answer names. TransferError if it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) <= at_most_bytes):
        raise TransferError(f"{address}: sent no proper answer (received {text[:20]!r})")
    return int(text)


@contextlib.contextmanager
def _cuts() -> Iterator[None]:
    try:
        yield
    except http.client.HTTPException as error:
        raise CutError("connection cut" if isinstance(error, http.client.IncompleteRead) else repr(error)) from error
    except OSError as error:
        raise CutError(error.strerror or str(error) or type(error).__name__) from error
