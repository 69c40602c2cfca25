"""The step loop: read, compute, vote, update, snapshot."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing.keep import VALIDATION_LOSS
from checkpointing.layout import Json
from checkpointing.segment import PersistTo
from checkpointing.verify import committed_generation
from configs.precision import LOW
from parallelism.clock import Part
from parallelism.schedule import learning_rate
from trainer.build import Rank
from trainer.canary import CanaryError, differs
from trainer.events import FactKind, Phase, StepRecord
from trainer.metrics import host_memory_gib, peak_tflops, utilisation_pct
from trainer.numbers import NUMBERS, Finding
from trainer.replay import Work
from trainer.trouble import leave_update_out, wait_to_go_back
from trainer.validation import Measured

_DRAIN_POLL_S = 0.005
_RETRY_S = 5.0


@dataclass(frozen=True)
class Vote:
    """What all ranks agreed on. busy: some rank still persists. loss: the step's mean loss over all ranks.

    clock_due: rank 0 says that it is time for the run directory to get a snapshot. grad_norm: rank 0's, for all ranks
    to judge; split: it is not everybody's.
    """

    leave: bool
    busy: bool
    clock_due: bool
    loss: float
    grad_norm: float
    split: bool


@dataclass(frozen=True)
class StepStats:
    """What a finished step is worth telling. Seconds; the loss is this rank's share."""

    loss: Tensor
    grad_norm: float
    lr: float
    skipped: bool
    data_s: float
    stall_s: float
    batch: int


def train(rank: Rank) -> None:
    """Train to the last step, or until all ranks agree to leave; the last step's state is staged for the disk."""
    heart, last = rank.context.heart, rank.config.training.steps
    began_s = time.monotonic()
    while rank.step < last:
        stats, vote = run_step(rank, rank.step + 1)
        rank.step += 1
        rank.tokens_seen += rank.engine.global_tokens
        ended_s = time.monotonic()
        rank.measured = measure(rank, vote)
        heart.beat(Phase.SNAPSHOT, last_step_s=ended_s - began_s)
        rank.unpublished = make_record(rank, stats, ended_s - began_s)
        began_s = ended_s if rank.measured is None else time.monotonic()
        if rank.stretch is not None and not vote.leave:
            publish(rank)
            wait_to_go_back(rank)
        snapshot(rank, vote, final=rank.step == last or vote.leave)
        rank.clock.finish()
        if rank.copies is None:
            publish(rank)
        if vote.leave:
            rank.context.note(FactKind.STOPPING, "asked to leave; state saved")
            break
    secure(rank)
    publish(rank)


def measure(rank: Rank, vote: Vote) -> Measured | None:
    """The validation loss after this step, if it is due; a job that was asked to leave has no time for it."""
    if rank.validation is None or vote.leave or not rank.validation.due(rank.step):
        return None
    with rank.engine.clock.paused():
        return rank.validation.measure()


def secure(rank: Rank) -> None:
    """Stay until the last step's snapshot is whole on disk, trying again where a disk was full, within bounds.

    What the bound cuts off is not hidden: the supervisor ends the run as unsaved.
    """
    deadline_s = time.monotonic() + rank.config.cluster.leave_timeout_s
    retry_s = time.monotonic() + _RETRY_S
    rank.snapshots.wait()
    while not is_secure(rank) and time.monotonic() < deadline_s:
        rank.context.heart.beat(Phase.SNAPSHOT)
        time.sleep(_DRAIN_POLL_S)
        if time.monotonic() > retry_s and not rank.snapshots.persist_busy:
            rank.snapshots.stage(rank.step, persist=PersistTo.RUN, scalars=scalars(rank))
            rank.snapshots.wait()
            retry_s = time.monotonic() + _RETRY_S


def is_secure(rank: Rank) -> bool:
    """Whether this generation's snapshot of the last step is committed."""
    return committed_generation(rank.context.run_dir, rank.step) == rank.context.start.generation


