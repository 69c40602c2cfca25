"""Who does not know the job's key gets nothing from a transfer server, and nobody can make it fall over or talk."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.transfer_auth import (
    CONTROL_HEADER,
    COUNTER_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    RequestHead,
    Session,
    new_nonce,
    parse_nonce,
)
from checkpointing.transfer_client import TransferClient, TransferError
from checkpointing.transfer_server import MAX_CONNECTIONS
from checkpointing.transfer_wire import encode_control, shard_path
from tests.transfer_helpers import KEY, Node, a_node, bytes_of, ref_of, shard_in


@pytest.fixture
def node(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Node]:
    """A node with one shard; whatever a test does to it, it says nothing and still works afterwards."""
    caplog.set_level(logging.INFO)
    with a_node(tmp_path) as made:
        shard = shard_in(tmp_path, 1000)
        made.shards[ref_of(shard)] = shard
        yield made
        with contextlib.closing(TransferClient(KEY)) as client:
            client.fetch(made.address, ref_of(shard), tmp_path / "after", 0)
        assert (tmp_path / "after").read_bytes() == bytes_of(shard)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


class Speaker:
    """A connection whose every request a test makes by hand."""

    def __init__(self, node: Node, key: bytes = KEY) -> None:
        self.connection = http.client.HTTPConnection(node.address, timeout=5)
        nonce = new_nonce()
        self.connection.request("GET", "/nonce", headers={NONCE_HEADER: nonce.hex()})
        theirs = parse_nonce(self.read().getheader(NONCE_HEADER, ""))
        assert theirs is not None
        self.connection.auto_open = 0
        self.session = Session(key, theirs, nonce)

    def read(self) -> http.client.HTTPResponse:
        response = self.connection.getresponse()
        self.body = response.read()
        return response

    def head(self, node: Node, **more: str) -> RequestHead:
        (ref,) = node.shards
        given = {"method": "GET", "path": shard_path(ref), "counter": self.session.next_counter(), **more}
        return RequestHead(**given)

    def status(self, head: RequestHead, proof: str | None = None, **tampered: str) -> int:
        """Send it, with what `tampered` puts in place of the proven fields; the number that comes back."""
        fields = {
            "Range": head.range,
            "Content-Range": head.content_range,
            "Content-Length": head.content_length,
            CONTROL_HEADER: head.control,
            COUNTER_HEADER: head.counter,
            PROOF_HEADER: self.session.prove_request(head) if proof is None else proof,
        }
        fields.update({name.replace("_", "-"): value for name, value in tampered.items()})
        path, method = fields.pop("path", head.path), fields.pop("method", head.method)
        self.connection.request(method, path, None, {name: value for name, value in fields.items() if value})
        return self.read().status


@pytest.fixture
def speaker(node: Node) -> Iterator[Speaker]:
    made = Speaker(node)
    yield made
    made.connection.close()


def test_the_wrong_key_is_refused(node: Node, tmp_path: Path) -> None:
    with contextlib.closing(TransferClient(bytes(32))) as stranger:
        shard = next(iter(node.shards.values()))
        with pytest.raises(TransferError, match=rf"{node.address}: refused.*key"):
            stranger.fetch(node.address, ref_of(shard), tmp_path / "into", 0)
        with pytest.raises(TransferError, match=r"refused.*key"):
            stranger.push(node.address, shard)
    assert (tmp_path / "into").read_bytes() == b""
    assert node.copies.held() == []
    with pytest.raises(ValueError, match="32 random"):
        TransferClient(b"short")


def test_a_server_that_does_not_know_the_key_is_not_believed(tmp_path: Path) -> None:
    """It could say that a push arrived, or send bytes of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with contextlib.closing(TransferClient(KEY)) as client:

        def lie() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                nonce = f"{NONCE_HEADER}: {'00' * 32}".encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + nonce + b"\r\nContent-Length: 0\r\n\r\n")
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 201 Created\r\nEverstep-Received: 9\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(TransferError, match=r"key.*status 201"):
            client.push(address, shard_in(tmp_path, 9))
        thread.join()
        listener.close()


def test_a_request_without_proof_gets_a_number_only(node: Node) -> None:
    """No nonce asked for, or no proof given: 401, no words, and the end of the connection."""
    connection = http.client.HTTPConnection(node.address, timeout=5)
    connection.request("GET", "/shards/1/1/0")
    response = connection.getresponse()
    assert (response.status, response.read(), response.will_close) == (401, b"", True)
    speaker = Speaker(node)
    assert speaker.status(speaker.head(node), proof="") == 401
    assert speaker.body == b""
    assert Speaker(node).status(speaker.head(node), proof="é" * 64) == 401


def test_a_replayed_request_is_refused(node: Node, speaker: Speaker) -> None:
    """On the same connection, on another one, and with an older counter."""
    first, second = speaker.head(node), speaker.head(node)
    proof = speaker.session.prove_request(first)
    assert speaker.status(second) == 200
    assert len(speaker.body) == 1000
    assert speaker.status(first) == 401, "an older counter"
    again = Speaker(node)
    assert again.status(again.head(node)) == 200
    assert again.status(first, proof) == 401, "on another connection"
    third = Speaker(node)
    head = third.head(node)
    assert third.status(head) == 200
    assert third.status(head) == 401, "the very same"


