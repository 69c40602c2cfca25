"""Loading, down the ladder: this rank's memory, then snapshot after snapshot, each repaired if it can be.

Nothing is written into live tensors before every rank has verified all the bytes that it needs.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from checkpointing import disk
from checkpointing.candidates import NoSnapshotError, list_candidates, read_candidate, read_same_candidate
from checkpointing.flatten import FlatState, LocalTensor, Stateful, rebuild
from checkpointing.layout import (
    Manifest,
    ShardMeta,
    SnapshotDamagedError,
)
from checkpointing.repair import Progress, Repair, Repairer, Scratch
from checkpointing.restore import DiskCandidate, decode_values, plan_candidate
from checkpointing.retention import commit_pulled
from checkpointing.segment import CONTROL_BYTES, Control, SlotState
from checkpointing.shardfile import header_size_bytes, parse_header
from checkpointing.shardwriter import words
from checkpointing.slots import opened
from checkpointing.sources import ShardSource, SnapshotSource
from checkpointing.staging import SlotViews, read_back

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


@dataclass(frozen=True)
class Ranks:
    """All ranks of the job. agree: whether all said yes; broadcast: rank 0's list on every rank. Both collective."""

    rank: int
    world_size: int
    agree: Callable[[bool], bool]
    broadcast: Callable[[list[int]], list[int]]


@dataclass(frozen=True)
class Reports:
    """Who hears at once what happens. trouble: a line of words; progress: bytes done and in all, of this rank."""

    rejected: Callable[[Rejection], None] = lambda rejection: None
    repaired: Callable[[Repair], None] = lambda repair: None
    trouble: Callable[[str], None] = lambda words: None
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None


@dataclass(frozen=True)
class Places:
    """Where snapshots can be had. sources: for single shards, near ones first; far: for whole snapshots too.

    rejected: (generation, step) of snapshots that must not be loaded. scratch_dir: for files that the run directory
    does not take.
    """

    run_dir: Path
    sources: Sequence[ShardSource] = ()
    far: SnapshotSource | None = None
    rejected: Container[tuple[int, int]] = ()
    scratch_dir: Path | None = None


@dataclass(frozen=True)
class Target:
    """What is to be filled: this rank's state, and the slots of its memory. layout: digest that a slot must have."""

    state: Mapping[str, Stateful]
    flat: FlatState
    leaf_names: frozenset[str]
    layout: str
    slots: Sequence[SlotViews]


class _Found(msgspec.Struct, frozen=True):
    age: tuple[int, int]
    tier: Tier
    scalars: dict[str, Any]


