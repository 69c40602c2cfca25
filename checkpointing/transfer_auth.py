"""Who may speak on a transfer connection: both ends prove, head by head, that they know the job's key.

A connection begins with `GET /nonce`: the client sends 32 random bytes, the server answers with 32 of its own, and
both derive the connection's secret from the two and the key. Every later request carries a counter that only grows
and an HMAC-SHA256, under that secret, of the counter and of everything in the head that means something: method, path,
ranges, length and the shard's control block. The answer carries an HMAC of its own head and of the request's proof.
So a request that is repeated, on this connection or another one, is refused; an answer is to this very request and no
older one; and neither end's head can be altered.

What this does not do: bytes are not encrypted, anybody on the way can read them. A body is covered by the shard's
checksum, which the HMAC authenticates; but that checksum, xxh3-128, is not collision resistant: somebody who can alter
bytes on the way and works at it could find others with the same checksum. Run on a network that you trust.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct

import msgspec

KEY_BYTES = 32
NONCE_BYTES = 32
NONCE_HEADER = "Everstep-Nonce"
COUNTER_HEADER = "Everstep-Counter"
PROOF_HEADER = "Everstep-Proof"
CONTROL_HEADER = "Everstep-Control"
RECEIVED_HEADER = "Everstep-Received"
REASON_HEADER = "Everstep-Reason"
_LENGTH = struct.Struct("<I")


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says, as the header fields' own text; "" where a field is missing."""

    method: str
    path: str
    counter: str
    range: str = ""
    content_range: str = ""
    content_length: str = ""
    control: str = ""


class AnswerHead(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer says. received: bytes of an unfinished push that are there; reason: percent-encoded words."""

    status: int
    content_length: str = "0"
    content_range: str = ""
    control: str = ""
    received: str = ""
    reason: str = ""


def check_key(key: bytes) -> bytes:
    """The key itself; ValueError if it is too short to be one."""
    if len(key) < KEY_BYTES:
        raise ValueError(f"the transfer key has {len(key)} bytes, it must have {KEY_BYTES} random ones")
    return key


def new_nonce() -> bytes:
    """Random bytes that no connection has had before."""
    return secrets.token_bytes(NONCE_BYTES)


def parse_nonce(text: str) -> bytes | None:
    """A nonce from its hex digits; None if it is none."""
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        return None
    return nonce if len(nonce) == NONCE_BYTES else None


class Session:
    """One connection's secret, and the last counter that was seen or used on it."""

    def __init__(self, key: bytes, server_nonce: bytes, client_nonce: bytes) -> None:
        self._secret = _mac(check_key(key), b"session", server_nonce, client_nonce)
        self._counter = 0

    def next_counter(self) -> str:
        """For the client's next request."""
        self._counter += 1
        return str(self._counter)

    def prove_request(self, head: RequestHead) -> str:
        """Hex digits that only somebody with the key can give for this head on this connection."""
        return _mac(self._secret, b"request", *_texts(head)).hex()

    def prove_answer(self, request_proof: str, head: AnswerHead) -> str:
        """The same for an answer to the request with that proof."""
        return _mac(self._secret, b"answer", request_proof.encode("latin-1"), *_texts(head)).hex()

    def admits(self, head: RequestHead, proof: str) -> bool:
        """The server's check: whether the proof is right and the counter is new. A counter is used up by its use."""
        if not same_proof(self.prove_request(head), proof) or not _is_counter(head.counter):
            return False
        if int(head.counter) <= self._counter:
            return False
        self._counter = int(head.counter)
        return True


def same_proof(mine: str, theirs: str) -> bool:
    """Compares in a time that says nothing about where they differ."""
    return hmac.compare_digest(mine.encode("latin-1"), theirs.encode("latin-1", "replace"))


def _is_counter(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def _texts(head: RequestHead | AnswerHead) -> list[bytes]:
    return [str(value).encode("latin-1", "backslashreplace") for value in msgspec.structs.astuple(head)]


def _mac(key: bytes, *parts: bytes) -> bytes:
    """Each part goes in with its length, so that no two lists of parts look alike."""
    running = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        running.update(_LENGTH.pack(len(part)) + part)
    return running.digest()
