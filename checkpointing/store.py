"""The agent's side: what the node's tiers hold, and how memory gets to its disks. No torch here.

A slot that waits goes to the node's own disk first, if asked, and then to the run directory. The node that persists
rank 0 writes the manifest once every rank's sidecar is there. What is in the run directory is then read back (from
another thread, see `readback`), and only what has verified there lets anything older go. Whatever fails is one event
in words; the slot goes back to the worker either way, and training never waits for a disk.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.copies import Located
from checkpointing.fence import fenced_below
from checkpointing.layout import (
    LATEST_NAME,
    MANIFEST_NAME,
    VERSION,
    HeldShard,
    Manifest,
    ShardMeta,
    ShardRef,
    SnapshotDamagedError,
    Tier,
    decode_document,
    encode_document,
    sidecar_name,
    step_dir_name,
)
from checkpointing.marks import all_marked
from checkpointing.node_disk import NodeDisk
from checkpointing.readback import Readback
from checkpointing.retention import Keep, remove_superseded, remove_uncommitted_shards
from checkpointing.segment import CONTROL_BYTES, Control, PersistTo, SlotState, read_control, write_state
from checkpointing.shardwriter import identity, words, write_shard
from checkpointing.slots import adopt_segment, find_slot, opened, segment_paths, slots_to_persist, verified_slot
from checkpointing.storeevents import StoreEvent, StoreEventKind

__all__ = ["NodeStore", "StoreEvent", "StoreEventKind"]

_VERIFY_THREADS = 8
_PERSIST_THREADS = 4


class _Awaited(msgspec.Struct, frozen=True):
    generation: int
    step: int
    world_size: int
    rescue: int = 0


class NodeStore:
    """Snapshots of one node. All methods may be called at any time; persisting and committing from one thread,
    verify_pending from one thread, which may be another.

    node_dir: this run's and node's own folder on the node's disk. keep_*: see `keep.kept_steps`.
    """

    def __init__(
        self, ram_dir: Path, run_dir: Path, keep_last: int = 2, keep_every_steps: int = 0,
        node_dir: Path | None = None, keep_best: int = 0,
    ) -> None:  # fmt: skip
        self.ram_dir = ram_dir
        self.run_dir = run_dir
        self.node_disk = NodeDisk(node_dir) if node_dir else None
        self.readback = Readback(run_dir, Keep(keep_last, keep_every_steps, keep_best), self._write_again)
        self._awaited: list[_Awaited] = []
        self._rescued: queue.SimpleQueue[tuple[int, Located]] = queue.SimpleQueue()
        self._rescue = 1
        self._generation = 0
        self._fenced = False

    def follow(self, generation: int) -> None:
        """The node has heard of this generation: below it, others may have planned what it does not know of."""
        self._generation = max(self._generation, generation)

    def fence(self) -> None:
        """Nothing is persisted, committed or tidied any more: this node does not belong to the job now."""
        self._fenced = True

    def inventory(self) -> list[HeldShard]:
        """Every whole shard in memory and on the node's disk whose every byte verifies, read now.

        In order of (tier, rank, generation, step), memory first.
        """
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            on_disk = pool.submit(self.node_disk.held) if self.node_disk else None
            in_memory = [shard for shard in pool.map(verified_slot, segment_paths(self.ram_dir)) if shard is not None]
            found = [*in_memory, *(on_disk.result() if on_disk else ())]
        return sorted(found, key=lambda shard: (shard.tier is not Tier.RAM, shard.rank, shard.generation, shard.step))

    def find(self, ref: ShardRef) -> Located | None:
        """Where a shard's bytes lie, in memory or else on the node's disk. Whoever reads them verifies them."""
        return find_slot(self.ram_dir, ref) or (self.node_disk.find(ref) if self.node_disk else None)

    def adopt(self, segment: Path, control: Control, local_rank: int) -> None:
        """Make a whole, verified segment file (on the file system of memory) a slot of a local rank.

        The rank's newest slot and one that waits to be persisted stay. Its worker must not run. OSError if the file
        cannot be renamed, ValueError if it is not what `control` says.
        """
        adopt_segment(self.ram_dir, segment, control, local_rank)

    def rescue(self, shard: Located) -> None:
        """Have a whole shard of any rank and layout persisted to the run directory, as one of this node's own would be.

        It may lie in a slot, among copies for peers, or on the node's disk, and is verified on the way.
        """
        self._rescued.put((self._rescue, shard))

    def drop_rescues(self) -> None:
        """What was to be rescued is not wanted any more: what is not written yet is not, nor committed."""
        self._rescue += 1

    def pending(self) -> bool:
        """Whether a slot waits to be persisted, a manifest for other ranks' shards, or a shard to be read back."""
        waiting = self._awaited or slots_to_persist(self.ram_dir) or self.readback.pending()
        return bool(waiting or not self._rescued.empty())

    def persist_pending(self) -> list[StoreEvent]:
        """Persist every slot that waits for it, several at a time. Never raises OSError: it is an event."""
        rescued = self._persist_rescued()
        waiting = slots_to_persist(self.ram_dir)
        if not waiting or self._fenced:
            return rescued
        with ThreadPoolExecutor(min(len(waiting), _PERSIST_THREADS), thread_name_prefix="persist") as pool:
            return [*rescued, *(event for events in pool.map(self._persist_path, waiting) for event in events)]

    def commit_pending(self) -> list[StoreEvent]:
        """Write the manifest of every snapshot of which this node persisted rank 0 and all shards have arrived."""
        events = []
        self._awaited = [a for a in self._awaited if a.rescue in (0, self._rescue)]
        for awaited in sorted(self._awaited, key=lambda a: (a.generation, a.step)):
            started = time.monotonic()
            try:
                shards = self._arrived(awaited)
                if shards is None:
                    continue
                manifest = self._commit(awaited, shards)
                if manifest is None:
                    continue
            except (OSError, SnapshotDamagedError) as error:
                detail = f"step {awaited.step} not committed: {words(error)}"
                events.append(self._event(StoreEventKind.FAILED, awaited, started, detail))
            else:
                detail = f"step {awaited.step}: {len(shards)} shards committed"
                size_bytes = sum(shard.size_bytes for shard in manifest.shards)
                events.append(self._event(StoreEventKind.COMMITTED, awaited, started, detail, size_bytes))
                events += self._after_commit(awaited, manifest)
            self._awaited = [a for a in self._awaited if (a.generation, a.step) > (awaited.generation, awaited.step)]
        return events

    def verify_pending(self) -> list[StoreEvent]:
        """Read back what this node persisted, mark it, and tidy up behind what all nodes have marked.

        The disk belongs to slots that wait for it first, but not for ever.
        """
        if self._fenced or (slots_to_persist(self.ram_dir) and not self.readback.overdue()):
            return []
        return self.readback.verify_pending()

    def close(self) -> None:
        """Remove every slot of this node from shared memory. Nothing else in the folder is touched."""
        for path in segment_paths(self.ram_dir, with_unfinished=True):
            path.unlink(missing_ok=True)

    def _persist_rescued(self) -> list[StoreEvent]:
        waiting = []
        while not self._rescued.empty():
            rescue, shard = self._rescued.get()
            if rescue == self._rescue:
                waiting.append(shard)
        if not waiting or self._fenced:
            return []
        with ThreadPoolExecutor(min(len(waiting), _PERSIST_THREADS), thread_name_prefix="rescue") as pool:
            return list(pool.map(self._persist_one, waiting))

    def _persist_one(self, shard: Located) -> StoreEvent:
        started, control = time.monotonic(), shard.control
        kind, detail = StoreEventKind.PERSISTED, f"step {control.step}: shard of rank {control.rank} persisted"
        try:
            with opened(shard.path) as fd:
                self._to_run(fd, control, shard.start_bytes, self._rescue)
        except (OSError, SnapshotDamagedError) as error:
            kind, detail = StoreEventKind.FAILED, f"shard of rank {control.rank} not persisted: {words(error)}"
        return _shard_event(kind, control, Tier.RUN, started, detail)

    def _persist_path(self, path: Path) -> list[StoreEvent]:
        with contextlib.suppress(FileNotFoundError), opened(path) as fd:
            state, control = read_control(fd)
            if state is SlotState.TO_PERSIST and not self._fenced:
                return self._persist_slot(fd, control)
        return []

    def _persist_slot(self, fd: int, control: Control | None) -> list[StoreEvent]:
        if control is None:
            write_state(fd, SlotState.EMPTY)
            detail = "shard not persisted: control block in memory is garbled"
            return [_shard_event(StoreEventKind.FAILED, None, Tier.RAM, time.monotonic(), detail)]
        events = []
        after = SlotState.COMPLETE
        tiers = ((PersistTo.NODE, Tier.NODE, self._to_node), (PersistTo.RUN, Tier.RUN, self._to_run))
        for wanted, tier, write in tiers:
            if not control.persist & wanted or (tier is Tier.NODE and self.node_disk is None):
                continue
            started = time.monotonic()
            kind, detail = StoreEventKind.PERSISTED, f"step {control.step}: shard of rank {control.rank} persisted"
            try:
                write(fd, control)
            except OSError as error:
                kind, detail = StoreEventKind.FAILED, f"shard not persisted{_where(tier)}: {words(error)}"
            except SnapshotDamagedError as error:
                kind, detail = StoreEventKind.FAILED, f"shard not persisted{_where(tier)}: {error}"
                after = SlotState.COMPLETE if tier is Tier.NODE else SlotState.EMPTY
            events.append(_shard_event(kind, control, tier, started, detail))
        write_state(fd, after)
        return events

    def _to_node(self, fd: int, control: Control) -> None:
        assert self.node_disk is not None
        self.node_disk.write(fd, control)

    def _to_run(self, fd: int, control: Control, start_bytes: int = CONTROL_BYTES, rescue: int = 0) -> None:
        try:
            remove_uncommitted_shards(self.run_dir, control.rank, control.age, keep=1)
            meta = write_shard(fd, control, disk.step_dir(self.run_dir, control.step), start_bytes)
        except OSError:
            with contextlib.suppress(OSError):  # the failure itself is already being reported
                remove_uncommitted_shards(self.run_dir, control.rank, control.age, keep=0)
            raise
        self.readback.expect_shard(meta)
        if control.rank == 0:
            awaited = _Awaited(control.generation, control.step, control.world_size, rescue)
            self._awaited = [*self._awaited[-1:], awaited]

    def _write_again(self, meta: ShardMeta) -> bool:
        """Replace a shard that the disk did not keep, if memory still has it."""
        with contextlib.suppress(OSError, SnapshotDamagedError):
            located = find_slot(self.ram_dir, ShardRef(meta.generation, meta.step, meta.shard.rank))
            if located is not None:
                with opened(located.path) as fd:
                    write_shard(fd, located.control, disk.step_dir(self.run_dir, meta.step))
                return True
        return False

    def _arrived(self, awaited: _Awaited) -> list[ShardMeta] | None:
        folder = disk.step_dir(self.run_dir, awaited.step)
        names = [sidecar_name(awaited.generation, rank) for rank in range(awaited.world_size)]
        if not set(names) <= set(os.listdir(folder)):
            return None
        if not self._may_replace(awaited):
            return None
        shards = [decode_document((folder / n).read_bytes(), ShardMeta, f"{folder.name}/{n}") for n in names]
        for rank, meta in enumerate(shards):
            if identity(meta) != (awaited.step, awaited.generation, awaited.world_size, rank):
                raise SnapshotDamagedError(f"{folder.name}/{names[rank]}: describes another shard")
            if problem := disk.size_problem(self.run_dir, awaited.step, meta.shard):
                raise SnapshotDamagedError(problem)
        return shards

    def _may_replace(self, awaited: _Awaited) -> bool:
        """Whether a manifest may be written: one that is there already goes only once its successor has verified."""
        there = disk.read_generation(self.run_dir, awaited.step)
        if there > awaited.generation:
            raise OSError(f"generation {awaited.generation} is too late, a newer one has committed this step")
        ranks = range(awaited.world_size)
        return there in (-1, awaited.generation) or all_marked(
            disk.step_dir(self.run_dir, awaited.step), awaited.generation, ranks
        )

    def _commit(self, awaited: _Awaited, shards: list[ShardMeta]) -> Manifest | None:
        """Write the manifest; None if another one has come meanwhile that has to stay for now, or the fence forbids it.

        This agent may be an orphan that was held up since it looked: it must not put its manifest over its successor's.
        """
        first = shards[0]
        manifest = Manifest(
            version=VERSION,
            step=first.step,
            generation=first.generation,
            world_size=first.world_size,
            mesh=first.mesh,
            t_wall_s=time.time(),
            shards=tuple(meta.shard for meta in shards),
        )
        path, data = disk.step_dir(self.run_dir, first.step) / MANIFEST_NAME, encode_document(manifest)
        if self._kept_out():
            return None
        if not disk.create_atomic(path, data):
            if not self._may_replace(awaited):
                return None
            disk.write_atomic(path, data)
        elif self._kept_out():
            # Held up between the look and the link; what is refused should not be there.
            path.unlink(missing_ok=True)
            return None
        return manifest

    def _kept_out(self) -> bool:
        """Whether a generation was planned that this node has not heard of: it may be cut off, or about to hear."""
        return self._fenced or fenced_below(self.run_dir) > self._generation

    def _after_commit(self, awaited: _Awaited, manifest: Manifest) -> list[StoreEvent]:
        started = time.monotonic()
        self.readback.expect_marks(manifest)
        try:
            newest = disk.committed_ages(self.run_dir)[0][1]
            latest = disk.checkpoints_dir(self.run_dir) / LATEST_NAME
            disk.write_atomic(latest, f"{step_dir_name(newest)}\n".encode())
            remove_superseded(self.run_dir, awaited.step, awaited.generation)
        except OSError as error:
            detail = f"not tidied after step {awaited.step}: {words(error)}"
            return [self._event(StoreEventKind.FAILED, awaited, started, detail)]
        return []

    @staticmethod
    def _event(kind: StoreEventKind, of: _Awaited, started: float, detail: str, size_bytes: int = 0) -> StoreEvent:
        return StoreEvent(
            kind=kind, step=of.step, generation=of.generation, rank=-1, seconds=time.monotonic() - started,
            detail=detail, size_bytes=size_bytes,
        )  # fmt: skip


def _where(tier: Tier) -> str:
    return f" on {NodeDisk.name}" if tier is Tier.NODE else ""


def _shard_event(
    kind: StoreEventKind, control: Control | None, tier: Tier, started: float, detail: str
) -> StoreEvent:  # fmt: skip
    return StoreEvent(
        kind=kind,
        step=control.step if control else -1,
        generation=control.generation if control else -1,
        rank=control.rank if control else -1,
        seconds=time.monotonic() - started,
        detail=detail,
        size_bytes=control.size_bytes if control else 0,
        tier=tier,
    )
