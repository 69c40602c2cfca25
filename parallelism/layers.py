"""How each layer learns, and how each expert is used: one look over the whole job, in one small collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.gradients import shards_of
from parallelism.optimizer import local_of
from parallelism.titan import canonical_name

EMBEDDINGS, OUTPUT = "the embeddings", "the output"
_COUNTER = ".tokens_per_expert_E"


@dataclass(frozen=True)
class LayerLook:
    """Equal on every rank. norms: 2-norm of the gradients of each layer by name, in the model's order.

    loads: how many tokens each expert of a layer got, by the layer's name; layers without experts are left out.
    """

    norms: dict[str, float]
    loads: dict[str, tuple[int, ...]]


class LayerGauge:
    """Looks at the gradients and the expert counters of one rank's part of the model."""

    def __init__(self, config: JobConfig, parts: list[nn.Module], stage_ranks: int) -> None:
        """stage_ranks: number of ranks that a pipeline stage is spread over."""
        facts = FAMILIES[config.model.family][config.model.flavor]
        layers = config.model.layers or facts.n_layers
        self.names = [EMBEDDINGS, *(f"layer {number}" for number in range(layers)), OUTPUT]
        self._experts = facts.n_experts
        self._stage_ranks = stage_ranks
        self._parameters = [
            (self._place(canonical_name(name)), parameter)
            for part in parts
            for name, parameter in part.named_parameters()
        ]
        self._counters = [
            (self._place(canonical_name(name)), buffer)
            for part in parts
            for name, buffer in part.named_buffers()
            if name.endswith(_COUNTER)
        ]

    @torch.no_grad()
    def look(self) -> LayerLook:
        """What the gradients and counters are now, between backward and update. Collective over all ranks."""
        sums = self._own_sums()
        summing = dist.all_reduce(sums, async_op=True)
        assert summing is not None
        summing.wait()
        values = sums.tolist()
        norms = {name: values[place] ** 0.5 for place, name in enumerate(self.names)}
        loads = {}
        for place, name in enumerate(self.names):
            counts = tuple(round(value) for value in values[self._loads_of(place)])
            if any(counts):
                loads[name] = counts
        return LayerLook(norms, loads)

    def _own_sums(self) -> Tensor:
        """Squares of this rank's gradients by layer, each shard by its share, and then its experts' tokens."""
        found = [(place, each) for place, each in self._parameters if each.grad is not None]
        gradients = [local_of(each.grad) for _, each in found if each.grad is not None]
        device = gradients[0].device
        shares = torch.tensor([shards_of(each) / self._stage_ranks for _, each in found], dtype=torch.float64)
        squares = torch.stack(torch._foreach_norm(gradients)).double().square() * shares.to(device)
        sums = torch.zeros(len(self.names) * (1 + self._experts), dtype=torch.float64, device=device)
        sums.index_add_(0, torch.tensor([place for place, _ in found], device=device), squares)
        for place, counter in self._counters:
            sums[self._loads_of(place)] += local_of(counter).double()
        return sums

    def _loads_of(self, place: int) -> slice:
        start = len(self.names) + place * self._experts
        return slice(start, start + self._experts)

    def _place(self, name: str) -> int:
        first, _, rest = name.partition(".")
        if first == "layers":
            return 1 + int(rest.partition(".")[0])
        return 0 if first == "tok_embeddings" else len(self.names) - 1
