"""Puts a rank together: engine, data, snapshots, and the state it resumes from."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from checkpointing.manager import LoadedSnapshot, SnapshotManager
from checkpointing.policy import TierPolicy
from checkpointing.segment import SLOTS, SLOTS_WITH_COPIES
from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World, loss_ranks
from trainer.copies import CopyWait
from trainer.data import Prefetcher, StepReader
from trainer.events import FactKind, LineFile, Phase, StepRecord
from trainer.history import batch_of, union
from trainer.integrity import Integrity
from trainer.layerprobe import LayerProbe
from trainer.ledger import SampleLedger
from trainer.main import RankContext
from trainer.numbers import NUMBERS, NumbersWatch, Stretch, WatchState
from trainer.paths import metrics_path, segments_dir
from trainer.prepared import read_info
from trainer.replay import Replay
from trainer.resume import bucket, canary, complete_metrics, has_snapshot, resume
from trainer.stepclock import StepClock, start_clock
from trainer.validation import Measured, Validation, build_validation


@dataclass
class Rank:
    """Everything the step loop uses. step is the last one whose update is in the weights.

    first_step: the one this process began with. loaded: (generation, step) of the snapshot that it began with.
    from_memory: whether that was in the nodes' memory. canary: the loss that was logged for first_step, None if none
    was. measured: what the last step's validation gave. unpublished: the row of the last step, while its snapshot is
    not yet safe. persisted_s: monotonic time of the last snapshot for the run directory. eod_id: None where attention
    knows no documents. started_s: monotonic time at which the process began. tells_loss: whether this rank's loss is
    the one of its dp rank. stretch: steps whose batches shall be left out.
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
    policy: TierPolicy
    copies: CopyWait | None
    loaded: tuple[int, int]
    from_memory: bool
    canary: float | None
    persisted_s: float
    validation: Validation | None
    clock: StepClock
    watch: NumbersWatch
    integrity: Integrity
    replay: Replay
    layers: LayerProbe
    tells_loss: bool
    stretch: Stretch | None = None
    unpublished: StepRecord | None = None
    measured: Measured | None = None
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
    far = bucket(config)
    begun = has_snapshot(context, far)
    engine = build_engine(
        config, World(context.rank, context.world_size, context.local_rank, device), init_weights=not begun
    )
    if context.rank == 0 and (engine.precision.low or context.start.recipe):
        context.note(FactKind.PRECISION, _precision_words(engine))
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
        slots=SLOTS_WITH_COPIES if _sends_copies(config) else SLOTS,
    )
    snapshots.prepare()
    stack.callback(snapshots.close)
    metrics = LineFile(metrics_path(context.run_dir))
    loaded = resume(context, snapshots, far) if begun else None
    step = loaded.step if loaded else 0
    if loaded and context.rank == 0:
        complete_metrics(metrics, loaded)
    context.heart.beat(Phase.LOADING, step=step)
    vocab_size = config.model.vocab_size or FAMILIES[config.model.family][config.model.flavor].vocab_size
    left_out = union(((each.first, each.count) for each in config.data.leave_out), context.start.left_out)
    reader = functools.partial(StepReader, config, dp_degree=engine.dp_degree, vocab_size=vocab_size, left_out=left_out)
    data = Prefetcher(reader(engine.dp_rank), step + 1, config.training.steps, config.data.prefetch_steps)
    stack.callback(data.close)
    eod_id = _eod_id(config) if engine.needs_masks else None
    first_of_dp = (engine.coords.pp, engine.coords.cp, engine.coords.tp) == (0, 0, 0)
    return Rank(
        context=context,
        config=config,
        engine=engine,
        data=data,
        ledger=SampleLedger(context.run_dir, engine.dp_rank, context.start.generation) if first_of_dp else None,
        metrics=metrics,
        snapshots=snapshots,
        device=device,
        step=step,
        first_step=step + 1,
        eod_id=eod_id,
        tokens_seen=int(loaded.scalars["tokens_seen"]) if loaded else 0,
        started_s=started_s,
        policy=TierPolicy(config.checkpoint),
        copies=CopyWait(context, snapshots, config.checkpoint.peer_wait_s) if context.start.wait_for_copies else None,
        loaded=(loaded.generation, loaded.step) if loaded else (0, 0),
        from_memory=loaded is not None and loaded.tier == "ram",
        canary=canary(context, config, loaded, batch_of(step + 1, left_out), engine.precision.recipe)
        if loaded
        else None,
        persisted_s=time.monotonic(),
        validation=build_validation(config, engine, context.heart, eod_id, vocab_size),
        clock=start_clock(engine, context, config.health.probe_steps, stack),
        layers=LayerProbe(context, config, engine),
        tells_loss=context.rank in loss_ranks(config.parallelism),
        integrity=Integrity(
            context,
            engine,
            config.integrity.interval_steps,
            step + 1,
            (loaded.generation, loaded.step) if loaded else None,
        ),
        replay=Replay(context, config, engine, reader, eod_id),
        watch=NumbersWatch(config.numbers, config.training.steps, _watch_state(loaded)),
    )


def _precision_words(engine: Engine) -> str:
    precision = engine.precision
    if not precision.low:
        return f"everything in {precision.recipe}"
    return (
        f"{engine.converted} matrices in {precision.recipe} ({precision.backend}), the rest in {precision.param_dtype}"
    )


def _watch_state(loaded: LoadedSnapshot | None) -> WatchState | None:
    """What the loaded state's own run knew of its numbers; imported snapshots know nothing."""
    known = loaded.scalars.get(NUMBERS) if loaded else None
    return None if known is None else msgspec.convert(known, WatchState)


def _sends_copies(config: JobConfig) -> bool:
    """Whether any peer could ever take copies: it decides how many slots there are, which must not change."""
    return config.checkpoint.peer_copies > 0 and config.cluster.nodes + config.cluster.spares > 1


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
