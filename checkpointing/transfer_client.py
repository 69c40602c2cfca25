"""Sends shards to other nodes' transfer servers and gets shards from them; goes on where a cut connection ended."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from checkpointing.copies import Located
from checkpointing.layout import Shard, ShardRef
from checkpointing.ratelimit import RateLimit, never
from checkpointing.segment import Control
from checkpointing.sources import SourceError
from checkpointing.transfer_auth import AnswerHead, RequestHead, check_key
from checkpointing.transfer_link import CutError, Download, Link, TransferError, parse_size
from checkpointing.transfer_wire import (
    RESUME_INCOMPLETE,
    Span,
    encode_control,
    format_content_range,
    format_range,
    shard_path,
)

__all__ = ["PeerSource", "TransferClient", "TransferError"]

_PAUSES_S = (0.0, 0.1, 0.4)
_PIECE_BYTES = 2**20


class TransferClient:
    """Connections to other nodes, one to each address, kept open. To be used by one thread at a time.

    limit: bounds what is sent and what is received. timeout_s: how long a peer may say nothing. stop: looked at
    between pieces; a transfer that it ends raises TransferError.
    """

    def __init__(
        self, key: bytes, limit: RateLimit | None = None, timeout_s: float = 10.0, stop: Callable[[], bool] = never
    ) -> None:
        self._key = check_key(key)
        self._limit = limit or RateLimit(None)
        self._timeout_s = timeout_s
        self._stop = stop
        self._links: dict[str, Link] = {}

    def push(self, address: str, shard: Located) -> None:
        """Send a shard to the node at "host:port". On return the node has verified it and put it in place.

        Raises:
            TransferError: if the node refuses it or cannot be reached, or the shard changed while it was sent.
        """
        tries = _Tries(address, self._stop)
        try:
            with open(shard.path, "rb", buffering=0) as source:
                while not self._attempt(address, tries, lambda link: self._push_rest(link, source, shard, tries)):
                    tries.pause()
        except OSError as error:
            raise TransferError(f"{address}: {shard.path.name} cannot be read ({error.strerror or error})") from error

    def fetch(self, address: str, ref: ShardRef, into: Path, start_bytes: int) -> Control:
        """Get a shard from the node at "host:port" into the file `into` (made if it is not there) at start_bytes.

        Returns what the node says about the shard; its bytes have been verified against that.

        Raises:
            TransferError: if the node has no such shard, cannot be reached, or sent bytes that do not verify.
            OSError: if `into` cannot be written.
        """
        return self.fetch_if(address, ref, into, start_bytes, lambda control: None)

    def fetch_if(
        self, address: str, ref: ShardRef, into: Path, start_bytes: int, check: Callable[[Control], str | None]
    ) -> Control:
        """As `fetch`, if `check` has nothing against the shard that the node has; its words become the error."""
        tries = _Tries(address, self._stop)
        fd = os.open(into, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            download = Download(address, ref, fd, start_bytes, check)
            while not self._attempt(address, tries, lambda link: self._fetch_rest(link, download, tries)):
                tries.pause()
            assert download.control is not None
            return download.control
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close all connections."""
        for address in list(self._links):
            self._drop(address)

    def _attempt(self, address: str, tries: _Tries, act: Callable[[Link], None]) -> bool:
        """Whether it worked; False if the connection was cut. After any failure the connection is not used again."""
        done = False
        try:
            tries.begin()
            if address not in self._links:
                self._links[address] = Link(address, self._key, self._timeout_s)
            act(self._links[address])
            done = True
        except CutError as error:
            tries.failed(str(error))
        finally:
            if not done:
                self._drop(address)
        return done

    def _drop(self, address: str) -> None:
        link = self._links.pop(address, None)
        if link is not None:
            link.close()

    def _push_rest(self, link: Link, source: io.FileIO, shard: Located, tries: _Tries) -> None:
        size_bytes = shard.control.size_bytes
        answer = self._put(link, source, shard, Span(0, 0, size_bytes), tries)
        received_bytes = parse_size(answer.received, size_bytes, link.address)
        tries.reached(received_bytes)
        if answer.status == RESUME_INCOMPLETE:
            answer = self._put(link, source, shard, Span(received_bytes, size_bytes, size_bytes), tries)
        if answer.status != HTTPStatus.CREATED:
            raise TransferError(f"{link.address}: answered with {answer.status} where it should have taken the whole")

    def _put(self, link: Link, source: io.FileIO, shard: Located, span: Span, tries: _Tries) -> AnswerHead:
        control = shard.control
        head = RequestHead(
            method="PUT",
            path=shard_path(ShardRef(control.generation, control.step, control.rank)),
            counter=link.next_counter(),
            content_range=format_content_range(span),
            content_length=str(span.end - span.start),
            control=encode_control(control),
        )
        link.send_head(head)
        done = span.start
        while done < span.end:
            count = min(self._limit.slice_bytes, span.end - done)
            tries.check(self._limit.take(count, self._stop))
            link.send_file(source, shard.start_bytes + done, count)
            done += count
        return link.answer()

    def _fetch_rest(self, link: Link, download: Download, tries: _Tries) -> None:
        head = RequestHead(
            method="GET",
            path=shard_path(download.ref),
            counter=link.next_counter(),
            range=format_range(download.done_bytes),
        )
        link.send_head(head)
        download.expect(link.answer())
        assert download.control is not None
        piece = memoryview(bytearray(min(_PIECE_BYTES, self._limit.slice_bytes)))
        while download.done_bytes < download.control.size_bytes:
            count = min(len(piece), download.control.size_bytes - download.done_bytes)
            tries.check(self._limit.take(count, self._stop))
            download.add(link.read_into(piece[:count]))
            tries.reached(download.done_bytes)
        download.verify()


