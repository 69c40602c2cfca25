"""A suspect step is computed again, before its update: here, on other devices, and here once more.

What comes out the same each time is the data's or the learning rate's doing, however odd it is. What does not is the
doing of a device, and sums of what each rank sent tell whose (`parallelism.recorder`). The update is then made of what
came out twice, so that the run keeps the weights that it would have had.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from configs.schema import JobConfig
from parallelism.checksums import checksums
from parallelism.engine import Engine
from parallelism.exchange import gather_ints
from parallelism.mesh import coords_of
from parallelism.recorder import GradientWatch, Recorder, Tape, fold
from trainer.data import document_positions
from trainer.divergence import Divergence, disputed, divergence, is_excused, outvoted
from trainer.events import FactKind, Phase
from trainer.integrity import leave, ranks_in_words

if TYPE_CHECKING:
    from trainer.data import StepBatch
    from trainer.main import RankContext
    from trainer.numbers import Finding

_LONGEST_PAUSE_STEPS = 256


class Reader(Protocol):
    """Reads one dp rank's share of any step."""

    def read(self, step: int) -> StepBatch:
        """The share."""


@dataclass(frozen=True)
class Work:
    """One computation of a step: this rank's share of the loss, the norm of all gradients, and what is known of its
    way: tape of all that was sent, sums of what went into the reduce-scatters, each None if it was not recorded."""

    loss: Tensor
    grad_norm: Tensor
    tape: Tape | None
    shares: tuple[int, ...] | None


@dataclass(frozen=True)
class Trial:
    """A computation, and sums of what came out of it on this rank: local gradients, loss, norm."""

    work: Work
    result: tuple[int, ...]