class Loader:
    """One load of one rank. All ranks call load() together."""

    def __init__(self, target: Target, ranks: Ranks, places: Places, reports: Reports) -> None:
        self.target = target
        self.ranks = ranks
        self.places = places
        self.reports = reports
        self._rejections: list[Rejection] = []
        self._manifest = b""
        self._written = False

    def load(self, ram_step: int) -> LoadedSnapshot | None:
        """Load the nearest, newest snapshot that every rank can verify; None if there is none at all.

        First this rank's memory, if ram_step >= 0, then the run directory and the bucket, newest first.

        Raises:
            NoSnapshotError: if there are snapshots and none can be trusted, or none can be reached.
            OSError: if a file fails while it is copied, or memory turns out to be damaged and there is nothing else:
                the state is then worthless.
        """
        started = time.monotonic()
        found = self._load_from_ram(ram_step) if ram_step >= 0 else None
        if found is None:
            found = self._load_from_disk()
        self._forget(-1 if found is None else found.age[1])
        if found is None and self._written:
            raise OSError(errno.EIO, f"nothing but memory had step {ram_step}, and that is damaged on some rank")
        if found is None:
            return None
        return LoadedSnapshot(
            step=found.age[1],
            generation=found.age[0],
            tier=found.tier,
            scalars=found.scalars,
            rejections=tuple(self._rejections),
            seconds=time.monotonic() - started,
        )

    def _reject(self, step: int, tier: Tier, error: SnapshotDamagedError) -> None:
        self._rejections.append(Rejection(step=step, tier=tier, reason=str(error)))
        self.reports.rejected(self._rejections[-1])

    def _forget(self, step: int) -> None:
        """Steps beyond the one loaded will be made anew, and wrong ones stay wrong: no later restart may find them."""
        for slot in self.target.slots:
            control = slot.segment.control
            if control is None or slot.segment.state is not SlotState.COMPLETE:
                continue
            if control.step > step or control.age in self.places.rejected:
                slot.segment.state = SlotState.EMPTY

    def _load_from_ram(self, step: int) -> _Found | None:
        held = [control for slot in self.target.slots if (control := slot.segment.control) is not None]
        own = max((control.generation for control in held if control.step == step), default=-1)
        generation = self.ranks.broadcast([own])[0]
        meta: ShardMeta | None = None
        try:
            meta = self._fill_from_ram(step, generation)
        except SnapshotDamagedError as error:
            self._reject(step, "ram", error)
        if not self.ranks.agree(meta is not None):
            return None
        assert meta is not None
        self._give_back(lambda name: msgspec.json.decode(meta.shard.leaves[name]))
        return _Found((generation, step), "ram", decode_values(meta.shard.scalars))

    def _fill_from_ram(self, step: int, generation: int) -> ShardMeta:
        """Fill the live tensors from this rank's memory. SnapshotDamagedError if there is no whole copy; they may then
        hold anything, and whatever is loaded instead fills them all."""
        if (generation, step) in self.places.rejected:
            raise SnapshotDamagedError(f"step {step} of generation {generation} has been rejected before")
        problems = []
        for slot in self.target.slots:
            control = slot.segment.control
            wanted = (step, generation, self.ranks.rank)
            if control is None or (control.step, control.generation, control.rank) != wanted:
                continue
            if control.layout != self.target.layout or control.size_bytes != slot.plan.size_bytes:
                problems.append(f"{slot.segment.path.name}: is of another layout")
                continue
            self._written = True
            try:
                return _fill_from(slot, control, self.target.flat.tensors)
            except SnapshotDamagedError as error:
                problems.append(str(error))
        raise SnapshotDamagedError("; ".join(problems) or f"no whole snapshot of step {step} in this rank's memory")

    def _load_from_disk(self) -> _Found | None:
        ages, rejected = self._agreed_candidates()
        with closing(Scratch(self.places.scratch_dir)) as scratch:
            for age in ages:
                manifest = self._agreed_manifest(age)
                found = None if manifest is None else self._load_candidate(manifest, scratch)
                if found is not None:
                    return found
        if ages or rejected:
            raise NoSnapshotError(self._none_left(len(ages), rejected))
        return None

    def _agreed_candidates(self) -> tuple[list[tuple[int, int]], int]:
        """Rank 0's list of ages, newest first, on every rank, and how many are rejected already."""
        error: NoSnapshotError | None = None
        mine: list[int] = []
        if self.ranks.rank == 0:
            places = self.places
            try:
                found = list_candidates(places.run_dir, places.far, places.rejected, self.reports.trouble)
                mine = [1, found.rejected, *(number for age in found.ages for number in age)]
            except NoSnapshotError as raised:
                mine, error = [0, 0], raised
        known, rejected, *numbers = self.ranks.broadcast(mine)
        if not known:
            raise error or NoSnapshotError("rank 0 found no snapshot that it could reach")
        return list(zip(numbers[::2], numbers[1::2], strict=True)), rejected

    def _agreed_manifest(self, age: tuple[int, int]) -> Manifest | None:
        """The manifest that rank 0 finds for a snapshot, on every rank; None, on every rank, if one cannot have it."""
        run_dir, far = self.places.run_dir, self.places.far
        manifest: Manifest | None = None
        seen = -1
        try:
            if self.ranks.rank == 0:
                self._manifest, manifest = read_candidate(run_dir, far, age)
                seen = disk.bytes_checksum(self._manifest)
            seen = self.ranks.broadcast([seen])[0]
            if self.ranks.rank != 0 and seen >= 0:
                manifest = read_same_candidate(run_dir, far, age, seen)
        except SnapshotDamagedError as error:
            self._reject(age[1], "disk", error)
            if self.ranks.rank == 0:
                seen = self.ranks.broadcast([-1])[0]
        return manifest if seen >= 0 and self.ranks.agree(manifest is not None) else None

    def _load_candidate(self, manifest: Manifest, scratch: Scratch) -> _Found | None:
        """Load this one, repaired if need be; None, on every rank, if some rank cannot."""
        target, ranks = self.target, self.ranks
        candidate: DiskCandidate | None = None
        try:
            candidate = plan_candidate(manifest, target.flat.tensors, target.leaf_names, ranks.rank, ranks.world_size)
        except SnapshotDamagedError as error:
            self._reject(manifest.step, "disk", error)
        if not ranks.agree(candidate is not None):
            return None
        assert candidate is not None
        folder = disk.step_dir(self.places.run_dir, manifest.step)
        if ranks.rank == 0 and self._is_news(manifest):
            with suppress(OSError):  # a run directory that takes no file takes no shard either
                disk.begin_pull(folder)
        far = () if self.places.far is None else (self.places.far,)
        repairer = Repairer(
            self.places.run_dir, (*self.places.sources, *far), scratch, self.reports.repaired,
            Progress(self.reports.progress),
        )  # fmt: skip
        try:
            whole = self._all_whole(manifest, candidate, repairer)
        finally:
            if ranks.rank == 0:
                disk.end_pull(folder)
        if whole is None:
            return None
        with torch.no_grad():
            candidate.copy_into(target.flat.tensors, whole, repairer.digests)
        self._give_back(candidate.leaf)
        return _Found((manifest.generation, manifest.step), "disk", candidate.scalars)

    def _all_whole(self, manifest: Manifest, candidate: DiskCandidate, repairer: Repairer) -> dict[int, Path] | None:
        """Verified files of all shards that this rank needs, by number; None, on every rank, if some rank lacks one."""
        ranks = self.ranks
        # Each rank looks after a part of the files, needed by it or not: all are then whole for whoever needs them.
        share = range(ranks.rank, len(manifest.shards), ranks.world_size)
        whole = self._paths(manifest, share, {}, repairer, in_place=True)
        if not ranks.agree(whole is not None):
            return None
        assert whole is not None
        in_place = ranks.agree(not repairer.elsewhere)
        whole = self._paths(manifest, candidate.files, whole, repairer, in_place=False)
        if not ranks.agree(whole is not None):
            return None
        if in_place and ranks.rank == 0 and self._is_news(manifest):
            self._commit(manifest)
        return whole

    def _paths(
        self, manifest: Manifest, numbers: Sequence[int], known: Mapping[int, Path], repairer: Repairer, in_place: bool
    ) -> dict[int, Path] | None:
        """Verified files by their numbers, beside those that are known; None if one cannot be had."""
        found = dict(known)
        try:
            for number in numbers:
                if number not in found:
                    found[number] = repairer.make_whole(manifest, manifest.shards[number], in_place)
        except SnapshotDamagedError as error:
            self._reject(manifest.step, "disk", error)
            return None
        return found

    def _commit(self, manifest: Manifest) -> None:
        """Commit what came from the bucket in the run directory, too."""
        try:
            commit_pulled(self.places.run_dir, manifest, self._manifest)
        except OSError as error:
            detail = f"step {manifest.step} is loaded, but not committed in the run directory: {words(error)}"
            self.reports.trouble(detail)

    def _is_news(self, manifest: Manifest) -> bool:
        """Whether the run directory has neither this snapshot nor a newer one of its step."""
        return disk.read_generation(self.places.run_dir, manifest.step) < manifest.generation

    def _none_left(self, tried: int, rejected: int) -> str:
        reason = f" ({self._rejections[0].reason})" if self._rejections else ""
        before = f", {rejected} more had been rejected before" if rejected else ""
        where = disk.checkpoints_dir(self.places.run_dir)
        also = "" if self.places.far is None else f" and {self.places.far.name}"
        return (
            f"none of the {tried} snapshots in {where}{also} can be loaded{reason}{before}: "
            "repair one, or move that folder away to train from the beginning"
        )

    def _give_back(self, leaf: Callable[[str], Any]) -> None:
        for key, owner in self.target.state.items():
            owner.load_state_dict(rebuild(key, owner.state_dict(), leaf))


def _fill_from(slot: SlotViews, control: Control, tensors: Sequence[LocalTensor]) -> ShardMeta:
    """Fill the live tensors and return what the slot's header says. SnapshotDamagedError if a byte that was read is not
    what was written: it is the bytes that were taken that are summed, not those of another look at them."""
    name = slot.segment.path.name
    try:
        with opened(slot.segment.path) as fd, torch.no_grad():
            found = read_back(slot, tensors, fd)
            if found != control.checksum:
                raise SnapshotDamagedError(f"{name}: checksum {found}, should be {control.checksum}")
            length = header_size_bytes(os.pread(fd, 8, CONTROL_BYTES), control.size_bytes, name)
            header = os.pread(fd, length, CONTROL_BYTES)
    except OSError as error:
        raise SnapshotDamagedError(f"{name}: {error}") from error
    return parse_header(header, control.size_bytes, found, name)