class PeerSource:
    """Shards of committed snapshots from other nodes' memory or disks: asks the addresses ("host:port") in turn."""

    name = "a peer"

    def __init__(self, key: bytes, addresses: Sequence[str]) -> None:
        self._key = key
        self._addresses = tuple(addresses)

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        """As `ShardSource.fetch` says; a shard that is not the manifest's own is not taken."""

        def check(control: Control) -> str | None:
            same = (control.size_bytes, control.checksum) == (shard.size_bytes, shard.checksum)
            return None if same else "has other bytes than the manifest says"

        problems = []
        with contextlib.closing(TransferClient(self._key)) as client:
            for address in self._addresses:
                try:
                    client.fetch_if(address, ShardRef(generation, step, shard.rank), into, 0, check)
                    return
                except TransferError as error:
                    problems.append(str(error))
                except OSError as error:
                    into.unlink(missing_ok=True)
                    raise SourceError(f"{into.name} cannot be written ({error.strerror or error})") from error
        into.unlink(missing_ok=True)
        raise SourceError("; ".join(problems) or "no peer is known")


class _Tries:
    """How long to go on: until four tries in a row have brought nothing new."""

    def __init__(self, address: str, stop: Callable[[], bool]) -> None:
        self._address = address
        self._stop = stop
        self._best_bytes = 0
        self._in_vain = 0

    def begin(self) -> None:
        self.check(not self._stop())

    def check(self, go_on: bool) -> None:
        if not go_on:
            raise TransferError(f"{self._address}: stopped")

    def reached(self, done_bytes: int) -> None:
        if done_bytes > self._best_bytes:
            self._best_bytes, self._in_vain = done_bytes, 0

    def failed(self, why: str) -> None:
        self._in_vain += 1
        if self._in_vain > len(_PAUSES_S):
            raise TransferError(f"{self._address}: {why} ({self._in_vain} tries)")

    def pause(self) -> None:
        time.sleep(_PAUSES_S[self._in_vain - 1])  # nothing to wait for: the peer, or the way to it, may come back
