"""Finds the state to go on from, wherever it is, and what the run itself says about it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from checkpointing.candidates import any_snapshot
from checkpointing.manager import LoadedSnapshot, NoSnapshotError, Rejection, SnapshotManager
from checkpointing.node_disk import NodeDisk
from checkpointing.repair import Repair
from checkpointing.sources import ShardSource, SnapshotSource
from checkpointing.transfer_client import PeerSource
from configs.schema import JobConfig
from trainer.canary import logged_record
from trainer.events import FactKind, LineFile, Phase, StepRecord
from trainer.history import Refused
from trainer.main import DoNotRestartError, RankContext
from trainer.paths import metrics_path, transfer_key_path

_TELL_EVERY_S = 5.0


def bucket(config: JobConfig) -> SnapshotSource | None:
    """Where snapshots are kept far away; None if nowhere. boto3 is loaded only if it is needed."""
    if not config.s3.bucket:
        return None
    from checkpointing.s3 import Bucket

    return Bucket(config.s3, config.run.name)


def has_snapshot(context: RankContext, far: SnapshotSource | None) -> bool:
    """Whether there is a state to go on from. Collective: rank 0 looks, as a commit now must not make ranks disagree.

    Raises:
        SourceError: on rank 0, if only the bucket could have one and cannot be reached.
    """
    abandoned = Refused(abandoned=context.start.abandoned)
    found = context.start.ram_step >= 0 or (context.rank == 0 and any_snapshot(context.run_dir, far, abandoned))
    return bool(rank0_says([int(found)])[0])


def resume(context: RankContext, snapshots: SnapshotManager, far: SnapshotSource | None) -> LoadedSnapshot:
    """Load the nearest, newest snapshot that all ranks can verify, and say what was loaded, refused and repaired.

    Raises:
        DoNotRestartError: there are snapshots, and none can be trusted.
    """
    began_s = time.monotonic()
    start, teller = context.start, _Progress(context)

    def rejected(rejection: Rejection) -> None:
        # What is wrong in memory says nothing about the run directory's snapshot of the same step.
        kind = FactKind.MEMORY_REJECTED if rejection.tier == "ram" else FactKind.SNAPSHOT_REJECTED
        context.note(kind, f"{rejection.tier}: {rejection.reason}", step=rejection.step)

    def repaired(repair: Repair) -> None:
        detail = f"{repair.file} fetched from {repair.source}, since {repair.reason}"
        context.note(FactKind.SNAPSHOT_REPAIRED, detail, step=repair.step, generation=repair.generation)

    try:
        loaded = snapshots.load(
            start.ram_step, all_agree, rank0_says, rejected,
            sources=_sources(context), far=far, rejected=Refused(start.rejected, start.abandoned),
            scratch_dir=Path(start.node_dir) if start.node_dir else None,
            repaired=repaired, trouble=lambda words: context.note(FactKind.TIER_BEHIND, words), progress=teller.tell,
        )  # fmt: skip
    except NoSnapshotError as error:
        raise DoNotRestartError(
            f"{error}; restore a snapshot from a copy, or remove {context.run_dir / 'checkpoints'} to begin again"
        ) from error
    if loaded is None:
        raise RuntimeError("the snapshot that the supervisor named is in no tier any more")
    if context.rank == 0:
        context.note(FactKind.LOADED, f"from {loaded.tier}", seconds=time.monotonic() - began_s, step=loaded.step)
    return loaded


def complete_metrics(metrics: LineFile, loaded: LoadedSnapshot) -> None:
    """Write the loaded step's row if the process that computed it was lost before it could."""
    row = loaded.scalars.get("record")
    if row is None:
        return
    record = msgspec.convert(row, StepRecord)
    if logged_record(metrics.path, loaded.step, record.generation) is None:
        metrics.keep(record)


def canary(
    context: RankContext, config: JobConfig, loaded: LoadedSnapshot, batch: int, recipe: str
) -> float | None:  # fmt: skip
    """The loss that was logged for the step after the loaded one, the same answer on every rank. Collective.

    batch, recipe: what that step reads, and is computed in, now; a loss on another batch or in another recipe says
    nothing.
    """
    found = None
    if context.rank == 0:
        found = logged_record(metrics_path(context.run_dir), loaded.step + 1, loaded.generation)
    if found is not None and found.batch and found.batch != batch:
        found = None
    if found is not None and found.recipe not in ("", recipe):
        found = None
    loss = found.loss_avg if found is not None and config.checkpoint.canary_tolerance > 0 else None
    box = torch.tensor([math.nan if loss is None else loss], dtype=torch.float64)
    dist.broadcast(box, 0)
    return None if math.isnan(box.item()) else float(box.item())


def all_agree(mine: bool) -> bool:
    """Whether every rank says yes. Collective."""
    vote = torch.tensor([0 if mine else 1], dtype=torch.int32)
    dist.all_reduce(vote)
    return vote.item() == 0


def rank0_says(numbers: list[int]) -> list[int]:
    """Rank 0's list, on every rank. Collective."""
    box = torch.tensor([len(numbers)], dtype=torch.int64)
    dist.broadcast(box, 0)
    values = torch.zeros(int(box.item()), dtype=torch.int64)
    if dist.get_rank() == 0:
        values = torch.tensor(numbers, dtype=torch.int64)
    if len(values):
        dist.broadcast(values, 0)
    return [int(v) for v in values]


def _sources(context: RankContext) -> Sequence[ShardSource]:
    """Where a damaged shard can be had whole, near ones first; the bucket comes after all of them."""
    start = context.start
    sources: list[ShardSource] = [NodeDisk(Path(start.node_dir))] if start.node_dir else []
    if start.peers:
        sources.append(PeerSource(transfer_key_path(context.run_dir).read_bytes(), start.peers))
    return sources


class _Progress:
    """Lets a long load be seen: a heartbeat for every call, and a line every few seconds."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self._told_s = time.monotonic()

    def tell(self, done_bytes: int, total_bytes: int) -> None:
        self.context.heart.beat(Phase.LOADING)
        if self.context.rank == 0 and time.monotonic() - self._told_s > _TELL_EVERY_S:
            self._told_s = time.monotonic()
            share = f"{done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB"
            self.context.note(FactKind.LOADING, f"rank 0 has verified {share} of its part")
