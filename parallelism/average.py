"""An exponential moving average of the weights, sharded as they are: often the better model than the last weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from configs.schema import EmaConfig
from parallelism.optimizer import Slot, laid_out_like


def weight_of(config: EmaConfig, step: int) -> float:
    """What part of the average the weights after update `step` become.

    The decay is one of a step, whatever the interval. It rises from 2/11 to config.decay, so that random initial
    weights are soon forgotten. A pure function of the step: nothing to save.
    """
    decay = min(config.decay, (1.0 + step) / (10.0 + step))
    return 1.0 - decay**config.interval_steps


class WeightAverage(Stateful):
    """The averages of one rank's shards, in the weights' own type; without initial weights, they wait for a load."""

    def __init__(self, config: EmaConfig, slots: Sequence[Slot], with_weights: bool) -> None:
        """with_weights: the slots have weights, with which the average begins."""
        self._config = config
        with torch.no_grad():
            copies = [slot.local.detach().clone() if with_weights else torch.empty_like(slot.local) for slot in slots]
        self._weights = [slot.local.detach() for slot in slots]
        self._averages = [copy.requires_grad_(False) for copy in copies]
        self.tensors = {
            slot.name: laid_out_like(slot.parameter, copy) for slot, copy in zip(slots, self._averages, strict=True)
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`, if it is due."""
        if step % self._config.interval_steps == 0:
            torch._foreach_lerp_(self._averages, self._weights, weight_of(self._config, step))

    def state_dict(self) -> dict[str, Any]:
        """Name to live tensor."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the loader wrote into the live tensors."""
        assert state_dict.keys() == self.tensors.keys()
