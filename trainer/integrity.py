"""Whether what this rank holds is what was written there, and what its replicas hold.

Weights and optimizer state change in an update and at no other time: their sums right after one update must be those
right before the next. Gradients change in backward and in clipping. What is the same on several ranks is compared by
`parallelism.replicas`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from parallelism.checksums import Checksummer, checksums
from parallelism.engine import Engine
from parallelism.exchange import gather_ints
from parallelism.recorder import fold
from parallelism.replicas import Disagreement, Replicas, placement_key
from trainer.events import FactKind

if TYPE_CHECKING:
    from trainer.main import RankContext

_TOLD_NAMES = 3


class CorruptionError(Exception):
    """Numbers on some rank are wrong in a way that this process cannot put right: go on from a snapshot instead."""


@dataclass
class Taken:
    """Sums that were taken for a step, and will be compared before its update."""

    step: int
    state: Tensor
    gradients: Tensor | None = None


class Integrity:
    """One rank's comparisons, every `interval` steps and in the first one after a load; 0: never. Built collectively.

    Call `remember` after each update, `gradients_done` after clipping, `check` before the vote.
    """

    def __init__(
        self,
        context: RankContext,
        engine: Engine,
        interval: int,
        first_step: int,
        loaded: tuple[int, int] | None = None,
    ) -> None:
        """loaded: (generation, step) of the snapshot that this process began with, if with any."""
        self.context = context
        self.loaded = loaded
        self.engine = engine
        self.interval = interval
        self.first_step = first_step
        self.good_step = first_step - 1
        tensors = {f"{part}.{name}": tensor for part, stateful in engine.state().items()
                   for name, tensor in stateful.state_dict().items()}  # fmt: skip
        # The loader writes one counter of updates; the others are copies of it.
        counters = enumerate(engine.optimizer.counters())
        tensors |= {f"optimizer.step, copy {number}": counter for number, counter in counters}
        self.names = list(tensors)
        self._state = Checksummer(list(tensors.values()))
        stage = engine.coords.pp
        held = [placement_key(stage, tensor) for tensor in tensors.values()]
        gradients = [placement_key(stage, slot.parameter) for slot in engine.optimizer.slots]
        self._state_replicas = Replicas(context.rank, held) if interval else None
        self._step_replicas = (
            Replicas(context.rank, [*gradients, "all", f"stage {stage} samples {engine.dp_rank}"]) if interval else None
        )
        self._taken: Taken | None = None
        self._odd: frozenset[int] = frozenset()
        self.remember(first_step)

    def due(self, step: int) -> bool:
        """Whether a step is compared."""
        return self.interval > 0 and (step % self.interval == 0 or step == self.first_step)

    def remember(self, step: int) -> None:
        """The state is what step `step` will begin with; nothing may write to it until its update."""
        self._taken = Taken(step, self._state.take()) if self.due(step) else None

    def gradients_done(self, step: int) -> None:
        """The gradients are what the update of this step will take."""
        if self._taken is not None and self._taken.step == step:
            self._taken.gradients = self._gradients()

    def check(self, step: int, grad_norm: Tensor, lr: float) -> bool:
        """Compare, if it is due. Collective then: one small all-reduce.

        Returns:
            Whether some rank's gradients, norm or random numbers cannot be right: the step must be computed again, and
            then `agree` called.

        Raises:
            CorruptionError: some rank's weights or optimizer state are wrong. Where it is known whose, that rank raises
                it and the others find that it is gone.
        """
        taken, self._taken = self._taken, None
        if taken is None or taken.step != step or self._state_replicas is None or self._step_replicas is None:
            return False
        state, gradients = self._state.take(), self._gradients()
        moved = _different(taken.state, state)
        bent = [] if taken.gradients is None else _different(taken.gradients, gradients)
        kept = state.tolist()
        here = _shared(gradients, grad_norm, lr)
        # What is no number may look different on ranks that agree.
        step_word = self._step_replicas.word(here) if math.isfinite(float(grad_norm)) else 0
        box = torch.tensor([len(moved), len(bent), self._state_replicas.word(kept), step_word], dtype=torch.int64)
        dist.all_reduce(box)
        n_moved, n_bent, state_word, step_word = box.tolist()
        if n_moved:
            self._state_changed(step, moved)
        if state_word:
            self._state_differs(step, self._state_replicas.compare(kept))
        if n_bent:
            self._gradients_changed(bent)
        self._odd = self._step_replicas.compare(here).odd if step_word and not n_bent else frozenset()
        self.good_step = step
        return bool(n_bent or step_word)

    def agree(self, grad_norm: Tensor, lr: float, split: bool) -> None:
        """See that ranks that did not agree do, now that the step was computed again. Collective.

        split: not all ranks have the same norm.

        Raises:
            CorruptionError: they still do not. What they hold now may not become an update.
        """
        if split:
            leave(self.context, frozenset(), "ranks have different gradient norms each time")
        if self._step_replicas is None:
            return
        here, odd = _shared(self._gradients(), grad_norm, lr), self._odd
        word = torch.tensor(self._step_replicas.word(here) if math.isfinite(float(grad_norm)) else 0)
        dist.all_reduce(word)
        still = self._step_replicas.compare(here) if int(word) else None
        if self.context.rank in (still.odd if still else odd):
            detail = f"rank {self.context.rank} has other gradients than its replicas"
            self.context.note(FactKind.CORRUPTION_FOUND, detail, blamed=self.context.rank, mended=still is None)
        if still is not None:
            if self.context.rank == 0 and still.tied:
                detail = f"{ranks_in_words(still.tied)} should have the same gradients, and do not"
                self.context.note(FactKind.CORRUPTION_FOUND, detail)
            words = f"replicas have other gradients each time: {ranks_in_words(still.odd | still.tied)}"
            leave(self.context, still.odd, words)

    def _gradients(self) -> Tensor:
        found = self.engine.gradients()
        sums = checksums([gradient for gradient in found if gradient is not None])
        if len(sums) == len(found):
            return sums
        there = torch.tensor([gradient is not None for gradient in found], device=sums.device)
        return torch.zeros(len(found), dtype=torch.int64, device=sums.device).masked_scatter(there, sums)

    def _state_changed(self, step: int, moved: Sequence[int]) -> None:
        guilty = frozenset(rank for rank, row in enumerate(gather_ints([len(moved)])) if row[0])
        if moved:
            names = ", ".join(self.names[i] for i in moved[:_TOLD_NAMES])
            more = f" and {len(moved) - _TOLD_NAMES} more" if len(moved) > _TOLD_NAMES else ""
            detail = f"rank {self.context.rank}: {names}{more} changed in memory while nothing wrote there"
            self.context.note(FactKind.CORRUPTION_FOUND, detail, blamed=self.context.rank)
        self._distrust(range(step - 1, step))
        leave(self.context, guilty, f"bits of the state changed in memory on {ranks_in_words(guilty)}")

    def _state_differs(self, step: int, found: Disagreement) -> None:
        if step == self.first_step and self.loaded is not None:
            # It came with the snapshot, or with the way from there: whose doing it was, nobody knows any more.
            found = Disagreement(frozenset(), found.odd | found.tied)
        if self.context.rank in found.odd:
            detail = f"rank {self.context.rank} holds other weights or optimizer state than its replicas"
            self.context.note(FactKind.CORRUPTION_FOUND, detail, blamed=self.context.rank)
        if found.tied and self.context.rank == 0:
            detail = f"{ranks_in_words(found.tied)} should hold the same weights and optimizer state, and do not"
            self.context.note(FactKind.CORRUPTION_FOUND, detail)
        self._distrust(range(self.good_step, step))
        leave(self.context, found.odd, f"replicas differ: {ranks_in_words(found.odd | found.tied)}")

    def _gradients_changed(self, bent: Sequence[int]) -> None:
        """No harm is done: a doubted step is computed again before its update."""
        if bent:
            name = self.engine.optimizer.slots[bent[0]].name
            detail = f"rank {self.context.rank}: the gradient of {name} changed in memory after it was clipped"
            self.context.note(FactKind.CORRUPTION_FOUND, detail, blamed=self.context.rank, mended=True)

    def _distrust(self, steps: range) -> None:
        """Snapshots of these steps may hold what was found to be wrong."""
        if self.context.rank == 0:
            for step in steps:
                detail = f"the state of step {step} may have been wrong in memory already"
                begun_with = self.loaded is not None and step == self.loaded[1]
                made_by = self.loaded[0] if self.loaded is not None and begun_with else None
                self.context.note(FactKind.SNAPSHOT_DISTRUSTED, detail, step=step, generation=made_by)


def leave(context: RankContext, guilty: frozenset[int], why: str) -> None:
    """End this generation. Collective.

    Raises:
        CorruptionError: on the guilty ranks, or on all if nobody is known to be. The others wait until those are gone,
            and fail by that, so that they are not taken for the cause.
    """
    if not guilty or context.rank in guilty:
        raise CorruptionError(why)
    dist.all_reduce(torch.zeros(1))
    raise CorruptionError(why)


def _different(before: Tensor, now: Tensor) -> list[int]:
    return [int(i) for i in torch.nonzero(before != now).flatten()]


def _bits(*values: float) -> int:
    """One number for what must be equal everywhere, bit for bit."""
    return int(checksums([torch.tensor(values, dtype=torch.float64)])[0])


def _shared(gradients: Tensor, grad_norm: Tensor, lr: float) -> list[int]:
    """Sums of what replicas share in a step: each gradient, its norm with the learning rate, random numbers."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return [*gradients.tolist(), _bits(float(grad_norm), lr), fold(checksums(states).tolist())]


def ranks_in_words(ranks: frozenset[int]) -> str:
    """`rank 3`, `ranks 1, 2`."""
    named = ", ".join(str(rank) for rank in sorted(ranks)) or "none"
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
