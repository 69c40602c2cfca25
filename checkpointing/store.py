"""The agent's side: what the node's RAM tier holds, and how it gets to the run directory. No torch here.

A shard is copied out of its slot in bounded pieces and checked on the way, made durable, and then described by a
sidecar. The node that persists rank 0 writes the manifest once every rank's sidecar is there. Whatever fails is one
event in words; the slot goes back to the worker either way, and training never waits for a disk.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.checksum import CHUNK_BYTES, Checksum, checksum_range
from checkpointing.layout import (
    LATEST_NAME,
    MANIFEST_NAME,
    VERSION,
    HeldShard,
    Manifest,
    ShardMeta,
    SnapshotDamagedError,
    Tier,
    decode_document,
    encode_document,
    shard_file_name,
    sidecar_name,
    step_dir_name,
)
from checkpointing.retention import apply_retention, remove_superseded, remove_uncommitted_shards
from checkpointing.segment import (
    CONTROL_BYTES,
    READABLE,
    Control,
    SlotState,
    parse_segment_name,
    read_control,
    write_state,
)
from checkpointing.shardfile import header_size_bytes, parse_header

_VERIFY_THREADS = 8


class StoreEventKind(enum.StrEnum):
    """What happened to a snapshot in the background."""

    PERSISTED = "persisted"
    COMMITTED = "committed"
    FAILED = "failed"


class StoreEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened: for the journal. rank -1: concerns the whole snapshot. detail: one line for a person."""

    kind: StoreEventKind
    step: int
    generation: int
    rank: int
    seconds: float
    detail: str
    size_bytes: int = 0


class _Awaited(msgspec.Struct, frozen=True):
    generation: int
    step: int
    world_size: int


