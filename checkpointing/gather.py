"""Before workers start: brings the shards that they need into this node's memory, from the nearest place that has them.

That is a copy kept here for a peer, this node's own disk, or a peer's memory or disk. Everything is verified on the
way; what cannot be had is said, and the workers then find no such snapshot in memory and read one from further away.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from checkpointing.checksum import CHUNK_BYTES, Checksum
from checkpointing.copies import CopyStore, Located
from checkpointing.disk import write_all
from checkpointing.layout import ShardRef, SnapshotDamagedError
from checkpointing.ratelimit import never
from checkpointing.segment import CONTROL_BYTES, Control, read_control, write_control
from checkpointing.store import NodeStore
from checkpointing.transfer_client import TransferClient, TransferError

_THREADS = 8


class Need(msgspec.Struct, frozen=True):
    """A shard for a local rank, and the peers that may have it; none: it is on this node."""

    ref: ShardRef
    local_rank: int
    addresses: tuple[str, ...]


class Gathered(msgspec.Struct, frozen=True):
    """What became of a need. origin: in words; "" if it could not be had, and then problem says why."""

    need: Need
    origin: str
    problem: str
    size_bytes: int
    seconds: float


class Gatherer:
    """Fills the slots of a node. scratch: a folder in the same file system as the slots. stop: whether nobody needs it
    any more, asked between pieces that peers send."""

    def __init__(
        self, store: NodeStore, copies: CopyStore, key: bytes, scratch: Path, stop: Callable[[], bool] = never
    ) -> None:
        self.store = store
        self.copies = copies
        self.key = key
        self.scratch = scratch
        self.stop = stop

    def gather(self, needs: Sequence[Need], done: Callable[[Gathered], None]) -> None:
        """Bring in all of them, in parallel; `done` hears of each as it ends, in other threads."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="gather") as pool:
            for _ in pool.map(lambda need: done(self._one(need)), needs):
                pass

    def _one(self, need: Need) -> Gathered:
        started_s = time.monotonic()
        origin, problem, size_bytes = "", "", 0
        try:
            origin, path, control = self._find(need)
            size_bytes = control.size_bytes
            self.store.adopt(path, control, need.local_rank)
        except (OSError, TransferError, ValueError) as error:  # a damaged snapshot is a ValueError
            origin, problem = "", str(error)
            self._scratch(need).unlink(missing_ok=True)  # what came of it is memory that others need
        return Gathered(need, origin, problem, size_bytes, time.monotonic() - started_s)

    def _find(self, need: Need) -> tuple[str, Path, Control]:
        taken = self.copies.take(need.ref)
        if taken is not None:
            return "this node's copy", taken, _control(taken)
        path = self._scratch(need)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError, SnapshotDamagedError):
            located = self.store.find(need.ref)
            if located is not None:
                _copy(located, path)
                return "this node's disk", path, _publish(path, located.control)
        problems = []
        for address in need.addresses:
            with contextlib.closing(TransferClient(self.key, stop=self.stop)) as client:
                try:
                    control = client.fetch(address, need.ref, path, CONTROL_BYTES)
                except TransferError as error:
                    problems.append(str(error))
                    continue
                return f"peer {address}", path, _publish(path, control)
        raise SnapshotDamagedError("; ".join(problems) or "it is no longer on this node")

    def _scratch(self, need: Need) -> Path:
        return self.scratch / f"gathered-{need.local_rank}.seg"


def _copy(located: Located, into: Path) -> None:
    """A shard's bytes behind an empty control block. SnapshotDamagedError if they do not verify."""
    running, done, size_bytes = Checksum(), 0, located.control.size_bytes
    buffer = memoryview(bytearray(CHUNK_BYTES))
    source = os.open(located.path, os.O_RDONLY)
    target = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.lseek(target, CONTROL_BYTES, os.SEEK_SET)
        while done < size_bytes:
            count = os.preadv(source, [buffer[: min(len(buffer), size_bytes - done)]], located.start_bytes + done)
            if count == 0:
                break
            running.update(buffer[:count])
            write_all(target, buffer[:count])
            done += count
    finally:
        os.close(source)
        os.close(target)
    if running.hex() != located.control.checksum:
        into.unlink()
        raise SnapshotDamagedError(f"{located.path.name}: its bytes do not verify")


def _publish(path: Path, control: Control) -> Control:
    fd = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(fd, CONTROL_BYTES + control.size_bytes)
        write_control(fd, control)
    finally:
        os.close(fd)
    return control


def _control(path: Path) -> Control:
    fd = os.open(path, os.O_RDONLY)
    try:
        _, control = read_control(fd)
    finally:
        os.close(fd)
    if control is None:
        raise SnapshotDamagedError(f"{path.name}: its control block is garbled")
    return control
