"""Converts a model's configuration, before anything is built: which modules, and what they become.

Names, shapes, initial values and sharding of parameters stay what they were, so that snapshots, layouts and exports
know nothing of the recipe. Imports torchtitan; imported by `parallelism.titan` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import spmd_types
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from configs.precision import LOW
from configs.schema import JobConfig
from parallelism import lowp_local
from parallelism.lowp_state import Lowp, Site

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_ROUTER = "router"


class LowpLinear(Linear):
    """A linear layer without bias whose products are computed by its site's kernel."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        """What it replaces, and its site."""

        site: Site

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.site = config.site

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return lowp_local.linear(self.site, input, self.weight)


class LowpExperts(GroupedExperts):
    """Experts whose three products are computed by kernels. In and out of the products it is as in the original."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """What it replaces, and a site for each of w1, w2, w3."""

        sites: tuple[Site, Site, Site]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sites = config.sites

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """[R, D], the rows of one expert behind those of the other, to [R, D]."""
        offsets_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        x = x_RD.bfloat16()
        hidden = F.silu(self._product(0, x, self.w1_EFD, offsets_E)) * self._product(2, x, self.w3_EFD, offsets_E)
        return self._product(1, hidden, self.w2_EDF, offsets_E).type_as(x_RD)

    def _product(self, number: int, x: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
        site = self.sites[number]
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        return site.kernel.grouped(site, x, local.bfloat16(), offsets_E)


def convert(model: Any, config: JobConfig, lowp: Lowp) -> None:
    """Replace, in place, the configurations of all modules that the recipe applies to, and give each its sites.

    model: torchtitan's configuration of the whole model, sharding declared.

    Raises:
        ValueError: a module does not fit the recipe, or none is left to convert.
    """
    _convert_linears(model, config, lowp)
    _convert_experts(model, config, lowp)
    if not lowp.sites:
        recipe, kept = config.precision.recipe, ", ".join(config.precision.keep_modules)
        raise ValueError(
            f"precision.recipe = {recipe!r}: no module is left to convert; set precision.keep_first_layers, "
            f"precision.keep_last_layers or precision.keep_modules = [{kept}] to less, or precision.recipe = 'bf16'"
        )


def _convert_linears(model: Any, config: JobConfig, lowp: Lowp) -> None:
    chosen = list(_chosen(model, Linear, config))
    for name, linear, parent, place in chosen:
        if type(linear) is not Linear.Config or linear.bias:
            raise ValueError(_misfit(config, name, "it is no plain linear layer"))
        _check_dims(config, name, linear.in_features, linear.out_features, _tp_dim(linear, "weight"))
        _put(parent, place, LowpLinear.Config(**_values(linear), site=lowp.add_site(name)))


def _convert_experts(model: Any, config: JobConfig, lowp: Lowp) -> None:
    for name, experts, parent, place in list(_chosen(model, GroupedExperts, config)):
        if type(experts) is not GroupedExperts.Config:
            raise ValueError(_misfit(config, name, "they are experts of a kind that is not known"))
        if lowp.precision.backend == "torchao" and config.precision.recipe != "mxfp8":
            why = "torchao multiplies experts with a scale for each row, which is another recipe"
            raise ValueError(_misfit(config, name, why))
        cut = _tp_dim(experts, "w1_EFD")
        _check_dims(config, name, experts.dim, experts.hidden_dim, None if cut is None else cut - 1)
        w1, w2, w3 = (lowp.add_site(f"{name}.{weight}") for weight in ("w1", "w2", "w3"))
        _put(parent, place, LowpExperts.Config(**_values(experts), sites=(w1, w2, w3)))


def _chosen(model: Any, kind: Any, config: JobConfig) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, configuration, its parent, its place there) of modules of a kind that the rules leave to the recipe."""
    precision, last = config.precision, len(model.layers) - config.precision.keep_last_layers
    for name, found, parent, place in model.traverse(kind.Config):
        layer = _LAYER.fullmatch(name)
        if layer is None or not precision.keep_first_layers <= int(layer[1]) < last:
            continue
        if not {_ROUTER, *precision.keep_modules} & set(layer[2].split(".")):
            yield name, found, parent, place


def _tp_dim(found: Any, weight: str) -> int | None:
    """The dim of a weight that tp cuts; None if it cuts none."""
    sharding = found.sharding_config
    layout = None if sharding is None else sharding.state_shardings.get(weight)
    cut = None if layout is None else layout.per_axis_spmd_types().get(MeshAxisName.TP)
    return cut.dim if isinstance(cut, spmd_types.Shard) else None


def _check_dims(config: JobConfig, name: str, inputs: int, outputs: int, cut: int | None) -> None:
    """cut: 0 if tp cuts the outputs, 1 if it cuts the inputs."""
    granule, tp = LOW[config.precision.recipe].granule, config.parallelism.tp
    for dim, (side, size) in enumerate((("outputs", outputs), ("inputs", inputs))):
        ranks = tp if cut == dim else 1
        if size % (granule * ranks):
            among = f" over parallelism.tp = {tp}" if ranks > 1 else ""
            why = f"its {size} {side}{among} are no multiple of {granule}, which {config.precision.recipe} needs"
            raise ValueError(_misfit(config, name, why))


def _misfit(config: JobConfig, name: str, why: str) -> str:
    short = name.rpartition(".")[2]
    kept = ", ".join(f'"{each}"' for each in (*config.precision.keep_modules, short))
    recipe = config.precision.recipe
    return f'precision.recipe = "{recipe}" cannot convert {name}: {why}; set precision.keep_modules = [{kept}]'


def _values(found: Any) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in fields(found)}


def _put(parent: Any, place: Any, new: Any) -> None:
    if isinstance(parent, list):
        parent[place] = new
    else:
        setattr(parent, place, new)
