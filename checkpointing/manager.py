"""The worker's side of snapshots: stage into the RAM tier while the next step computes, load down the ladder."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from checkpointing.candidates import NoSnapshotError
from checkpointing.flatten import FlatState, Stateful, check_json, flatten, leaves
from checkpointing.layout import Json
from checkpointing.loading import LoadedSnapshot, Loader, Places, Ranks, Rejection, Reports, Target
from checkpointing.repair import Repair
from checkpointing.segment import SLOTS, Control, PersistTo, SlotState, open_segment, segment_name
from checkpointing.shardfile import ShardPlan, SnapshotMeta, plan_shard
from checkpointing.sources import ShardSource, SnapshotSource
from checkpointing.staging import Copier, SlotViews

__all__ = ["LoadedSnapshot", "NoSnapshotError", "Rejection", "SnapshotManager"]

_LEAST_RESERVE_BYTES = 16 * 1024


class SnapshotManager:
    """Snapshots of one rank. Call prepare() once the state exists, then load(), then stage() and wait() in turn.

    state: what to save, by name; its tensors must keep their storage for as long as the manager is used.
    ram_dir: the node's folder in shared memory. mesh: degrees by axis, for the manifest.
    volatile: names of tensors that forward or backward change (stage() copies them before it returns); all others may
    change only after wait(). slots: SLOTS_WITH_COPIES where the agent sends snapshots to peers.
    """

    def __init__(
        self, state: Mapping[str, Stateful], ram_dir: Path, local_rank: int, rank: int, world_size: int,
        generation: int, run_dir: Path, mesh: Mapping[str, int],
        volatile: Callable[[str], bool] = lambda name: False, slots: int = SLOTS,
    ) -> None:  # fmt: skip
        self.slots = slots
        self.state = state
        self.ram_dir = ram_dir
        self.local_rank = local_rank
        self.rank = rank
        self.world_size = world_size
        self.generation = generation
        self.run_dir = run_dir
        self.mesh = mesh
        self.volatile = volatile
        self._slots: list[SlotViews] = []
        self.last_stage_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._staging: Future[float] | None = None

    def prepare(self) -> None:
        """Flatten the state, plan the shard, and allocate or find again the slots in shared memory.

        ValueError if the state cannot be saved, or if shared memory has no room for it.
        """
        self._flat: FlatState = flatten(self.state)
        values = leaves(self.state, self._flat.with_leaves)
        self._leaf_names = frozenset(values)
        reserve_bytes = max(_LEAST_RESERVE_BYTES, 4 * len(msgspec.json.encode(values)))
        parts = [local.part for local in self._flat.tensors]
        self._plan: ShardPlan = plan_shard(parts, self.rank, self.world_size, self.mesh, reserve_bytes)
        volatile = frozenset(i for i, part in enumerate(parts) if self.volatile(part.name))
        self._copier = Copier(self._flat.tensors, self._plan, volatile)
        for slot in range(self.slots):
            self._slots.append(self._open(slot))

    def stage(self, step: int, persist: PersistTo, scalars: Mapping[str, Json]) -> None:
        """Begin to copy the state as it is now; wait() must return before a tensor of it may change.

        persist: what the agent shall write it to; persist_busy must be false unless that is nothing.
        """
        assert self._staging is None, "stage() before wait()"
        assert not (persist and self.persist_busy), "the last snapshot to persist is still in memory"
        for name, value in scalars.items():
            check_json(name, value)
        slot = self._free_slot()
        slot.segment.state = SlotState.STAGING
        meta = SnapshotMeta(
            step=step,
            generation=self.generation,
            scalars={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in scalars.items()},
            leaves=leaves(self.state, self._flat.with_leaves),
        )
        slot.segment.data[: self._plan.data_start_bytes] = self._plan.header(meta)
        with torch.no_grad():
            self._copier.copy_volatile(slot)
        fence = self._copier.fence()
        self._staging = self._thread.submit(self._stage_in_background, slot, step, persist, fence)

    def wait(self) -> float:
        """Wait for the copy under way, if any; returns the seconds this took away. Raises what the copy raised.

        Call it before the collective that decides on the update (the vote): then, whenever a rank begins to stage a
        step, every rank's memory holds the step before whole.
        """
        if self._staging is None:
            return 0.0
        started = time.monotonic()
        staging, self._staging = self._staging, None
        self.last_stage_s = staging.result()
        return time.monotonic() - started

    @property
    def persist_busy(self) -> bool:
        """Whether the agent has not yet taken this rank's last snapshot out of memory."""
        return any(slot.segment.state is SlotState.TO_PERSIST for slot in self._slots)

    @property
    def settled(self) -> bool:
        """Whether the peers have the newest snapshot of this rank, or will not get it."""
        return any(slot.segment.settled for slot in self._slots if slot.segment.control == self._newest())

    @property
    def newest_complete(self) -> int | None:
        """Step of the newest whole snapshot in this rank's memory."""
        newest = self._newest()
        return None if newest is None else newest.step

    def load(
        self, ram_step: int, agree: Callable[[bool], bool], broadcast: Callable[[list[int]], list[int]],
        report: Callable[[Rejection], None] = lambda rejection: None,
        *, sources: Sequence[ShardSource] = (), far: SnapshotSource | None = None,
        rejected: Container[tuple[int, int]] = (), scratch_dir: Path | None = None,
        repaired: Callable[[Repair], None] = lambda repair: None,
        trouble: Callable[[str], None] = lambda words: None,
        progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    ) -> LoadedSnapshot | None:  # fmt: skip
        """Load the nearest, newest snapshot that every rank can verify; None if there is none at all.

        First this rank's memory, if ram_step >= 0, then the run directory and `far`, newest (generation, step) first;
        a damaged or missing shard is fetched from the first of `sources` and `far` that has it whole. agree: whether
        all ranks said yes (a collective); broadcast: rank 0's list on every rank; the other callables: see
        `loading.Reports`; the other arguments: see `loading.Places`. Raises what `loading.Loader.load` does.
        """
        places = Places(self.run_dir, sources, far, rejected, scratch_dir)
        target = Target(self.state, self._flat, self._leaf_names, self._plan.digest, self._slots)
        ranks = Ranks(self.rank, self.world_size, agree, broadcast)
        return Loader(target, ranks, places, Reports(report, repaired, trouble, progress)).load(ram_step)

    def close(self) -> None:
        """Finish what is under way and unmap. The slots stay: they are the agent's."""
        self._thread.shutdown()
        for slot in self._slots:
            slot.close()
        self._slots.clear()

    def _open(self, slot: int) -> SlotViews:
        segment = open_segment(self.ram_dir / segment_name(self.local_rank, slot), self._plan.size_bytes)
        views = SlotViews(segment, self._plan, self._flat.tensors)
        self._copier.pin(views)
        return views

    def _stage_in_background(
        self, slot: SlotViews, step: int, persist: PersistTo, fence: torch.cuda.Event | None
    ) -> float:
        started = time.monotonic()
        slot.segment.populate()
        with torch.no_grad():
            found = self._copier.copy(slot, fence)
        control = Control(
            step=step,
            generation=self.generation,
            rank=self.rank,
            world_size=self.world_size,
            size_bytes=self._plan.size_bytes,
            checksum=found,
            layout=self._plan.digest,
            persist=PersistTo(persist),
        )
        slot.segment.complete(control)
        return time.monotonic() - started

    def _newest(self) -> Control | None:
        held = [control for slot in self._slots if (control := slot.segment.control) is not None]
        return max(held, key=lambda control: control.age, default=None)

    def _free_slot(self) -> SlotViews:
        """The least valuable slot: neither the agent's nor the newest, an empty one rather than an old one.

        One that is being sent to peers only if there is no other: its receiver will notice. Before that, the newest
        that they have: if not every step is copied, it is the newest that all ranks can come back to without a node.
        """
        ages = {n: c.age for n, slot in enumerate(self._slots) if (c := slot.segment.control) is not None}
        newest = max(ages, key=lambda number: ages[number], default=-1)
        sent = [number for number in ages if self._slots[number].segment.settled]
        kept = max(sent, key=lambda number: ages[number], default=-1)
        candidates = [
            (slot.segment.held, number == kept, ages.get(number, (-1, -1)), number)
            for number, slot in enumerate(self._slots)
            if number not in ages or (number != newest and slot.segment.state is not SlotState.TO_PERSIST)
        ]
        assert candidates, "more than one slot waits to be persisted"
        return self._slots[min(candidates)[-1]]
