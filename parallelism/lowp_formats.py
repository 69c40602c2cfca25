"""The numbers of FP8 and FP4: rounding to a format, scales, and what is left of a matrix after both. Plain torch.

Everything here returns what the low-precision numbers stand for, in fp32: a matrix that was scaled, rounded and scaled
back. A product of two such matrices in fp32 is what a tensor core computes from the small numbers, but for the order in
which it adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Block = tuple[int, int]

_NVFP4_SCALE_LARGEST = 448.0
_EXPONENT_RANGE = (-126, 127)


@dataclass(frozen=True)
class Format:
    """A number format. largest: what finite values end at; dtype: torch's own, None where it has none."""

    name: str
    largest: float
    dtype: torch.dtype | None


E4M3 = Format("e4m3", 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 6.0, None)


def round_to(values: Tensor, target: Format, noise: Tensor | None = None) -> Tensor:
    """The nearest numbers of a format, ties to even; what is too large becomes the largest, what is not finite NaN.

    noise: in [0, 1) for each value, for rounding by chance: up with the probability that is the part of the way there.
    """
    # An infinity that became a large number would pass the vote before the update.
    held = values.clamp(-target.largest, target.largest).masked_fill(values.isinf(), torch.nan)
    if target.dtype is not None:
        assert noise is None, "only FP4 is rounded by chance"
        return held.to(target.dtype).float()
    size = held.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    steps = torch.round(size / step) if noise is None else torch.floor(size / step + noise)
    return torch.copysign(steps * step, held)


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """The largest power of two s with amax * s <= largest; 1 for nothing but zeros, NaN for what is not finite.

    Powers of two change no digit of what they scale. So values do not depend on how a matrix was cut among ranks, but
    for those that are near the format's smallest.
    """
    ratio = largest / amax.double()
    _, exponent = torch.frexp(ratio)
    scale = torch.ldexp(torch.ones_like(amax), (exponent - 1).clamp(*_EXPONENT_RANGE))
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def rounded(values: Tensor, target: Format, amax: Tensor) -> Tensor:
    """A matrix under one power of two that brings amax near the largest number of the format."""
    scale = power_of_two_scale(amax, target.largest)
    return round_to(values * scale, target) / scale


def rounded_in_blocks(values: Tensor, target: Format, block: Block) -> Tensor:
    """A matrix with a power of two for each block of (rows, columns); blocks at the ends may be smaller."""
    tiles = _tiles(values, block)
    scale = power_of_two_scale(_largest(tiles), target.largest)
    return _untiled(round_to(tiles * scale, target) / scale, values)


def rounded_in_nvfp4(values: Tensor, block: Block, noise: Tensor | None = None) -> Tensor:
    """A matrix in E2M1, with an E4M3 scale for each block, under an fp32 one for the whole."""
    whole = values.abs().amax() if values.numel() else values.new_zeros(())
    encode = torch.where(whole > 0, _NVFP4_SCALE_LARGEST * E2M1.largest / whole, 1.0)
    tiles = _tiles(values, block)
    decode = round_to(_largest(tiles) / E2M1.largest * encode, E4M3)
    # A block so small that its scale is zero stands for zeros.
    scale = torch.where(decode > 0, encode / decode, 0.0)
    scale = torch.where(torch.isnan(decode), torch.nan, scale)
    small = round_to(tiles * scale, E2M1, None if noise is None else _tiles(noise, block))
    return _untiled(small * (decode / encode), values)


def _tiles(values: Tensor, block: Block) -> Tensor:
    """[R, C] as [R / rows, rows, C / columns, columns], with zeros at the ends."""
    rows, columns = (min(size, most) or 1 for size, most in zip(values.shape, block, strict=True))
    height, width = values.shape
    padded = torch.nn.functional.pad(values, (0, -width % columns, 0, -height % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _untiled(tiles: Tensor, like: Tensor) -> Tensor:
    return tiles.flatten(2).flatten(0, 1)[: like.shape[0], : like.shape[1]]


def _largest(tiles: Tensor) -> Tensor:
    return tiles.abs().amax(dim=(1, 3), keepdim=True)
