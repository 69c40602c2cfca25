"""What each recipe does with each operand of a linear layer's three products.

    forward   y  = x  @ w.T     contracted over inputs
    backward  dx = dy @ w       contracted over outputs
              dw = dy.T @ x     contracted over tokens

Scales of blocks run along the dim that is contracted, so that an operand of two products is rounded anew for each, from
the exact numbers, unless its scales are the same both ways (one a tensor, or square blocks).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from parallelism.lowp_formats import E2M1, E4M3, E5M2, Block, Format


class Operand(enum.IntEnum):
    """Of a linear layer: also the index in what is kept of each."""

    INPUT = 0
    WEIGHT = 1
    GRAD = 2


@dataclass(frozen=True)
class Rounding:
    """One operand. block: (rows, columns) with the contracted dim last, None for one scale a tensor. delayed: that one
    comes from past steps. by_chance, mixed: rounding and a Hadamard transform, where the recipe has them."""

    target: Format
    block: Block | None = None
    delayed: bool = False
    by_chance: bool = False
    mixed: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the transpose is rounded to the transpose of what the matrix is rounded to."""
        return not self.by_chance and (self.block is None or self.block[0] == self.block[1])


def _same(rounding: Rounding) -> dict[Operand, Rounding]:
    return dict.fromkeys(Operand, rounding)


RECIPES: Mapping[str, Mapping[Operand, Rounding]] = {
    "fp8_current": _same(Rounding(E4M3)) | {Operand.GRAD: Rounding(E5M2)},
    "fp8_delayed": _same(Rounding(E4M3, delayed=True)) | {Operand.GRAD: Rounding(E5M2, delayed=True)},
    "fp8_block": _same(Rounding(E4M3, (1, 128))) | {Operand.WEIGHT: Rounding(E4M3, (128, 128))},
    "mxfp8": _same(Rounding(E4M3, (1, 32))),
    "nvfp4": {
        Operand.INPUT: Rounding(E2M1, (1, 16), mixed=True),
        Operand.WEIGHT: Rounding(E2M1, (16, 16)),
        Operand.GRAD: Rounding(E2M1, (1, 16), by_chance=True, mixed=True),
    },
}