def run_step(rank: Rank, step: int) -> tuple[StepStats, Vote]:
    """One optimizer step. The weights change only if the numbers of all ranks are sane."""
    heart, engine, clock = rank.context.heart, rank.engine, rank.engine.clock
    heart.beat(Phase.DATA, step)
    clock.begin(step)
    began_s = time.monotonic()
    batch = rank.data.get(step)
    data_s = time.monotonic() - began_s
    clock.switch(Part.OTHER)
    if rank.ledger is not None:
        rank.tell_once(rank.ledger.append(step, batch.first, batch.count, batch.digest, batch.passed))
    work = rank.replay.first(batch)
    rank.integrity.gradients_done(step)
    # The weights may not change under a copy of them.
    clock.switch(Part.SNAPSHOT)
    stall_s = rank.snapshots.wait()
    # A first step waits, too: one of its state's copies may have just become a new node's own shard.
    if rank.copies is not None and rank.policy.copies(step - 1) and (step > rank.first_step or rank.from_memory):
        clock.switch(Part.WAIT)
        stall_s += rank.copies.wait()
    clock.switch(Part.OTHER)
    heart.beat(Phase.VOTE)
    lr = learning_rate(rank.config.optimizer, rank.config.training.steps, step)
    doubted = rank.integrity.check(step, work.grad_norm, lr)
    vote, finding = judge(rank, step, work)
    # Every rank's copies of the step before are whole by now: nothing can take it back any more.
    publish(rank)
    if why := rank.replay.reason(step, doubted or vote.split, finding):
        doubted = doubted or vote.split
        work = rank.replay.examine(batch, work, why)
        vote, finding = judge(rank, step, work)
        if doubted:
            rank.integrity.agree(work.grad_norm, lr, vote.split)
    if step == rank.first_step and rank.canary is not None:
        check_canary(rank, work.loss, rank.canary)
    heart.beat(Phase.OPTIMIZER)
    if finding is not None:
        leave_update_out(rank, batch, finding)
    else:
        rank.layers.look(step)
        engine.optimizer_step(lr, step)
        rank.stretch = rank.watch.applied(step, vote.loss, vote.grad_norm)
    rank.integrity.remember(step + 1)
    return StepStats(work.loss, float(work.grad_norm), lr, finding is not None, data_s, stall_s, batch.batch), vote


def judge(rank: Rank, step: int, work: Work) -> tuple[Vote, Finding | None]:
    """What all ranks agree on, and what is wrong with the step's numbers, if anything. Collective."""
    vote = take_vote(rank, work)
    return vote, rank.watch.judge(step, vote.loss, vote.grad_norm)


def take_vote(rank: Rank, work: Work) -> Vote:
    """Agree on the step's numbers, whether to leave, and what the disk needs. One small collective.

    Sums come out the same on every rank, to the last bit, so that all of them judge alike. That of the norms, which are
    fp32 and equal, is exact: it is so many times rank 0's, or some rank has another one.
    """
    clock_due = rank.context.rank == 0 and rank.policy.clock_due(time.monotonic() - rank.persisted_s)
    share, norm = float(work.loss) if rank.tells_loss else 0.0, float(work.grad_norm)
    first_norm = norm if rank.context.rank == 0 else 0.0
    mine = [rank.context.leave_requested, rank.snapshots.persist_busy, clock_due, share, first_norm, norm]
    ballot = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(ballot)
    leave, busy, due, loss_avg, grad_norm, norms = ballot.tolist()
    split = math.isfinite(grad_norm) and norms != grad_norm * dist.get_world_size()
    return Vote(leave > 0, busy > 0, due > 0, loss_avg, grad_norm, split)


def check_canary(rank: Rank, loss: Tensor, expected: float) -> None:
    """Compare the first loss after a load with the run's own. Collective. CanaryError, on all ranks, if it differs."""
    found, _ = rank.engine.global_loss(loss)
    if not differs(expected, found, rank.config.checkpoint.canary_tolerance):
        return
    generation, step = rank.loaded
    detail = f"step {rank.first_step} has loss {found} from the snapshot of step {step}, and was logged with {expected}"
    if rank.context.rank == 0:
        rank.context.note(FactKind.SNAPSHOT_DISTRUSTED, detail, step=step, generation=generation)
    raise CanaryError(detail)