class Replay:
    """Computes steps on one rank, and again if need be. Every rank calls every method in step.

    reader: reads the share of any dp rank. eod_id: None where attention knows no documents.
    """

    def __init__(
        self, context: RankContext, config: JobConfig, engine: Engine, reader: Callable[[int], Reader],
        eod_id: int | None,
    ) -> None:  # fmt: skip
        self.context = context
        self.config = config
        self.engine = engine
        self.eod_id = eod_id
        self._reader = reader
        self._readers: dict[int, Reader] = {}
        self._gradients = GradientWatch().watch(engine.parts)
        self._always = config.integrity.record_every_step
        layout = config.parallelism
        # Where other ranks' numbers enter what a rank computes, only a tape tells whose differ first.
        self._mixes = layout.pp * layout.tp * layout.cp * layout.ep > 1
        self._stride = _stride(config)
        self._odd = False
        self._doubted = False
        self._next_suspect = 0
        self._pause_steps = 1

    def scheduled(self, step: int) -> bool:
        """Whether a step is replayed whatever comes out."""
        interval = self.config.integrity.replay_interval_steps
        return interval > 0 and step % interval == 0

    def reason(self, step: int, doubted: bool, finding: Finding | None) -> str:
        """Why a step must be computed again before its update, "" if it need not be. The same answer on every rank.

        Odd numbers that turn out to be right are looked at ever more rarely: a job that is full of them costs no more.
        """
        self._odd, self._doubted = finding is not None, doubted
        if doubted:
            return "ranks that must agree did not"
        if finding is not None and self.config.integrity.replay_suspects and step >= self._next_suspect:
            return finding.detail
        return "as scheduled" if self.scheduled(step) else ""

    def first(self, batch: StepBatch) -> Work:
        """Compute a step: forward, backward, clipping."""
        tape = self.scheduled(batch.step) or (self._always and self._mixes)
        return self._compute(batch, self.engine.dp_rank, tape, tape or self._always)

    def examine(self, batch: StepBatch, work: Work, why: str) -> Work:
        """Compute the step again, and find out whose fault it is if it does not come out the same. Collective.

        work: what the first computation gave, whose gradients are still in place.

        Returns:
            The computation that counts; its gradients are in place.

        Raises:
            CorruptionError: there is none that can be trusted.
        """
        began_s = time.monotonic()
        first = Trial(work, self._result(work))
        with self.engine.clock.paused():
            elsewhere = self._elsewhere(batch.step, 1)
            again = self._again(batch)
            if _anywhere(first.result != again.result or first.work.tape not in (None, again.work.tape)):
                counts, told = self._settle(batch, first, again)
            else:
                counts, told = self._compare_devices(batch, again, elsewhere)
                self._pause(batch.step)
        if self.context.rank == 0:
            self.context.note(FactKind.UPDATE_REPLAYED, f"{why}; {told}", seconds=time.monotonic() - began_s)
        return counts

    # Computing ----------------------------------------------------------------------------------------------------

    def _compute(self, batch: StepBatch, dp_rank: int, tape: bool, shares: bool) -> Work:
        engine = self.engine
        self.context.heart.beat(Phase.FORWARD_BACKWARD)
        engine.seed_step(batch.step, dp_rank)
        tokens = torch.from_numpy(batch.tokens)
        positions = None if self.eod_id is None else torch.from_numpy(document_positions(batch.tokens, self.eod_id))
        self._gradients.on = shares
        recorder = Recorder() if tape else None
        with recorder or contextlib.nullcontext():
            loss = engine.forward_backward(tokens, positions)
            grad_norm = engine.clip_grad_norm(self.config.training.max_grad_norm)
        self._gradients.on = False
        sums = tuple(self._gradients.take()) if shares else None
        return Work(loss, grad_norm, recorder.tape() if recorder else None, sums)

    def _again(self, batch: StepBatch) -> Trial:
        self.engine.discard_update()
        self.context.heart.beat(Phase.VOTE)
        work = self._compute(batch, self.engine.dp_rank, True, True)
        return Trial(work, self._result(work))

    def _elsewhere(self, step: int, distance: int) -> int | None:
        """A digest of another dp rank's share, `distance` times the stride away; None if there is no such rank."""
        degree = self.engine.dp_degree
        if distance * self._stride >= degree:
            return None
        share = (self.engine.dp_rank + distance * self._stride) % degree
        if share not in self._readers:
            self._readers[share] = self._reader(share)
        self.engine.discard_update()
        self.context.heart.beat(Phase.VOTE)
        return _digest(self._compute(self._readers[share].read(step), share, False, True))

    def _result(self, work: Work) -> tuple[int, ...]:
        found = [gradient for gradient in self.engine.gradients() if gradient is not None]
        return (*checksums(found).tolist(), *checksums([work.loss, work.grad_norm]).tolist())

    # Judging ------------------------------------------------------------------------------------------------------

    def _settle(self, batch: StepBatch, first: Trial, again: Trial) -> tuple[Work, str]:
        """Two computations on the same devices differ: a third one says which was right."""
        guilty = self._guilty(first, again)
        third = self._again(batch)
        rows = gather_ints([third.result == first.result, third.result == again.result])
        right = next((name for i, name in enumerate(("first", "second")) if all(row[i] for row in rows)), "")
        if not right:
            later = self._guilty(again, third)
            if len(later) != 1 or guilty not in (frozenset(), later):
                return third.work, "each of three computations gave something else: kernels here are not deterministic"
            guilty = later
        self._tell(guilty, "sent other numbers than when it computed the same step again", mended=bool(right))
        # What was doubted has been named by whoever doubted it.
        self._always = self._always or not (guilty or self._doubted)
        if not right:
            leave(self.context, guilty, f"step {batch.step} came out differently each time on {ranks_in_words(guilty)}")
        return third.work, f"results differed; the {right} one came out again, and counts"

    def _compare_devices(self, batch: StepBatch, again: Trial, elsewhere: int | None) -> tuple[Work, str]:
        """All ranks found the same twice: now for those who computed the same share on another device."""
        if elsewhere is None:
            return again.work, "the same result again; no other device computes the same"
        found = {0: _digest(again.work), 1: elsewhere}
        if not disputed(self._by_share(found)):
            return again.work, "the same result again, and on other devices"
        second = self._elsewhere(batch.step, 2)
        if second is not None:
            found[2] = second
            again = self._again(batch)
        shares = self._by_share(found)
        guilty = outvoted(shares) if second is not None else frozenset()
        did = "computes other numbers than other devices do for the same samples"
        if self.scheduled(batch.step):
            since = max(1, batch.step - self.config.integrity.replay_interval_steps + 1)
            did += f"; what it did since step {since} was not looked at"
        self._tell(guilty or disputed(shares), did, proven=bool(guilty))
        if guilty:
            leave(self.context, guilty, f"{ranks_in_words(guilty)} compute wrong numbers each time")
        return again.work, "devices disagree, and nobody can say which is right"

    def _guilty(self, before: Trial, after: Trial) -> frozenset[int]:
        """The ranks where a difference began, as far as what was recorded tells. Collective."""
        mine = _difference(before.work, after.work, self._mixes)
        differs = before.result != after.result
        sends = [number for send in mine.sends.items() for number in send] if mine else []
        rows = gather_ints([mine is not None, differs, before.work.tape is not None, *sends])
        if not any(row[0] for row in rows):
            # Nobody sent anything else: it happened to what had been received, or, without a record, nobody knows.
            return frozenset(rank for rank, row in enumerate(rows) if row[1] and row[2])
        if mine is None:
            excused = True
        else:
            others = [dict(zip(row[3::2], row[4::2], strict=True)) for rank, row in enumerate(rows)
                      if rank != self.context.rank]  # fmt: skip
            excused = before.work.tape is not None and is_excused(before.work.tape, mine, others)
        return frozenset(rank for rank, row in enumerate(gather_ints([not excused])) if row[0])

    def _by_share(self, found: Mapping[int, int]) -> dict[int, dict[int, int]]:
        """By share and place in it, what each rank that computed it found; found: by distance. Collective."""
        layout, degree = self.config.parallelism, self.engine.dp_degree
        shares: dict[int, dict[int, int]] = {}
        for rank, row in enumerate(gather_ints([found[distance] for distance in sorted(found)])):
            coords = coords_of(rank, layout)
            place = (coords.pp * layout.cp + coords.cp) * layout.tp + coords.tp
            for distance, digest in zip(sorted(found), row, strict=True):
                share = (coords.dp_rank + distance * self._stride) % degree
                shares.setdefault(place * degree + share, {})[rank] = digest
        return shares

    def _tell(self, guilty: frozenset[int], did: str, proven: bool = True, mended: bool = False) -> None:
        """One fact, by the guilty rank itself where it is known; ranks of one node are as good as one."""
        nodes = {rank // self.config.cluster.ranks_per_node for rank in guilty}
        known = proven and (len(guilty) == 1 or len(nodes) == 1)
        speaker = min(guilty) if known else 0
        if self.context.rank == speaker:
            which = "" if len(guilty) == 1 else "one of "
            who = which + ranks_in_words(guilty) if guilty else "some rank, it is not known which,"
            self.context.note(FactKind.CORRUPTION_FOUND, f"{who} {did}", blamed=speaker if known else -1,
                              mended=mended)  # fmt: skip

    def _pause(self, step: int) -> None:
        """Odd numbers were right: look at fewer of them for a while."""
        if not self._odd:
            return
        if step > self._next_suspect + _LONGEST_PAUSE_STEPS:
            self._pause_steps = 1
        self._next_suspect = step + self._pause_steps
        self._pause_steps = min(2 * self._pause_steps, _LONGEST_PAUSE_STEPS)


def _difference(before: Work, after: Work, mixes: bool) -> Divergence | None:
    """How two computations of this rank differ in what it sent, by the best record that both have.

    mixes: other ranks' numbers enter what this one computes, so that without tapes nothing tells whose differ.
    """
    if before.tape is not None and after.tape is not None:
        return divergence(before.tape, after.tape)
    if mixes:
        return None
    # The loss is always known; where it differs, so did the forward pass.
    losses = checksums([before.loss, after.loss]).tolist()
    sent_other = before.shares is not None and before.shares != after.shares
    return Divergence(0, {}) if sent_other or losses[0] != losses[1] else None


def _digest(work: Work) -> int:
    assert work.shares is not None
    return fold([*work.shares, *checksums([work.loss]).tolist()])


def _anywhere(mine: bool) -> bool:
    """Whether it is so on some rank. Collective."""
    return any(row[0] for row in gather_ints([mine]))


def _stride(config: JobConfig) -> int:
    """How far apart dp ranks are at least whose samples never meet: experts mix those of their whole group."""
    layout = config.parallelism
    return layout.ep // math.gcd(layout.ep, layout.cp * layout.tp)
