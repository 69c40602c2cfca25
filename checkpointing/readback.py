"""Reading back what was persisted: marks what verifies, and lets retention work from marked snapshots alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.layout import Manifest, ShardMeta, sidecar_name
from checkpointing.marks import all_marked, leave_mark
from checkpointing.retention import Keep, Retention
from checkpointing.shardwriter import words
from checkpointing.storeevents import StoreEvent, StoreEventKind

_OTHERS_S = 5.0
_PATIENCE_S = 30.0


class _Committed(msgspec.Struct, frozen=True):
    generation: int
    step: int
    ranks: tuple[int, ...]
    since_s: float


class Readback:
    """One node's. expect_* may be called from any thread, verify_pending from one at a time.

    write_again: replaces a damaged shard in the run directory, if it can. The node that commits also applies
    retention, once the marks of all ranks are there.
    """

    def __init__(self, run_dir: Path, keep: Keep, write_again: Callable[[ShardMeta], bool]) -> None:
        self.run_dir = run_dir
        self.retention = Retention(run_dir, keep)
        self._write_again = write_again
        self._lock = threading.Lock()
        self._shards: list[tuple[float, ShardMeta]] = []
        self._committed: list[_Committed] = []

    def expect_shard(self, meta: ShardMeta) -> None:
        """A shard has been persisted by this node."""
        with self._lock:
            self._shards.append((time.monotonic(), meta))

    def expect_marks(self, manifest: Manifest) -> None:
        """A snapshot has been committed by this node."""
        ranks = tuple(shard.rank for shard in manifest.shards)
        with self._lock:
            self._committed.append(_Committed(manifest.generation, manifest.step, ranks, time.monotonic()))

    def overdue(self) -> bool:
        """Whether a shard has waited so long that it may not be put off any more."""
        with self._lock:
            return bool(self._shards) and time.monotonic() - self._shards[0][0] > _PATIENCE_S

    def pending(self) -> bool:
        """Whether a shard waits to be read back, or a snapshot for its marks, for which others have some seconds."""
        with self._lock:
            recent = [c for c in self._committed if time.monotonic() - c.since_s < _OTHERS_S]
            return bool(self._shards or recent)

    def verify_pending(self) -> list[StoreEvent]:
        """Read back every shard that waits, oldest first, then tidy up. Never raises OSError: it is an event."""
        events = []
        while (waiting := self._next_shard()) is not None:
            events += self._verify(waiting[1])
            with self._lock:
                self._shards.remove(waiting)
        return events + self._retain()

    def _next_shard(self) -> tuple[float, ShardMeta] | None:
        with self._lock:
            return self._shards[0] if self._shards else None

    def _verify(self, meta: ShardMeta) -> list[StoreEvent]:
        started = time.monotonic()
        folder = disk.step_dir(self.run_dir, meta.step)
        path = folder / meta.shard.file
        try:
            if not path.exists():
                return []  # retention, or another attempt at the step, was faster
            problem = _read_again(path, meta)
            if problem and self._write_again(meta):
                problem = _read_again(path, meta)
            if problem is None:
                leave_mark(folder, meta.generation, meta.shard.rank)
                return []
            self._withdraw(meta)
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"{folder.name}/{path.name}: {words(error)}"
        detail = f"{problem} (read back after it was persisted)"
        return [_failed(meta.step, meta.generation, meta.shard.rank, started, detail)]

    def _withdraw(self, meta: ShardMeta) -> None:
        """A damaged shard that is not committed yet must not be: it will be persisted again."""
        if disk.read_generation(self.run_dir, meta.step) != meta.generation:
            folder = disk.step_dir(self.run_dir, meta.step)
            (folder / sidecar_name(meta.generation, meta.shard.rank)).unlink(missing_ok=True)
            (folder / meta.shard.file).unlink(missing_ok=True)

    def _retain(self) -> list[StoreEvent]:
        with self._lock:
            waiting = list(self._committed)
        events = []
        for snapshot in waiting:
            started = time.monotonic()
            try:
                marked = self._marked(snapshot)
                if marked:
                    self.retention.apply()
            except OSError as error:
                marked = True
                detail = f"old snapshots not tidied after step {snapshot.step}: {words(error)}"
                events.append(_failed(snapshot.step, snapshot.generation, -1, started, detail))
            if marked:
                with self._lock:
                    self._committed = [c for c in self._committed if _age(c) > _age(snapshot)]
        return events

    def _marked(self, snapshot: _Committed) -> bool:
        try:
            return all_marked(disk.step_dir(self.run_dir, snapshot.step), snapshot.generation, snapshot.ranks)
        except FileNotFoundError:
            return True  # it is gone: nothing to wait for


def _read_again(path: Path, meta: ShardMeta) -> str | None:
    disk.drop_cached(path)
    return disk.file_problem(path, meta.shard)


def _age(snapshot: _Committed) -> tuple[int, int]:
    return snapshot.generation, snapshot.step


def _failed(step: int, generation: int, rank: int, started: float, detail: str) -> StoreEvent:
    return StoreEvent(
        kind=StoreEventKind.FAILED, step=step, generation=generation, rank=rank, seconds=time.monotonic() - started,
        detail=detail,
    )  # fmt: skip
