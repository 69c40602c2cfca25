"""Transformer Engine's low precision. The one place that imports it; written against 2.20.

Its modules own their weights under names of their own. Ours stay where they are, for snapshots, sharding and initial
values know them: a module of Transformer Engine here is a shell without parameters that is handed this rank's weights
for each product. It never sees an axis of the mesh; what is spread over tp is added up around it (`lowp_local`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from configs.precision import LOW
from parallelism.lowp_groups import padded
from parallelism.lowp_state import Site

_ROWS_OF_EXPERTS = {"nvfp4": 128}


class TransformerEngineKernel:
    """See `Kernel`.

    Raises:
        ValueError: the package is absent, or does not load on this machine.
    """

    def __init__(self, recipe: str) -> None:
        self._te, recipes = _load()
        kinds = {
            "fp8_current": recipes.Float8CurrentScaling,
            "fp8_block": recipes.Float8BlockScaling,
            "mxfp8": recipes.MXFP8BlockScaling,
            "nvfp4": recipes.NVFP4BlockScaling,
        }
        self._recipe = kinds[recipe]()
        if recipe == "fp8_current":
            # Powers of two, as everywhere here; the constructor's own switch comes too late for these three.
            for operand in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
                setattr(self._recipe, operand, recipes.QParams(power_2_scale=True))
        self._multiple = _ROWS_OF_EXPERTS.get(recipe, LOW[recipe].granule)
        self._shells: dict[int, Any] = {}

    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """te.Linear on this rank's weight."""
        shell = self._shell(site, lambda: _linear_shell(self._te, weight))
        return self._run(shell, site, [weight], x)

    def grouped(self, site: Site, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """te.GroupedLinear on this rank's experts; the host waits for their numbers of tokens."""
        shell = self._shell(site, lambda: _grouped_shell(self._te, weight))
        rows, ends, places = padded(x, offsets, self._multiple)
        splits = ends.diff(prepend=ends.new_zeros(1)).to("cpu", torch.int64)
        product = self._run(shell, site, list(weight.unbind(0)), rows[: int(splits.sum())], splits)
        rest = product.new_zeros(len(rows) - len(product), product.shape[1])
        return torch.cat([product, rest])[places]

    def _shell(self, site: Site, make: Callable[[], Any]) -> Any:
        if site.index not in self._shells:
            self._shells[site.index] = make()
        return self._shells[site.index]

    def _run(self, shell: Any, site: Site, weights: list[Tensor], *operands: Tensor) -> Tensor:
        reuse = site.shared.reuse
        first = site.shared.first_use(site.index) if reuse else None
        shell.given = weights
        try:
            with self._te.autocast(enabled=True, recipe=self._recipe):
                product: Tensor = shell(*operands, is_first_microbatch=first)
        finally:
            shell.given = ()
        return product


def _linear_shell(te: ModuleType, weight: Tensor) -> Any:
    outputs, inputs = weight.shape
    shell = _without_parameters(te.Linear)(inputs, outputs, bias=False, params_dtype=weight.dtype, device="meta")
    return _emptied(shell)


def _grouped_shell(te: ModuleType, weight: Tensor) -> Any:
    experts, outputs, inputs = weight.shape
    kind = _without_parameters(te.GroupedLinear)
    return _emptied(kind(experts, inputs, outputs, bias=False, params_dtype=weight.dtype, device="meta"))


def _without_parameters(kind: Any) -> Any:
    """A subclass that multiplies with the weights in `given`."""

    class Shell(kind):
        given: Sequence[Tensor] = ()

        def _get_weight_tensors(self) -> list[Tensor]:
            return list(self.given)

    return Shell


def _emptied(shell: Any) -> Any:
    for name in [name for name, _ in shell.named_parameters(recurse=False)]:
        setattr(shell, name, None)
    return shell


def _load() -> tuple[ModuleType, ModuleType]:
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
    except (ImportError, OSError, RuntimeError) as error:
        # On a machine without CUDA's libraries it fails with any of these.
        raise ValueError(
            f'precision.backend = "te": Transformer Engine does not load here ({type(error).__name__}: {error}); '
            'install it for this CUDA and torch (docs/precision.md), or set precision.backend = "torchao"'
        ) from error
    return te, recipe
