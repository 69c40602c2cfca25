"""torchao's low precision: real tensor cores on GPUs, its emulation on CPU. The one place that imports torchao.

What torchao has: one scale a tensor (current ones by its own autograd function, delayed ones by its float8 tensors and
scales of ours), and MXFP8 for linear layers and experts. Scales are powers of two, as everywhere here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.float8.config import Float8LinearConfig
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_training_tensor import (
    GemmInputRole,
    LinearMMConfig,
    ScaledMMConfig,
    hp_tensor_and_scale_to_float8,
)
from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from configs.precision import LOW
from parallelism.lowp_formats import E4M3, E5M2, Format, power_of_two_scale
from parallelism.lowp_groups import padded
from parallelism.lowp_recipes import Operand
from parallelism.lowp_state import Kernel, Site


def torchao_kernel(recipe: str, emulate: bool) -> Kernel:
    """The kernel for one of the recipes that torchao has."""
    kinds: dict[str, Any] = {"fp8_current": _Current, "fp8_delayed": _Delayed, "mxfp8": _Mx}
    kernel: Kernel = kinds[recipe](emulate)
    return kernel


class _Float8:
    """One scale a tensor."""

    def __init__(self, emulate: bool) -> None:
        self.config = Float8LinearConfig(emulate=emulate, round_scales_to_power_of_2=True)
        fast, exact = ScaledMMConfig(emulate, True, False, False), ScaledMMConfig(emulate, False, False, False)
        self.products = LinearMMConfig(fast, exact, exact)

    def grouped(self, site: Site, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Never asked for: `lowp_modules` refuses it with words for the user."""
        raise NotImplementedError(f"{site.name}: torchao has no product of experts with one scale a tensor")


class _Current(_Float8):
    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """torchao's own function, scales from the operands themselves."""
        product: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.products, self.config)
        return product


class _Delayed(_Float8):
    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """torchao's product, scales from past steps."""
        record = torch.is_grad_enabled()
        x8 = self._cast(site, Operand.INPUT, x, E4M3, GemmInputRole.INPUT, record)
        weight8 = self._cast(site, Operand.WEIGHT, weight, E4M3, GemmInputRole.WEIGHT, record).t()
        product = matmul_with_hp_or_float8_args.apply(x8, weight8, self.products, self.config)
        returned: Tensor = _CastGrad.apply(product, self, site)
        return returned

    def _cast(
        self, site: Site, operand: Operand, values: Tensor, target: Format, role: GemmInputRole, record: bool
    ) -> Any:
        amax = site.shared.amax(site, operand, values, record)
        scale = power_of_two_scale(amax, target.largest)
        return hp_tensor_and_scale_to_float8(values, scale, target.dtype, self.products, role)


class _CastGrad(torch.autograd.Function):
    """Nothing forward; backward the gradient becomes float8, by the scale of its operand."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, kernel: _Delayed, site: Site) -> Tensor:
        ctx.kernel, ctx.site = kernel, site
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        cast = ctx.kernel._cast(ctx.site, Operand.GRAD, grads[0].contiguous(), E5M2, GemmInputRole.GRAD_OUTPUT, True)
        return cast, None, None


class _Mx:
    def __init__(self, emulate: bool) -> None:
        self.kernels = KernelPreference.EMULATED if emulate else KernelPreference.AUTO

    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """torchao's own function."""
        product: Tensor = _to_mxfp8_then_scaled_mm(x, weight, self.kernels, ScaleCalculationMode.RCEIL)
        return product

    def grouped(self, site: Site, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """torchao's own function; each expert's rows are filled up to a whole number of blocks."""
        rows, ends, places = padded(x, offsets, LOW["mxfp8"].granule)
        product: Tensor = _to_mxfp8_then_scaled_grouped_mm(
            rows[:-1],
            weight.transpose(-2, -1),
            offs=ends,
            out_dtype=x.dtype,
            kernel_preference=self.kernels,
            scale_calculation_mode=ScaleCalculationMode.RCEIL,
        )
        return torch.cat([product, product.new_zeros(1, product.shape[1])])[places]
