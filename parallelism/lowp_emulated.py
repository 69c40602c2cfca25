"""Low precision on any device: operands rounded as the recipe says, products in fp32. What runs in tests, and is slow.

The plainest statement of what each recipe computes; the other backends are held against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallelism.initialise import derive_seed
from parallelism.lowp_chance import transform, uniform
from parallelism.lowp_formats import E2M1, rounded, rounded_in_blocks, rounded_in_nvfp4
from parallelism.lowp_recipes import Operand, Rounding
from parallelism.lowp_state import Site


class EmulatedKernel:
    """See `Kernel`."""

    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """One autograd function for all recipes."""
        return _multiply(_Call(site, 0, first_column, torch.is_grad_enabled()), x, weight)

    def grouped(self, site: Site, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Expert after expert: scales and blocks of one never see tokens of another."""
        record, pieces, first = torch.is_grad_enabled(), [], 0
        for expert, last in enumerate(offsets.tolist()):
            if last > first:
                pieces.append(_multiply(_Call(site, expert, 0, record), x[first:last], weight[expert]))
                first = last
        if not pieces:
            # Weights that got no token have a gradient all the same, zero: their replicas wait for it.
            pieces.append(x.new_zeros(0, weight.shape[1]) + weight.flatten()[0] * 0.0)
        # Rows of no expert are padding, which nobody reads.
        return torch.cat([*pieces, x.new_zeros(len(x) - first, weight.shape[1])])


@dataclass(frozen=True)
class _Call:
    """One product. record: its largest values are noted for steps to come."""

    site: Site
    expert: int
    first_column: int
    record: bool

    def rounding(self, operand: Operand) -> Rounding:
        return self.site.shared.recipe[operand]

    def plain(self, operand: Operand, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """What is left of an operand whose last dim is the contracted one."""
        rounding = self.rounding(operand)
        if rounding.block is None:
            return rounded(values, rounding.target, self.site.shared.amax(self.site, operand, values, self.record))
        if rounding.target is E2M1:
            return rounded_in_nvfp4(values, rounding.block, noise)
        return rounded_in_blocks(values, rounding.target, rounding.block)

    def over_tokens(self, operand: Operand, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same for [T, C] as an operand of the weight's gradient: [C, T]."""
        values = transform(values) if self.rounding(operand).mixed else values
        return self.plain(operand, values.t(), noise)

    def weights(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight for the forward product and for the input's gradient, both [outputs, inputs]."""

        def make() -> tuple[Tensor, Tensor]:
            exact = weight.detach().float()
            forward = self.plain(Operand.WEIGHT, exact)
            symmetric = self.rounding(Operand.WEIGHT).symmetric
            return forward, forward if symmetric else self.plain(Operand.WEIGHT, exact.t()).t()

        made: tuple[Tensor, Tensor] = self.site.shared.weight((self.site.index, self.expert), make)
        return made

    def noises(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Noise for the gradient, and for its transpose after mixing."""
        rows, columns = grad.shape
        if not self.rounding(Operand.GRAD).by_chance:
            return None, None
        shared, key = self.site.shared, (self.site.index, self.expert)
        where = shared.rows(key, rows)
        # Mixing may have added rows at the end.
        padded = range(where.start, where.stop + -rows % 16) if self.rounding(Operand.GRAD).mixed else where
        across = range(self.first_column, self.first_column + columns)
        seeds = [derive_seed(shared.seed, "rounding", shared.step, *key, use) & 0xFFFFFFFF for use in ("dx", "dw")]
        return uniform(seeds[0], where, across, grad.device), uniform(seeds[1], padded, across, grad.device).t()


def _multiply(call: _Call, x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = _Product.apply(x, weight, call)
    return product


class _Product(torch.autograd.Function):
    """x @ weight.T, with each operand of this and of both gradients rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        forward, _ = call.weights(weight)
        return (call.plain(Operand.INPUT, x.float()) @ forward.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        call: _Call = ctx.call
        x, weight = ctx.saved_tensors
        exact = grads[0].float()
        noise, noise_over_tokens = call.noises(exact)
        grad_x = grad_weight = None
        grad = call.plain(Operand.GRAD, exact, noise)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ call.weights(weight)[1]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            if call.rounding(Operand.GRAD).symmetric:
                over_tokens = grad.t(), call.plain(Operand.INPUT, x.float())
            else:
                over_tokens = (
                    call.over_tokens(Operand.GRAD, exact, noise_over_tokens),
                    call.over_tokens(Operand.INPUT, x.float()).t(),
                )
            grad_weight = (over_tokens[0] @ over_tokens[1]).to(weight.dtype)
        return grad_x, grad_weight, None