@pytest.mark.parametrize(
    "tampered",
    [
        {"Range": "bytes=5-"},
        {"path": "/shards/1/1/1"},
        {"method": "HEAD"},
        {COUNTER_HEADER: "7"},
        {CONTROL_HEADER: "{}"},
        {"Content_Range": "bytes 0-1/2"},
        {"Content_Length": "0"},
    ],
)
def test_a_tampered_head_is_refused(node: Node, speaker: Speaker, tampered: dict[str, str]) -> None:
    """Every part of the head that means something is proven."""
    assert speaker.status(speaker.head(node), **tampered) == 401


@pytest.mark.parametrize(
    "path", ["/shards/1/1", "/shards/1/1/-1", "/shards/1/1/0/", "/shards/01/1/0", "/shards/1/1/1e3", "/shards/../1/0"]
)
def test_a_path_that_names_no_shard_is_not_found(node: Node, speaker: Speaker, path: str) -> None:
    assert speaker.status(speaker.head(node, path=path)) == 404


def test_head_says_what_get_would_give(node: Node, speaker: Speaker) -> None:
    head = speaker.head(node, method="HEAD", range="bytes=600-")
    speaker.connection.request(
        "HEAD",
        head.path,
        headers={"Range": head.range, COUNTER_HEADER: head.counter, PROOF_HEADER: speaker.session.prove_request(head)},
    )
    response = speaker.read()
    assert (response.status, response.getheader("Content-Range")) == (206, "bytes 600-999/1000")
    assert response.getheader("Content-Length") == "400"
    assert speaker.status(speaker.head(node, range="bytes=0-9")) == 206
    assert len(speaker.body) == 10
    assert speaker.status(speaker.head(node, range="bytes=1000-")) == 416


def test_a_proven_push_that_makes_no_sense_is_refused(node: Node) -> None:
    """Lengths, ranges and control blocks that do not agree; a method that is none of ours."""
    (shard,) = node.shards.values()
    control = encode_control(shard.control)
    other = control.replace('"step":1', '"step":2')
    cases = [
        ({"content_range": "bytes 0-9/1000", "content_length": "11", "control": control}, 400),
        ({"content_range": "bytes 0-9/999", "content_length": "10", "control": control}, 400),
        ({"content_range": "bytes 9-0/1000", "content_length": "10", "control": control}, 400),
        ({"content_range": "bytes */1000", "content_length": "0", "control": other}, 400),
        ({"content_range": "bytes */1000", "content_length": "0", "control": "[]"}, 400),
        ({"content_range": "bytes */1000", "content_length": "0", "control": control.replace("1000", "-1")}, 400),
        ({"content_range": "bytes 500-999/1000", "content_length": "500", "control": control}, 416),
        ({"method": "DELETE"}, 501),
    ]
    for given, status in cases:
        speaker = Speaker(node)
        assert speaker.status(speaker.head(node, **{"method": "PUT", **given})) == status, given
    assert node.copies.held() == []


def raw(node: Node, data: bytes) -> bytes:
    """What comes back for these bytes, until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=5) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"GET /nonce HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /nonce HTTP/1.1\r\n" + b"X: y\r\n" * 1500 + b"\r\n",
    ],
)
def test_an_oversized_head_is_refused(node: Node, data: bytes) -> None:
    answer = raw(node, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 "), answer


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\xff" * 100 + b"\r\n\r\n", b"GET\r\n\r\n",
        b"GET /nonce HTTP/9.9\r\n\r\n", b"GET /nonce\r\n\r\n", b"BREW /nonce HTTP/1.1\r\n\r\n",
        b"GET /nonce HTTP/1.1\r\n",
        b"GET /nonce HTTP/1.1\r\nno colon\r\n\r\n", b"GET /nonce HTTP/1.1\r\nEverstep-Nonce: zz\r\n\r\n",
        b"GET /nonce HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
        b"PUT /shards/1/1/0 HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT /shards/1/1/0 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_quietly(node: Node, data: bytes) -> None:
    answer = raw(node, data)
    assert len(answer) < 100, "a number and no words"
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))


def test_strangers_do_not_keep_peers_out(node: Node) -> None:
    """Connections that prove nothing give way when there are too many; the fixture then fetches a shard."""
    (shard,) = node.shards.values()
    speaker = Speaker(node)
    assert speaker.status(speaker.head(node)) == 200
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 5):
            stack.enter_context(socket.create_connection(("127.0.0.1", node.port), timeout=5))
        assert speaker.status(speaker.head(node)) == 200, "one that has proven itself stays"
        with contextlib.closing(TransferClient(KEY)) as client:
            client.push(node.address, shard)
    assert len(node.copies.held()) == 1
