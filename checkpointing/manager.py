"""The worker's side of snapshots: stage into the RAM tier while the next step computes, load down the ladder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from checkpointing import disk
from checkpointing.checksum import checksum
from checkpointing.flatten import FlatState, Stateful, check_json, flatten, leaves, rebuild
from checkpointing.layout import Json, ShardMeta, SnapshotDamagedError
from checkpointing.restore import DiskCandidate, decode_values, open_candidate
from checkpointing.segment import SLOTS, Control, PersistTo, SlotState, open_segment, segment_name
from checkpointing.shardfile import ShardPlan, SnapshotMeta, header_size_bytes, parse_header, plan_shard
from checkpointing.staging import Copier, SlotViews

_LEAST_RESERVE_BYTES = 16 * 1024

Tier = Literal["ram", "disk"]


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot this rank refused; reason is one line that names what is damaged."""

    step: int
    tier: Tier
    reason: str


class LoadedSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded, and what had to be passed over before it. seconds: all of it, verification included."""

    step: int
    generation: int
    tier: Tier
    scalars: dict[str, Any]
    rejections: tuple[Rejection, ...]
    seconds: float


class NoSnapshotError(ValueError):
    """Snapshots are there, and none of them can be trusted: a person has to decide."""


_Reject = Callable[[int, Tier, SnapshotDamagedError], None]


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
    def copied(self) -> bool:
        """Whether the peers have the newest snapshot of this rank."""
        return any(slot.segment.copied for slot in self._slots if slot.segment.control == self._newest())

    @property
    def newest_complete(self) -> int | None:
        """Step of the newest whole snapshot in this rank's memory."""
        newest = self._newest()
        return None if newest is None else newest.step

    def load(
        self, ram_step: int, agree: Callable[[bool], bool], broadcast: Callable[[list[int]], list[int]],
        report: Callable[[Rejection], None] = lambda rejection: None,
    ) -> LoadedSnapshot | None:  # fmt: skip
        """Load the nearest, newest snapshot that every rank can verify; None if the run directory has none at all.

        First this rank's memory, if ram_step >= 0, then the run directory, newest first. agree: whether all ranks said
        yes (a collective); broadcast: rank 0's list on every rank; report: hears of a refusal at once. Nothing is
        written into the state before all ranks have verified all that they need. NoSnapshotError if there are
        snapshots and none can be trusted. OSError if a verified file fails while it is copied.
        """
        started = time.monotonic()
        rejections: list[Rejection] = []

        def reject(step: int, tier: Tier, error: SnapshotDamagedError) -> None:
            rejections.append(Rejection(step=step, tier=tier, reason=str(error)))
            report(rejections[-1])

        found: tuple[int, int, Tier, dict[str, Any]] | None = None
        if ram_step >= 0:
            found = self._load_from_ram(ram_step, agree, broadcast, reject)
        if found is None:
            found = self._load_from_disk(agree, broadcast, reject)
        self._forget_after(-1 if found is None else found[0])
        if found is None:
            return None
        step, generation, tier, scalars = found
        seconds = time.monotonic() - started
        return LoadedSnapshot(
            step=step, generation=generation, tier=tier, scalars=scalars, rejections=tuple(rejections), seconds=seconds
        )

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

        One that is being sent to peers only if there is no other: its receiver will notice.
        """
        ages = {n: c.age for n, slot in enumerate(self._slots) if (c := slot.segment.control) is not None}
        newest = max(ages, key=lambda number: ages[number], default=-1)
        candidates = [
            (slot.segment.held, ages.get(number, (-1, -1)), number)
            for number, slot in enumerate(self._slots)
            if number not in ages or (number != newest and slot.segment.state is not SlotState.TO_PERSIST)
        ]
        assert candidates, "more than one slot waits to be persisted"
        return self._slots[min(candidates)[2]]

    def _forget_after(self, step: int) -> None:
        """Steps beyond the one loaded will be made anew: the old ones must not be found by a later restart."""
        for slot in self._slots:
            control = slot.segment.control
            if control is not None and control.step > step and slot.segment.state is SlotState.COMPLETE:
                slot.segment.state = SlotState.EMPTY

    def _load_from_ram(
        self, step: int, agree: Callable[[bool], bool], broadcast: Callable[[list[int]], list[int]], reject: _Reject
    ) -> tuple[int, int, Tier, dict[str, Any]] | None:
        held = [control for slot in self._slots if (control := slot.segment.control) is not None]
        own = max((control.generation for control in held if control.step == step), default=-1)
        generation = broadcast([own])[0]
        candidate: tuple[SlotViews, ShardMeta] | None = None
        try:
            candidate = self._ram_candidate(step, generation)
        except SnapshotDamagedError as error:
            reject(step, "ram", error)
        if not agree(candidate is not None):
            return None
        assert candidate is not None
        slot, meta = candidate
        with torch.no_grad():
            for local, view in zip(self._flat.tensors, slot.views, strict=True):
                local.tensor.copy_(view)
        self._give_back(lambda name: msgspec.json.decode(meta.shard.leaves[name]))
        return step, generation, "ram", decode_values(meta.shard.scalars)

    def _ram_candidate(self, step: int, generation: int) -> tuple[SlotViews, ShardMeta]:
        for slot in self._slots:
            control = slot.segment.control
            if control is None or (control.step, control.generation, control.rank) != (step, generation, self.rank):
                continue
            name = slot.segment.path.name
            if control.layout != self._plan.digest:
                raise SnapshotDamagedError(f"{name}: is of another layout")
            data = slot.segment.data[: control.size_bytes]
            if (found := checksum(data)) != control.checksum:
                raise SnapshotDamagedError(f"{name}: checksum {found}, should be {control.checksum}")
            length = header_size_bytes(bytes(data[:8]), control.size_bytes, name)
            return slot, parse_header(bytes(data[:length]), control.size_bytes, found, name)
        raise SnapshotDamagedError(f"no whole snapshot of step {step} in this rank's memory")

    def _load_from_disk(
        self, agree: Callable[[bool], bool], broadcast: Callable[[list[int]], list[int]], reject: _Reject
    ) -> tuple[int, int, Tier, dict[str, Any]] | None:
        steps = disk.committed_steps(self.run_dir) if self.rank == 0 else []
        seen = broadcast([value for step in steps for value in (step, disk.manifest_checksum(self.run_dir, step))])
        listed = list(zip(seen[::2], seen[1::2], strict=True))
        reason = ""
        for step, manifest in listed:
            candidate: DiskCandidate | None = None
            try:
                candidate = open_candidate(
                    self.run_dir, step, manifest, self._flat.tensors, self._leaf_names, self.rank, self.world_size
                )
            except SnapshotDamagedError as error:
                reject(step, "disk", error)
                reason = reason or f" ({error})"
            if agree(candidate is not None):
                assert candidate is not None
                with torch.no_grad():
                    candidate.copy_into(self._flat.tensors)
                self._give_back(candidate.leaf)
                return step, candidate.manifest.generation, "disk", candidate.scalars
        if listed:
            raise NoSnapshotError(
                f"none of the {len(listed)} snapshots in {disk.checkpoints_dir(self.run_dir)} can be loaded{reason}: "
                "repair one, or move that folder away to train from the beginning"
            )
        return None

    def _give_back(self, leaf: Callable[[str], Any]) -> None:
        for key, owner in self.state.items():
            owner.load_state_dict(rebuild(key, owner.state_dict(), leaf))
