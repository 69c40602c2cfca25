"""The validation loss: held-out batches, the same at every measurement and on every layout."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import msgspec
import torch

from configs.schema import JobConfig
from parallelism.engine import Engine
from trainer.data import StepReader, document_positions
from trainer.events import Heart, Phase


@dataclass(frozen=True)
class Measured:
    """A validation loss, the same on every rank, None if it is not finite; and the seconds that it took."""

    loss: float | None
    seconds: float


class Validation:
    """Measures a rank's part of the validation loss. Every rank calls every method in step.

    Batch n of a measurement is what step n of a training on the held-out sets would read: a pure function of
    (run.seed, n), with nothing to save.
    """

    def __init__(self, config: JobConfig, engine: Engine, heart: Heart, eod_id: int | None, vocab_size: int) -> None:
        """Map the sets. eod_id: None where attention knows no documents. Raises ValueError as `StepReader` does."""
        self._config = config
        self._engine = engine
        self._heart = heart
        self._eod_id = eod_id
        held_out = msgspec.structs.replace(config.data, sets=config.validation.sets)
        as_data = msgspec.structs.replace(config, data=held_out)
        self._reader = StepReader(as_data, engine.dp_rank, engine.dp_degree, vocab_size)

    def due(self, step: int) -> bool:
        """Whether the loss is to be measured after this step."""
        return step % self._config.validation.interval_steps == 0 or step == self._config.training.steps

    def measure(self) -> Measured:
        """The loss with the weights as they are. Collective."""
        began_s = time.monotonic()
        share = 0.0
        for number in range(1, self._config.validation.batches + 1):
            # A beat a batch, and on GPUs none ahead of the batch before: a long measurement is no hang, a stuck one is.
            self._heart.beat(Phase.VALIDATION)
            share += self._share(number)
        share /= self._config.validation.batches
        loss, _ = self._engine.global_loss(torch.tensor(share, dtype=torch.float32, device=self._engine.device))
        return Measured(loss if math.isfinite(loss) else None, time.monotonic() - began_s)

    def warm_up(self) -> None:
        """Compile what evaluates, while the bounds of a start still hold: later it would pass for a hang."""
        if self._config.training.compile:
            self._share(1)

    def _share(self, number: int) -> float:
        tokens = self._reader.read(number).tokens
        positions = None if self._eod_id is None else torch.from_numpy(document_positions(tokens, self._eod_id))
        return float(self._engine.evaluate(torch.from_numpy(tokens), positions))


def build_validation(
    config: JobConfig, engine: Engine, heart: Heart, eod_id: int | None, vocab_size: int
) -> Validation | None:
    """What measures, None if nothing is to be measured. Collective. Raises ValueError as `Validation` does."""
    if not config.validation.interval_steps:
        return None
    validation = Validation(config, engine, heart, eod_id, vocab_size)
    validation.warm_up()
    return validation
