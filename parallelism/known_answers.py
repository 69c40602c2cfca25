"""Products with one right answer on every device: integers small enough that each sum of theirs is exact.

Every product and partial sum is exact in the type that holds it, so the order of sums does not matter, and the answer
can be stored here. Importing this costs nothing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """left (rows x inner) times right (inner x columns), integers up to left_max and right_max in `dtype`.

    sparse: one nonzero in each row of left, so that right may fill the whole mantissa. answer: sha256 of the product's
    int64 bytes, its first 16 digits.
    """

    dtype: str
    rows: int
    inner: int
    columns: int
    left_max: int
    right_max: int
    answer: str
    sparse: bool = False


PROBLEMS = (
    Problem(
        dtype="float64", rows=128, inner=256, columns=128, left_max=2**20, right_max=2**20, answer="dfb5f812c6c09dbb"
    ),
    Problem(dtype="float32", rows=256, inner=512, columns=256, left_max=1023, right_max=15, answer="3d0ceda3ba3c5892"),
    Problem(dtype="bfloat16", rows=256, inner=256, columns=256, left_max=1, right_max=1, answer="7af79a53e69f321c"),
    Problem(
        dtype="bfloat16",
        rows=256,
        inner=128,
        columns=256,
        left_max=1,
        right_max=255,
        answer="08555c16ddb7762f",
        sparse=True,
    ),
    Problem(dtype="float16", rows=256, inner=512, columns=256, left_max=2, right_max=2, answer="5512e5354cd3184e"),
    Problem(
        dtype="float16",
        rows=256,
        inner=128,
        columns=256,
        left_max=1,
        right_max=2047,
        answer="339ee2500c7cd6aa",
        sparse=True,
    ),
)


def multiply(problem: Problem, device: str) -> torch.Tensor:
    """The product on a device, as int64 on the host. A result that is no integer becomes one that is wrong."""
    import torch

    left, right = operands(problem)
    dtype = getattr(torch, problem.dtype)
    product = torch.mm(left.to(dtype).to(device), right.to(dtype).to(device))
    whole = product.to("cpu").to(torch.float64)
    wrong = ~torch.isfinite(whole) | (whole != whole.round())
    return torch.where(wrong, torch.full_like(whole, -(2.0**60)), whole).to(torch.int64)


def operands(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors, int64 on the host: the same on every machine."""
    import torch

    left = integers(1, problem.rows * problem.inner, problem.left_max).view(problem.rows, problem.inner)
    right = integers(2, problem.inner * problem.columns, problem.right_max).view(problem.inner, problem.columns)
    if problem.sparse:
        rows = torch.arange(problem.rows)
        signs = 1 - 2 * (rows % 2)
        left = torch.zeros_like(left)
        left[rows, rows * 37 % problem.inner] = signs
    return left, right


def digest(product: torch.Tensor) -> str:
    """What `Problem.answer` holds."""
    return hashlib.sha256(product.contiguous().numpy().tobytes()).hexdigest()[:16]


def integers(seed: int, count: int, largest: int) -> torch.Tensor:
    """Integers from -largest to largest, by a hash of their place: no generator's stream that may change."""
    import torch

    mixed = (torch.arange(count) * 2654435761 + seed * 40503) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) >> 16 & 0x7FFFFFFF
    return (mixed ^ (mixed >> 13)) % (2 * largest + 1) - largest
