"""Copies of other nodes' shards in this node's shared memory, in the same segment files as a worker's own slots.

A rank has at most two whole copies and one buffer. A push is written into the buffer, under a name that nothing reads,
and takes a copy's name once all its bytes have verified; the copy that is then one too many becomes the next buffer,
so that memory is allocated for the first pushes only. Where there is no room for a third file the older copy is the
buffer; the newest whole copy is never touched. Of ranks whose copies go elsewhere by now, what a later generation has
replaced makes room for others.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from checkpointing.checksum import checksum_range
from checkpointing.incoming import Incoming
from checkpointing.layout import HeldShard, ShardRef, Tier
from checkpointing.segment import CONTROL_BYTES, Control, SlotState, open_segment, read_control

WHOLE_COPIES = 2
_TAKE_OVER_S = 10.0
_VERIFY_THREADS = 8
_COPY_NAME = re.compile(r"copy-(\d+)-(\d+)-(\d+)\.seg")
_OUR_NAME = re.compile(r"(copy|taken|buffer)-[\d-]+\.seg(\.tmp)?")


class Located(msgspec.Struct, frozen=True):
    """Where a shard's bytes lie: a file, the offset of its first byte, and its control block."""

    path: Path
    start_bytes: int
    control: Control


class Refusal(enum.StrEnum):
    """Why a push is not taken."""

    OLD = "old"
    BUSY = "busy"
    NO_ROOM = "no_room"
    GAP = "gap"
    DAMAGED = "damaged"
    CLOSED = "closed"


class CopyRefusedError(Exception):
    """A push is not taken; the message is one line that says why."""

    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal


