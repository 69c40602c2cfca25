"""The whole model of a job without storage: names and shapes of its logical tensors, and torchtitan's own keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from configs.precision import is_low
from configs.schema import JobConfig, OptimizerConfig, ParallelismConfig
from parallelism import titan
from parallelism.lowp import build_lowp
from parallelism.precision import Precision
from parallelism.updates import rule_of


class Outline:
    """What a snapshot of a job holds, and under which keys torchtitan's own state dict has it. Nothing has storage.

    tensors: the model's logical tensors by canonical name, in the model's order; parameters: those that the optimizer
    updates. has_average: whether an average of those is kept. scales: shape of the largest values of past steps, None
    if the recipe keeps none. spec: torchtitan's. The two differ from torchtitan's state dict in two ways: its modules
    split a fused query-key-value projection, and it repeats tied weights.
    """

    def __init__(
        self,
        spec: Any,
        model: nn.Module,
        optimizer: OptimizerConfig,
        has_average: bool,
        scales: tuple[int, ...] | None,
    ) -> None:
        self.spec = spec
        self.scales = scales
        self.model = model
        self.optimizer = optimizer
        self.has_average = has_average
        self.parameters = {titan.canonical_name(name): p.detach() for name, p in model.named_parameters()}
        kept = model.state_dict(keep_vars=True)
        buffers = {titan.canonical_name(n): b.detach() for n, b in model.named_buffers() if n in kept}
        self.tensors = {**self.parameters, **buffers}
        self._tied = {
            name: [key for key, value in kept.items() if value is parameter and key != name]
            for name, parameter in model.named_parameters(remove_duplicate=True)
        }

    def kept(self, parameter: str) -> tuple[str, ...]:
        """Kinds of tensors that the optimizer keeps of a parameter."""
        return rule_of(self.optimizer, parameter, self.parameters[parameter].dim()).state

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One logical tensor as the entries of torchtitan's state dict that it makes up."""
        fused = self._fused(name)
        if fused is not None:
            module, prefix, inner = fused
            with _holding(module, inner, tensor):
                return module.state_dict(prefix=prefix)
        return {name: tensor} | dict.fromkeys(self._tied.get(name, ()), tensor)

    def join(self, name: str, entries: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`; only the entries that `split` gives are looked at, the first of tied ones."""
        fused = self._fused(name)
        if fused is None:
            return entries[name]
        module, prefix, inner = fused
        with _holding(module, inner, self.tensors[name]):
            own = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
            module.load_state_dict(own, assign=True)
            return module.get_parameter(inner).detach()

    def needed(self, name: str) -> dict[str, Tensor]:
        """Those entries of `split`, without storage, that `join` needs: of tied weights the first."""
        parts = self.split(name, self.tensors[name])
        return parts if self._fused(name) else {name: parts[name]}

    def _fused(self, name: str) -> tuple[nn.Module, str, str] | None:
        """Module, its prefix, and the name inside it, if torchtitan stores this tensor in parts."""
        prefix, found, inner = name.rpartition("wqkv.")
        return (self.model.get_submodule(prefix.removesuffix(".")), prefix, found + inner) if found else None


@contextlib.contextmanager
def _holding(module: nn.Module, inner: str, tensor: Tensor) -> Iterator[None]:
    """Let a module have `tensor` as its parameter `inner` for a while: its state dict hooks work on what it holds."""
    prefix, _, attribute = inner.rpartition(".")
    owner = module.get_submodule(prefix)
    before = owner.get_parameter(attribute)
    setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def outline(config: JobConfig) -> Outline:
    """The model of a job, whatever its layout and wherever this runs.

    Raises:
        ValueError: torchtitan has no such flavour, or it cannot be cut to size as configured.
    """
    model = msgspec.structs.replace(config.model, attention="sdpa")
    plain = msgspec.structs.replace(config, model=model, parallelism=ParallelismConfig())
    device = torch.device("cpu")
    titan.prepare_process(device)
    recipe = config.precision.recipe
    lowp = build_lowp(plain, Precision(recipe, "emulated", "fp32"), device) if is_low(recipe) else None
    plan = titan.blueprint(plain, device, lowp)
    scales = None if lowp is None else lowp.history_shape
    return Outline(plan.spec, plan.model, config.optimizer, config.ema.decay > 0, scales)
