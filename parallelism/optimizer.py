"""The optimizer over all parts of a rank's model, on its local shards, with state allocated from the start.

An elementwise update needs nothing of a DTensor but its local shard; leaving DTensor out of it saves its dispatch
(about 50 ms at the first step after a restart, a few ms each step after).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import JobConfig, OptimizerConfig
from parallelism.mesh import coords_of
from parallelism.muon import FusedHeads, Muon, MuonSlot
from parallelism.titan import canonical_name, fused_heads
from parallelism.updates import UpdateRule, rule_of


@dataclass(frozen=True)
class Slot:
    """One parameter, its local shard (shared storage), its rule, and what is kept of it by kind, laid out like it."""

    name: str
    parameter: nn.Parameter
    local: Tensor
    rule: UpdateRule
    state: Mapping[str, Tensor]


class ShardedOptimizer:
    """AdamW (arXiv 1711.05101) on local shards, and Muon beside it where parameters have that rule.

    adamw is torch's own, over `Slot.local`; it counts updates in it.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon | None, slots: list[Slot]) -> None:
        self.adamw = adamw
        self.muon = muon
        self.slots = slots

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate lr. Collective with Muon."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for slot in self.slots:
            gradient = slot.parameter.grad
            slot.local.grad = None if gradient is None else local_of(gradient)
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(lr)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for slot in self.slots:
            slot.parameter.grad = None
            slot.local.grad = None

    def moments(self) -> dict[str, Tensor]:
        """What is kept of each parameter, live, as `<kind>.<parameter>`."""
        return {f"{kind}.{slot.name}": tensor for slot in self.slots for kind, tensor in slot.state.items()}

    def counters(self) -> list[Tensor]:
        """The update counter of each parameter of AdamW's, fp32 scalars; all are always equal."""
        return [state["step"] for state in self.adamw.state.values()]


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its storage; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_optimizer(config: JobConfig, parts: list[nn.Module]) -> ShardedOptimizer:
    """The optimizer for every parameter of `parts`, each by its rule. Collective with Muon."""
    with torch.no_grad():
        slots = [
            _slot(config.optimizer, name, parameter) for part in parts for name, parameter in part.named_parameters()
        ]
    adamw = _build_adamw(config.optimizer, [slot for slot in slots if not slot.rule.muon])
    muon = _build_muon(config, parts, [slot for slot in slots if slot.rule.muon])
    return ShardedOptimizer(adamw, muon, slots)


def _build_adamw(config: OptimizerConfig, slots: Sequence[Slot]) -> torch.optim.AdamW:
    by_decay: dict[float, list[Tensor]] = {}
    for slot in slots:
        by_decay.setdefault(slot.rule.weight_decay, []).append(slot.local)
    groups: list[dict[str, Any]] = [{"params": group, "weight_decay": decay} for decay, group in by_decay.items()]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for slot in slots:
        adamw.state[slot.local] = {
            "step": torch.zeros((), dtype=torch.float32, device=slot.local.device),
            **{kind: local_of(tensor) for kind, tensor in slot.state.items()},
        }
    return adamw


def _build_muon(config: JobConfig, parts: list[nn.Module], slots: Sequence[Slot]) -> Muon | None:
    if config.optimizer.name != "muon":
        return None
    stages = config.parallelism.pp
    size = dist.get_world_size() // stages
    members = [range(stage * size, (stage + 1) * size) for stage in range(stages)]
    # Every rank takes part in making every group.
    groups = [dist.new_group(list(ranks)) for ranks in members] if stages > 1 else [None]
    stage = coords_of(dist.get_rank(), config.parallelism).pp
    fused = {name: FusedHeads(*heads) for name, heads in fused_heads(parts).items()}
    matrices = [
        MuonSlot(
            slot.parameter,
            slot.local.detach(),
            local_of(slot.state["momentum_buffer"]),
            slot.rule.weight_decay,
            fused.get(slot.name),
        )
        for slot in slots
    ]
    on_gpu = any(slot.local.is_cuda for slot in slots)
    return Muon(config.optimizer, matrices, members[stage], groups[stage], torch.bfloat16 if on_gpu else torch.float32)


def _slot(config: OptimizerConfig, name: str, parameter: nn.Parameter) -> Slot:
    name = canonical_name(name)
    rule = rule_of(config, name, parameter.ndim)
    local = local_of(parameter).detach().requires_grad_()
    state = {kind: laid_out_like(parameter, torch.zeros_like(local, requires_grad=False)) for kind in rule.state}
    return Slot(name, parameter, local, rule, state)


def laid_out_like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """`local` as this rank's shard of a tensor that is cut as the parameter is; they share storage."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