class CopyStore:
    """The copies in folder `dir`, which it makes (0700). All methods may be called from any thread at any time."""

    def __init__(self, dir: Path) -> None:
        self.dir = dir
        self._lock = threading.Lock()
        self._incoming: dict[int, Incoming] = {}
        self._oldest_generation = 0
        self._begun = ((-1, -1), 0)
        self._kept_for: frozenset[int] | None = None
        self._closed = False
        dir.mkdir(parents=True, exist_ok=True)
        dir.chmod(0o700)

    def find(self, ref: ShardRef) -> Located | None:
        """Where the whole copy of a shard is, if there is one. Whoever reads it verifies it."""
        path = self._copy_path(ref)
        with contextlib.suppress(FileNotFoundError):
            control = _whole(path, ref)
            return Located(path, CONTROL_BYTES, control) if control else None
        return None

    def held(self) -> list[HeldShard]:
        """Every copy, each read through now, in order of (rank, generation, step); damaged ones are removed.

        A copy that is replaced meanwhile is left out.
        """
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            found = list(pool.map(self._verify, self._refs()))
        return sorted((held for held in found if held), key=lambda held: (held.rank, held.generation, held.step))

    def take(self, ref: ShardRef) -> Path | None:
        """Give a copy away: its segment file, under a name that is the caller's to change. None if there is none."""
        path = self._copy_path(ref)
        with self._lock, contextlib.suppress(FileNotFoundError):
            if _whole(path, ref):
                return path.rename(path.with_name(path.name.replace("copy", "taken")))
        return None

    def keep_for(self, ranks: Collection[int]) -> None:
        """Whose copies come here from now on. Until it is called, that may be anybody's."""
        self._kept_for = frozenset(ranks)

    def forget_before(self, generation: int) -> None:
        """From now on take no push of an older generation, and cut those under way. Whole copies stay."""
        with self._lock:
            self._oldest_generation = max(self._oldest_generation, generation)
            for incoming in self._incoming.values():
                if incoming.control and incoming.control.generation < self._oldest_generation:
                    incoming.cut()

    def go_on_from(self, base: tuple[int, int], generation: int) -> None:
        """A generation begins with the snapshot of age `base`: what older ones had beyond it is dropped and refused.

        It would take the place of what is needed: a keeper has two copies of a rank.
        """
        with self._lock:
            if self._begun == (base, generation):
                return
            self._begun = (base, generation)
            for ref in self._refs():
                if self._is_given_up((ref.generation, ref.step)):
                    self._copy_path(ref).unlink(missing_ok=True)

    def _is_given_up(self, age: tuple[int, int]) -> bool:
        base, generation = self._begun
        return age[0] < generation and age > base

    def close(self) -> None:
        """Take no more, cut what is under way, and remove every file from shared memory."""
        with self._lock:
            self._closed = True
            for incoming in self._incoming.values():
                incoming.cut()
        for incoming in self._incoming.values():
            if incoming.turn.acquire(timeout=_TAKE_OVER_S):
                incoming.end()
                incoming.turn.release()
        for name in _names(self.dir):
            if _OUR_NAME.fullmatch(name):
                (self.dir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's file is in it
            self.dir.rmdir()

    def receive(
        self,
        control: Control,
        start_bytes: int,
        end_bytes: int,
        read_into: Callable[[memoryview], int],
        cut: Callable[[], None],
    ) -> int:
        """Take bytes [start, end) of a push; returns how many of the shard's bytes are here from its start on.

        All of them means that they verified and that the copy is in place. An empty range only asks, and makes room.
        A push of the same rank that is under way is cut off and replaced. read_into: gives bytes, 0 at the end of
        the stream; cut: makes read_into return or fail at once, from another thread.

        Raises:
            CopyRefusedError: if the push is not taken. OSError: what read_into raises; bytes that came are kept.
        """
        if self.find(ShardRef(control.generation, control.step, control.rank)) == self._would_be(control):
            return control.size_bytes
        incoming = self._admit(control, cut)
        if not incoming.turn.acquire(timeout=_TAKE_OVER_S):
            raise CopyRefusedError(Refusal.BUSY, "an earlier push of this rank does not end")
        try:
            self._check_wanted(control)
            if incoming.control != control:
                self._begin(incoming, control)
            if start_bytes < end_bytes and start_bytes != incoming.received_bytes:
                raise CopyRefusedError(Refusal.GAP, f"{incoming.received_bytes} bytes are here, not {start_bytes}")
            incoming.fill(end_bytes, read_into)
            received_bytes = incoming.received_bytes
            if received_bytes == control.size_bytes:
                self._publish(incoming, control)
            return received_bytes
        finally:
            with self._lock:
                incoming.leave(cut)
            incoming.turn.release()

    def _admit(self, control: Control, cut: Callable[[], None]) -> Incoming:
        with self._lock:
            self._check_open(control)
            incoming = self._incoming.setdefault(control.rank, Incoming())
            if incoming.busy and incoming.control and control.age < incoming.control.age:
                raise CopyRefusedError(Refusal.OLD, f"step {incoming.control.step} of this rank is arriving")
            incoming.enter(cut)
            return incoming

    def _check_open(self, control: Control) -> None:
        if self._closed:
            raise CopyRefusedError(Refusal.CLOSED, "no copies are taken any more")
        if control.generation < self._oldest_generation:
            reason = f"generation {control.generation} is over, {self._oldest_generation} has begun"
            raise CopyRefusedError(Refusal.OLD, reason)
        if self._is_given_up(control.age):
            raise CopyRefusedError(Refusal.OLD, f"step {control.step} was given up: it is made anew")

    def _check_wanted(self, control: Control) -> None:
        with self._lock:
            self._check_open(control)
            newer = [ref for ref in self._refs(control.rank) if (ref.generation, ref.step) > control.age]
        if len(newer) >= WHOLE_COPIES:
            raise CopyRefusedError(Refusal.OLD, f"step {newer[-1].step} of this rank is here already")

    def _begin(self, incoming: Incoming, control: Control) -> None:
        incoming.end()
        buffer = self._buffer_path(control.rank)
        for make_room in (self._drop_given_up, self._reuse_older, None):
            try:
                self._make_buffer(buffer, control.size_bytes)
                break
            except ValueError as error:
                if make_room is None:
                    raise CopyRefusedError(Refusal.NO_ROOM, str(error)) from error
                make_room(control)
        incoming.begin(buffer, control)

    def _drop_given_up(self, control: Control) -> None:
        """Remove older generations' copies of ranks that send theirs elsewhere: a push of a later one shows that its
        first step has begun, and that waits until those others have what it began with."""
        with self._lock:
            if self._kept_for is None:
                return
            kept_for = self._kept_for | {control.rank}
            for ref in self._refs():
                if ref.rank not in kept_for and ref.generation < control.generation:
                    self._copy_path(ref).unlink(missing_ok=True)
            for rank, incoming in self._incoming.items():
                if rank not in kept_for and incoming.turn.acquire(blocking=False):
                    incoming.end()
                    self._buffer_path(rank).unlink(missing_ok=True)
                    incoming.turn.release()

    def _reuse_older(self, control: Control) -> None:
        with self._lock:
            for ref in self._refs(control.rank)[:-1][:1]:
                self._copy_path(ref).replace(self._buffer_path(control.rank))

    def _make_buffer(self, buffer: Path, size_bytes: int) -> None:
        with self._lock:
            if self._closed:
                raise CopyRefusedError(Refusal.CLOSED, "no copies are taken any more")
        with contextlib.suppress(FileNotFoundError):
            if buffer.stat().st_size != CONTROL_BYTES + size_bytes:
                buffer.unlink()  # its memory first, so that the new one may have it
        open_segment(buffer, size_bytes).close()

    def _publish(self, incoming: Incoming, control: Control) -> None:
        buffer = self._buffer_path(control.rank)
        try:
            if incoming.checksum != control.checksum:
                reason = "the bytes do not have the shard's checksum: they changed at their source or on the way"
                raise CopyRefusedError(Refusal.DAMAGED, reason)
            with self._lock:
                self._check_open(control)
                incoming.complete()
                buffer.replace(self._copy_path(ShardRef(control.generation, control.step, control.rank)))
                for ref in self._refs(control.rank)[:-WHOLE_COPIES]:
                    self._copy_path(ref).replace(buffer)
        finally:
            incoming.end()

    def _verify(self, ref: ShardRef) -> HeldShard | None:
        path = self._copy_path(ref)
        with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            state, control = read_control(file.fileno())
            good = state is SlotState.COMPLETE and control is not None and _names_it(control, ref)
            if (
                good
                and control
                and checksum_range(file.fileno(), CONTROL_BYTES, control.size_bytes) == control.checksum
            ):
                return _held(control) if read_control(file.fileno()) == (state, control) else None
            with self._lock:
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # else it is being overwritten as a buffer
                    path.unlink()
        return None

    def _refs(self, rank: int | None = None) -> list[ShardRef]:
        """Names of the copies (of one rank), oldest first."""
        matches = [match for name in _names(self.dir) if (match := _COPY_NAME.fullmatch(name))]
        refs = [ShardRef(int(match[2]), int(match[3]), int(match[1])) for match in matches]
        return sorted(ref for ref in refs if rank is None or ref.rank == rank)

    def _would_be(self, control: Control) -> Located:
        path = self._copy_path(ShardRef(control.generation, control.step, control.rank))
        return Located(path, CONTROL_BYTES, control)

    def _copy_path(self, ref: ShardRef) -> Path:
        return self.dir / f"copy-{ref.rank}-{ref.generation}-{ref.step}.seg"

    def _buffer_path(self, rank: int) -> Path:
        return self.dir / f"buffer-{rank}.seg"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _names_it(control: Control, ref: ShardRef) -> bool:
    return (control.generation, control.step, control.rank) == (ref.generation, ref.step, ref.rank)


def _whole(path: Path, ref: ShardRef) -> Control | None:
    with open(path, "rb", buffering=0) as file:
        state, control = read_control(file.fileno())
    return control if state is SlotState.COMPLETE and control and _names_it(control, ref) else None


def _held(control: Control) -> HeldShard:
    return HeldShard(
        rank=control.rank,
        world_size=control.world_size,
        step=control.step,
        generation=control.generation,
        layout=control.layout,
        tier=Tier.PEER,
    )
