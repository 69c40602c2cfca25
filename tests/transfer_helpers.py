"""A node with copies, shards to send, and a proxy that cuts connections, for the tests of peer transfer."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from checkpointing.checksum import checksum
from checkpointing.copies import CopyStore, Located
from checkpointing.layout import ShardRef
from checkpointing.segment import CONTROL_BYTES, Control, open_segment
from checkpointing.transfer_server import TransferServer

KEY = bytes(range(32))
LAYOUT = "ab" * 16


def some_bytes(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def shard_in(
    folder: Path, size_bytes: int, step: int = 1, generation: int = 1, rank: int = 0, seed: int | None = None
) -> Located:
    """A whole slot with bytes of its own."""
    data = some_bytes(size_bytes, step if seed is None else seed)
    control = Control(
        step=step, generation=generation, rank=rank, world_size=2, size_bytes=size_bytes, checksum=checksum(data),
        layout=LAYOUT,
    )  # fmt: skip
    path = folder / f"source-{rank}-{generation}-{step}.seg"
    segment = open_segment(path, size_bytes)
    segment.data[:] = data
    segment.complete(control)
    segment.close()
    return Located(path, CONTROL_BYTES, control)


def ref_of(shard: Located) -> ShardRef:
    return ShardRef(shard.control.generation, shard.control.step, shard.control.rank)


def bytes_of(shard: Located) -> bytes:
    return shard.path.read_bytes()[shard.start_bytes : shard.start_bytes + shard.control.size_bytes]


class Node:
    """A node that takes copies and serves them, and any shard put into `shards`."""

    def __init__(self, folder: Path) -> None:
        self.copies = CopyStore(folder / "copies")
        self.shards: dict[ShardRef, Located] = {}
        self.server = TransferServer("127.0.0.1", KEY, self.find, self.copies)
        self.port = self.server.start()
        self.address = f"127.0.0.1:{self.port}"

    def find(self, ref: ShardRef) -> Located | None:
        return self.shards.get(ref) or self.copies.find(ref)

    def close(self) -> None:
        self.server.close()
        self.copies.close()


@contextlib.contextmanager
def a_node(folder: Path) -> Iterator[Node]:
    node = Node(folder)
    try:
        yield node
    finally:
        node.close()


class CuttingProxy:
    """Passes connections on to a port; the n-th is cut after cuts[n] bytes from either side, later ones never."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._port = port
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.passed_bytes = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                left = self._cuts[self.connections] if self.connections < len(self._cuts) else 2**60
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._port))
                budget = _Budget(left)
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, target, budget), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, budget: _Budget) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                allowed = budget.take(len(data))
                target.sendall(data[:allowed])
                self.passed_bytes += allowed
                if allowed < len(data):
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


class _Budget:
    def __init__(self, left_bytes: int) -> None:
        self._left_bytes = left_bytes
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        with self._lock:
            allowed = min(count, self._left_bytes)
            self._left_bytes -= allowed
            return allowed


@contextlib.contextmanager
def cutting(port: int, cuts: list[int]) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(port, cuts)
    try:
        yield proxy
    finally:
        proxy.close()


def flip(path: Path, offset_bytes: int) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes([os.pread(fd, 1, offset_bytes)[0] ^ 1]), offset_bytes)
    os.close(fd)