def snapshot(rank: Rank, vote: Vote, final: bool) -> None:
    """Begin to copy the state to shared memory, if the step is due; the next step waits for the copy, not this one."""
    feed = rank.policy.feed(rank.step, final, vote.busy, vote.clock_due)
    # What the run may have to go back to must not be pushed out by what it would go back from.
    if not feed.stage or (rank.watch.unsettled(rank.step) and not final):
        return
    rank.context.heart.beat(Phase.SNAPSHOT)
    deadline_s = time.monotonic() + rank.config.cluster.leave_timeout_s
    while final and rank.snapshots.persist_busy and time.monotonic() < deadline_s:
        # A slow disk is no hang: every beat here counts as progress.
        rank.context.heart.beat(Phase.SNAPSHOT)
        time.sleep(_DRAIN_POLL_S)
    # A disk that is stuck still keeps the last slot: the run will end as unsaved, but it will end.
    persist = PersistTo.NOTHING if rank.snapshots.persist_busy else feed.persist
    if persist & PersistTo.RUN:
        rank.persisted_s = time.monotonic()
    rank.engine.clock.switch(Part.SNAPSHOT)
    rank.snapshots.stage(rank.step, persist=persist, scalars=scalars(rank))


def scalars(rank: Rank) -> dict[str, Json]:
    """What a snapshot says beside tensors: its step's own row, too, which may not have reached metrics.jsonl."""
    row = None if rank.unpublished is None else msgspec.to_builtins(rank.unpublished)
    loss = None if rank.measured is None else rank.measured.loss
    numbers = msgspec.to_builtins(rank.watch.state)
    return {"tokens_seen": rank.tokens_seen, VALIDATION_LOSS: loss, "record": row, NUMBERS: numbers}


def make_record(rank: Rank, stats: StepStats, step_s: float) -> StepRecord | None:
    """The step's line of metrics, on rank 0 and on the steps that are logged. Collective on those steps."""
    step, config = rank.step, rank.config
    if rank.context.rank == 0 and step == rank.first_step:
        rank.context.note(FactKind.FIRST_STEP, seconds=time.monotonic() - rank.started_s)
    measured = rank.measured or Measured(None, 0.0)
    if step % config.telemetry.log_interval_steps and step != config.training.steps and rank.measured is None:
        return None
    loss_avg, loss_max = rank.engine.global_loss(stats.loss)
    z_loss = rank.engine.global_loss(rank.engine.z_loss)[0] if config.training.z_loss else None
    if rank.context.rank != 0:
        return None
    experts = rank.layers.take_balance()
    tokens_per_s = rank.engine.global_tokens / step_s / config.world_size
    tflops = tokens_per_s * rank.engine.flops_per_token / 1e12
    memory_gib, memory_pct = _memory(rank.device)
    card = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else ""
    low = LOW.get(rank.engine.precision.recipe)
    return StepRecord(
        step=step,
        steps=config.training.steps,
        generation=rank.context.start.generation,
        t_wall_s=time.time(),
        step_s=step_s,
        data_s=stats.data_s,
        stall_s=stats.stall_s,
        loss_avg=_finite(loss_avg),
        loss_max=_finite(loss_max),
        grad_norm=_finite(stats.grad_norm),
        lr=stats.lr,
        tokens_seen=rank.tokens_seen,
        tokens_per_sec_per_gpu=tokens_per_s,
        tflops_per_gpu=tflops,
        mfu_pct=utilisation_pct(tflops, peak_tflops(card)),
        mfu_recipe_pct=utilisation_pct(tflops, peak_tflops(card, low.bits)) if low else None,
        recipe=rank.engine.precision.recipe,
        converted=rank.engine.converted,
        memory_gib=memory_gib,
        memory_pct=memory_pct,
        skipped=stats.skipped,
        validation_loss=measured.loss,
        validation_s=measured.seconds,
        batch=stats.batch,
        z_loss=None if z_loss is None else _finite(z_loss),
        expert_entropy=None if experts is None else experts.entropy,
        expert_max_over_mean=None if experts is None else experts.max_over_mean,
        ranks=config.world_size,
    )


def publish(rank: Rank) -> None:
    """Write the line of metrics that is still to be written, if there is one."""
    record, rank.unpublished = rank.unpublished, None
    if record is not None:
        rank.tell_once(rank.metrics.keep(record))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _memory(device: torch.device) -> tuple[float, float | None]:
    if device.type != "cuda":
        return host_memory_gib(), None
    used = torch.cuda.max_memory_reserved(device)
    return used / (1 << 30), 100.0 * used / torch.cuda.get_device_properties(device).total_memory
