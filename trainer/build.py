"""Puts a rank together: engine, data, snapshots, and the state it resumes from."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from checkpointing.manager import NoSnapshotError, Rejection, SnapshotManager
from checkpointing.verify import list_snapshots
from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World
from trainer.data import Prefetcher, StepReader
from trainer.events import FactKind, LineFile, Phase
from trainer.ledger import SampleLedger
from trainer.main import DoNotRestartError, RankContext
from trainer.paths import metrics_path, segments_dir
from trainer.prepared import read_info


@dataclass
class Rank:
    """Everything the step loop uses. step is the last one whose update is in the weights.

    first_step: the one this process began with. eod_id: None where attention knows no documents. started_s: monotonic
    time at which the process began.
    """

    context: RankContext
    config: JobConfig
    engine: Engine
    data: Prefetcher
    ledger: SampleLedger | None
    metrics: LineFile
    snapshots: SnapshotManager
    device: torch.device
    step: int
    first_step: int
    eod_id: int | None
    tokens_seen: int
    started_s: float
    told: bool = False

    def tell_once(self, problem: OSError | None) -> None:
        """Say, the first time in a row, that the run directory takes no lines; they wait in memory."""
        if problem is not None and not self.told:
            self.context.note(FactKind.SNAPSHOT_FAILED, f"{problem}: metrics and ledger wait in memory")
        self.told = problem is not None


def build_rank(context: RankContext, config: JobConfig, stack: contextlib.ExitStack, started_s: float) -> Rank:
    """Build the model, find the state to go on from, and start reading data. Collective.

    stack closes what must be closed. started_s: monotonic time at which the process began.
    """
    context.heart.beat(Phase.BUILDING)
    device = _device(context.local_rank)
    # Rank 0 looks for all: a commit at this moment must not make ranks disagree.
    on_disk = _rank0_says([int(bool(list_snapshots(context.run_dir)))])[0]
    has_snapshot = context.start.ram_step >= 0 or bool(on_disk)
    engine = build_engine(
        config, World(context.rank, context.world_size, context.local_rank, device), init_weights=not has_snapshot
    )
    context.heart.beat(Phase.LOADING)
    snapshots = SnapshotManager(
        engine.state(),
        ram_dir=segments_dir(context.ram_dir),
        local_rank=context.local_rank,
        rank=context.rank,
        world_size=context.world_size,
        generation=context.start.generation,
        run_dir=context.run_dir,
        mesh=_mesh(config),
    )
    snapshots.prepare()
    stack.callback(snapshots.close)
    step, tokens_seen = _resume(context, snapshots) if has_snapshot else (0, 0)
    context.heart.beat(Phase.LOADING, step=step)
    vocab_size = config.model.vocab_size or FAMILIES[config.model.family][config.model.flavor].vocab_size
    reader = StepReader(config, engine.dp_rank, engine.dp_degree, vocab_size)
    data = Prefetcher(reader, step + 1, config.training.steps, config.data.prefetch_steps)
    stack.callback(data.close)
    first_of_dp = (engine.coords.pp, engine.coords.cp, engine.coords.tp) == (0, 0, 0)
    return Rank(
        context=context,
        config=config,
        engine=engine,
        data=data,
        ledger=SampleLedger(context.run_dir, engine.dp_rank, context.start.generation) if first_of_dp else None,
        metrics=LineFile(metrics_path(context.run_dir)),
        snapshots=snapshots,
        device=device,
        step=step,
        first_step=step + 1,
        eod_id=_eod_id(config) if engine.needs_masks else None,
        tokens_seen=tokens_seen,
        started_s=started_s,
    )


def _resume(context: RankContext, snapshots: SnapshotManager) -> tuple[int, int]:
    began_s = time.monotonic()

    def report(rejection: Rejection) -> None:
        context.note(FactKind.SNAPSHOT_REJECTED, f"{rejection.tier}: {rejection.reason}", step=rejection.step)

    try:
        loaded = snapshots.load(context.start.ram_step, _all_agree, _rank0_says, report)
    except NoSnapshotError as error:
        raise DoNotRestartError(
            f"{error}; restore a snapshot from a copy, or remove {context.run_dir / 'checkpoints'} to begin again"
        ) from error
    if loaded is None:
        raise RuntimeError("the snapshot that the supervisor named is in no tier any more")
    if context.rank == 0:
        context.note(FactKind.LOADED, f"from {loaded.tier}", seconds=time.monotonic() - began_s, step=loaded.step)
    return loaded.step, int(loaded.scalars["tokens_seen"])


def _eod_id(config: JobConfig) -> int:
    """The token that ends a document, which keeps documents apart where attention can."""
    path = config.data.sets[0].path
    info = read_info(Path(path))
    if info is None:
        raise ValueError(
            f"{path}.json is missing, so the end of a document is not known; prepare the set with `everstep data "
            "prepare`, or set model.attention = 'sdpa'"
        )
    return info.eod_id


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _all_agree(mine: bool) -> bool:
    vote = torch.tensor([0 if mine else 1], dtype=torch.int32)
    dist.all_reduce(vote)
    return vote.item() == 0


def _rank0_says(steps: list[int]) -> list[int]:
    box = torch.tensor([len(steps)], dtype=torch.int64)
    dist.broadcast(box, 0)
    values = torch.zeros(int(box.item()), dtype=torch.int64)
    if dist.get_rank() == 0:
        values = torch.tensor(steps, dtype=torch.int64)
    if len(values):
        dist.broadcast(values, 0)
    return [int(v) for v in values]


def _mesh(config: JobConfig) -> dict[str, int]:
    p = config.parallelism
    return {
        "pp": p.pp,
        "dp_replicate": p.dp_replicate,
        "dp_shard": p.dp_shard,
        "cp": p.cp,
        "tp": p.tp,
        "ep": p.ep,
    }