class NodeStore:
    """Snapshots of one node. All methods may be called at any time; persisting and committing from one thread."""

    def __init__(self, ram_dir: Path, run_dir: Path, keep_last: int = 2, keep_every_steps: int = 0) -> None:
        self.ram_dir = ram_dir
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self._awaited: list[_Awaited] = []

    def inventory(self) -> list[HeldShard]:
        """Every whole shard in memory whose every byte verifies, in order of (rank, generation, step)."""
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            found = [shard for shard in pool.map(_verified, self._segment_paths()) if shard is not None]
        return sorted(found, key=lambda shard: (shard.rank, shard.generation, shard.step))

    def pending(self) -> bool:
        """Whether a slot waits to be persisted, or a manifest for other ranks' shards."""
        return bool(self._awaited or self._slots_to_persist())

    def persist_pending(self) -> list[StoreEvent]:
        """Persist every slot that waits for it, oldest snapshot first. Never raises OSError: it is an event."""
        events = []
        for path in self._slots_to_persist():
            with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
                state, control = read_control(fd)
                if state is SlotState.TO_PERSIST:
                    events.append(self._persist_slot(fd, control))
        return events

    def commit_pending(self) -> list[StoreEvent]:
        """Write the manifest of every snapshot of which this node persisted rank 0 and all shards have arrived."""
        events = []
        for awaited in sorted(self._awaited, key=lambda a: (a.generation, a.step)):
            started = time.monotonic()
            try:
                shards = self._arrived(awaited)
                if shards is None:
                    continue
                manifest = self._commit(shards)
                detail = f"step {awaited.step}: {len(shards)} shards committed"
                kind, size_bytes = StoreEventKind.COMMITTED, sum(shard.size_bytes for shard in manifest.shards)
            except (OSError, SnapshotDamagedError) as error:
                detail, kind, size_bytes = (
                    f"step {awaited.step} not committed: {_words(error)}",
                    StoreEventKind.FAILED,
                    0,
                )
            self._awaited = [a for a in self._awaited if (a.generation, a.step) > (awaited.generation, awaited.step)]
            events.append(self._event(kind, awaited, started, detail, size_bytes))
            if kind is StoreEventKind.COMMITTED:
                events += self._retain(awaited)
        return events

    def close(self) -> None:
        """Remove every slot of this node from shared memory. Nothing else in the folder is touched."""
        for path in self._segment_paths(with_unfinished=True):
            path.unlink(missing_ok=True)

    def _segment_paths(self, with_unfinished: bool = False) -> list[Path]:
        try:
            names = sorted(os.listdir(self.ram_dir))
        except FileNotFoundError:
            return []
        return [
            self.ram_dir / name
            for name in names
            if parse_segment_name(name) is not None and (with_unfinished or not name.endswith(".tmp"))
        ]

    def _slots_to_persist(self) -> list[Path]:
        waiting = []
        for path in self._segment_paths():
            with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
                state, control = read_control(fd)
                if state is SlotState.TO_PERSIST:
                    waiting.append((control.age if control else (-1, -1), path))
        return [path for _, path in sorted(waiting)]

    def _persist_slot(self, fd: int, control: Control | None) -> StoreEvent:
        started = time.monotonic()
        after = SlotState.COMPLETE
        try:
            if control is None:
                raise SnapshotDamagedError("control block in memory is garbled")
            self._write_shard(fd, control)
        except OSError as error:
            kind, detail = StoreEventKind.FAILED, f"shard not persisted: {_words(error)}"
            self._make_room(control)
        except SnapshotDamagedError as error:
            kind, detail = StoreEventKind.FAILED, f"shard not persisted: {error}"
            after = SlotState.EMPTY
        else:
            kind, detail = StoreEventKind.PERSISTED, f"step {control.step}: shard of rank {control.rank} persisted"
            if control.rank == 0:
                self._awaited = [*self._awaited[-1:], _Awaited(control.generation, control.step, control.world_size)]
        write_state(fd, after)
        return StoreEvent(
            kind=kind,
            step=control.step if control else -1,
            generation=control.generation if control else -1,
            rank=control.rank if control else -1,
            seconds=time.monotonic() - started,
            detail=detail,
            size_bytes=control.size_bytes if control else 0,
        )

    def _write_shard(self, fd: int, control: Control) -> None:
        remove_uncommitted_shards(self.run_dir, control.rank, control.step, keep=1)
        folder = disk.step_dir(self.run_dir, control.step)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / shard_file_name(control.generation, control.rank)
        temporary = path.with_name(path.name + ".tmp")
        name = f"{folder.name}/{path.name}"
        replaced = False
        try:
            found = _copy_out(fd, control.size_bytes, temporary)
            if found != control.checksum:
                raise SnapshotDamagedError(f"{name}: bytes in memory have changed since they were staged")
            meta = _describe(fd, control, name)
            if self._is_there(folder, control, meta):
                temporary.unlink()
                return
            replaced = True
            temporary.replace(path)
            disk.sync_dir(folder)
            disk.write_atomic(folder / sidecar_name(control.generation, control.rank), encode_document(meta))
        except (OSError, SnapshotDamagedError):
            temporary.unlink(missing_ok=True)
            if replaced:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others may have files in it
                folder.rmdir()
            raise

    def _is_there(self, folder: Path, control: Control, meta: ShardMeta) -> bool:
        """Whether this very shard was persisted before: a retry after another rank's failure writes nothing anew."""
        sidecar = folder / sidecar_name(control.generation, control.rank)
        with contextlib.suppress(OSError, SnapshotDamagedError):
            known = decode_document(sidecar.read_bytes(), ShardMeta, sidecar.name)
            return known == meta and disk.shard_problem(self.run_dir, control.step, meta.shard) is None
        return False

    def _make_room(self, control: Control | None) -> None:
        if control is not None:
            with contextlib.suppress(OSError):  # the failure itself is already being reported
                remove_uncommitted_shards(self.run_dir, control.rank, control.step, keep=0)

    def _arrived(self, awaited: _Awaited) -> list[ShardMeta] | None:
        folder = disk.step_dir(self.run_dir, awaited.step)
        names = [sidecar_name(awaited.generation, rank) for rank in range(awaited.world_size)]
        if not set(names) <= set(os.listdir(folder)):
            return None
        shards = [decode_document((folder / n).read_bytes(), ShardMeta, f"{folder.name}/{n}") for n in names]
        for rank, meta in enumerate(shards):
            if _identity(meta) != (awaited.step, awaited.generation, awaited.world_size, rank):
                raise SnapshotDamagedError(f"{folder.name}/{names[rank]}: describes another shard")
            if problem := disk.size_problem(self.run_dir, awaited.step, meta.shard):
                raise SnapshotDamagedError(problem)
        return shards

    def _commit(self, shards: list[ShardMeta]) -> Manifest:
        first = shards[0]
        with contextlib.suppress(SnapshotDamagedError):
            if disk.read_manifest(self.run_dir, first.step).generation > first.generation:
                raise OSError(f"generation {first.generation} is too late, a newer one has committed this step")
        manifest = Manifest(
            version=VERSION,
            step=first.step,
            generation=first.generation,
            world_size=first.world_size,
            mesh=first.mesh,
            t_wall_s=time.time(),
            shards=tuple(meta.shard for meta in shards),
        )
        folder = disk.step_dir(self.run_dir, first.step)
        disk.write_atomic(folder / MANIFEST_NAME, encode_document(manifest))
        return manifest

    def _retain(self, awaited: _Awaited) -> list[StoreEvent]:
        started = time.monotonic()
        try:
            latest = disk.checkpoints_dir(self.run_dir) / LATEST_NAME
            disk.write_atomic(latest, f"{step_dir_name(disk.committed_steps(self.run_dir)[0])}\n".encode())
            remove_superseded(self.run_dir, awaited.step, awaited.generation)
            apply_retention(self.run_dir, self.keep_last, self.keep_every_steps)
        except OSError as error:
            detail = f"old snapshots not tidied after step {awaited.step}: {_words(error)}"
            return [self._event(StoreEventKind.FAILED, awaited, started, detail, 0)]
        return []

    @staticmethod
    def _event(kind: StoreEventKind, of: _Awaited, started: float, detail: str, size_bytes: int) -> StoreEvent:
        return StoreEvent(
            kind=kind, step=of.step, generation=of.generation, rank=-1, seconds=time.monotonic() - started,
            detail=detail, size_bytes=size_bytes,
        )  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def _verified(path: Path) -> HeldShard | None:
    with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
        state, control = read_control(fd)
        if state not in READABLE or control is None:
            return None
        found = checksum_range(fd, CONTROL_BYTES, control.size_bytes)
        state, now = read_control(fd)
        if found == control.checksum and state in READABLE and now == control:
            return HeldShard(
                rank=control.rank,
                world_size=control.world_size,
                step=control.step,
                generation=control.generation,
                layout=control.layout,
                tier=Tier.RAM,
            )
    return None


def _copy_out(fd: int, size_bytes: int, path: Path) -> str:
    """Copy a slot's shard to a new, durable file; returns the checksum of what was written."""
    running = Checksum()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size_bytes, 1))))
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        done = 0
        while done < size_bytes:
            count = os.preadv(fd, [buffer[: min(len(buffer), size_bytes - done)]], CONTROL_BYTES + done)
            if count == 0:
                break
            running.update(buffer[:count])
            disk.write_all(out, buffer[:count])
            done += count
        os.fsync(out)
    finally:
        os.close(out)
    return running.hex()


def _describe(fd: int, control: Control, name: str) -> ShardMeta:
    length = header_size_bytes(os.pread(fd, 8, CONTROL_BYTES), control.size_bytes, name)
    meta = parse_header(os.pread(fd, length, CONTROL_BYTES), control.size_bytes, control.checksum, name)
    if _identity(meta) != (control.step, control.generation, control.world_size, control.rank):
        raise SnapshotDamagedError(f"{name}: control block and header in memory disagree")
    return meta


def _identity(meta: ShardMeta) -> tuple[int, int, int, int]:
    return meta.step, meta.generation, meta.world_size, meta.shard.rank


def _words(error: OSError | SnapshotDamagedError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)
