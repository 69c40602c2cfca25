"""What a snapshot holds of an engine: live tensors under names that do not depend on the layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from parallelism.average import WeightAverage
from parallelism.lowp_state import Lowp, ScalesState
from parallelism.optimizer import ShardedOptimizer
from parallelism.titan import canonical_name


class ModelState(Stateful):
    """Parameters and persistent buffers (expert biases), as tensors that share the model's storage."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        """Name to live tensor."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the loader wrote into the live tensors."""
        assert state_dict.keys() == self.tensors.keys()


class OptimizerState(Stateful):
    """Moments and momenta by parameter name, and one update counter for all of them."""

    def __init__(self, tensors: dict[str, Tensor], counters: list[Tensor]) -> None:
        self.tensors = tensors
        self.counters = counters

    def state_dict(self) -> dict[str, Any]:
        """Name to live tensor; `step` is the counter, a scalar."""
        return {"step": self.counters[0], **self.tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the counter, which the loader wrote once, to every parameter's own."""
        assert state_dict.keys() == {"step", *self.tensors}
        with torch.no_grad():
            for counter in self.counters:
                counter.copy_(state_dict["step"])


def build_states(
    parts: list[nn.Module], optimizer: ShardedOptimizer, average: WeightAverage | None, lowp: Lowp | None
) -> dict[str, Stateful]:
    """The snapshot's view of a built model, its optimizer, the average of its weights and its scales, if there are."""
    states: dict[str, Stateful] = {
        "model": ModelState(_model_tensors(parts)),
        "optimizer": OptimizerState(optimizer.moments(), optimizer.counters()),
    }
    if average is not None:
        states["ema"] = average
    if lowp is not None and lowp.history is not None:
        states["precision"] = ScalesState(lowp.history)
    return states


def _model_tensors(parts: list[nn.Module]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            tensors[canonical_name(name)] = parameter.detach()
        for prefix, module in part.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    tensors[canonical_name(name)] = buffer
    return tensors
