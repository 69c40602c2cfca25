"""Promise: FP8 and FP4 numbers are those of their formats, scales are exact, and what rounding loses is bounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallelism.lowp_chance import HADAMARD_SIZE, transform, uniform
from parallelism.lowp_formats import (
    E2M1,
    E4M3,
    E5M2,
    Format,
    power_of_two_scale,
    round_to,
    rounded,
    rounded_in_blocks,
    rounded_in_nvfp4,
)

# Half a unit in the last place of a number's mantissa.
RELATIVE = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "e2m1": 0.25}
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_of(target: Format) -> Tensor:
    """Every finite number of an 8-bit format."""
    assert target.dtype is not None
    numbers = torch.arange(256, dtype=torch.uint8).view(target.dtype).float()
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda each: each.name)
def test_numbers_of_a_format_stay_what_they_are(target: Format) -> None:
    """All of them, under any power of two."""
    numbers = all_of(target)
    assert torch.equal(round_to(numbers, target), numbers)
    assert numbers.max() == target.largest
    for power in (-20, 0, 20):
        scaled = numbers * 2.0**power
        assert torch.equal(rounded(scaled, target, scaled.abs().amax()), scaled)


def test_fp4_rounds_to_the_nearest_and_ties_to_even() -> None:
    """The eight sizes of E2M1; between two, the one whose last bit is zero."""
    assert round_to(torch.tensor(FP4), E2M1).tolist() == FP4
    ties = [(low + high) / 2 for low, high in itertools.pairwise(FP4)]
    assert round_to(torch.tensor(ties), E2M1).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert round_to(torch.tensor([-5.1, 7.0, -0.2]), E2M1).tolist() == [-6.0, 6.0, -0.0]


@given(st.floats(2.0**-80, 2.0**80, width=32), st.sampled_from([E4M3, E5M2, E2M1]))
def test_a_scale_is_the_largest_power_of_two_that_fits(amax: float, target: Format) -> None:
    """One step more would be too much."""
    scale = float(power_of_two_scale(torch.tensor(amax), target.largest))
    assert scale == 2.0 ** round(torch.log2(torch.tensor(scale, dtype=torch.float64)).item())
    assert amax * scale <= target.largest < 2 * amax * scale


@given(st.integers(-60, 60), st.sampled_from([E4M3, E5M2]))
def test_scaling_by_a_power_of_two_changes_no_digit(power: int, target: Format) -> None:
    """What is rounded scales with what it was rounded from, exactly."""
    values = some(8, 64)
    assert torch.equal(
        rounded(values * 2.0**power, target, values.abs().amax() * 2.0**power),
        rounded(values, target, values.abs().amax()) * 2.0**power,
    )


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda each: each.name)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_rounding_loses_less_than_half_a_digit(target: Format, seed: int, size: float) -> None:
    """Relative to the number, but for those below the format's smallest, relative to the largest."""
    values = some(16, 256, seed=seed) * size
    amax = values.abs().amax()
    lost = (rounded(values, target, amax) - values).abs()
    smallest = float(all_of(target)[all_of(target) > 0].min()) / target.largest
    assert torch.all(lost <= torch.maximum(RELATIVE[target.name] * values.abs(), amax * smallest))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 32), (16, 16)])
def test_blocks_do_not_see_each_other(block: tuple[int, int]) -> None:
    """A huge number costs only its own block digits; ends that are no whole block are blocks of their own."""
    values = some(200, 300)
    clean = rounded_in_blocks(values, E4M3, block)
    values[0, 0] = 1e8
    spoilt = rounded_in_blocks(values, E4M3, block)
    outside = torch.ones_like(values, dtype=torch.bool)
    outside[: block[0], : block[1]] = False
    assert torch.equal(clean[outside], spoilt[outside])
    assert not torch.equal(clean[~outside], spoilt[~outside])
    assert clean.shape == values.shape


def test_square_blocks_are_the_same_both_ways() -> None:
    """So a weight need be rounded once for both products."""
    values = some(256, 384)
    assert torch.equal(rounded_in_blocks(values, E4M3, (128, 128)).t(), rounded_in_blocks(values.t(), E4M3, (128, 128)))
    assert torch.equal(rounded_in_nvfp4(values, (16, 16)).t(), rounded_in_nvfp4(values.t(), (16, 16)))


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_nvfp4_loses_a_quarter_of_a_block_at_most(block: tuple[int, int]) -> None:
    """Half a step between 4 and 6, and what the block's own E4M3 scale is off."""
    values = some(64, 96)
    lost = (rounded_in_nvfp4(values, block) - values).abs()
    tiles = values.abs().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax(dim=(1, 3), keepdim=True)
    largest = tiles.expand(-1, block[0], -1, block[1]).flatten(2).flatten(0, 1)
    assert torch.all(lost <= largest * (1.0 / 6.0 + 2.0**-4))


def test_rounding_by_chance_is_right_on_average() -> None:
    """The mean over many draws is the number itself; each draw is one of its two neighbours."""
    values = torch.full((1, 16), 2.3)
    values[0, 0] = 6.0
    draws = torch.stack(
        [rounded_in_nvfp4(values, (1, 16), uniform(key, range(1), range(16), values.device)) for key in range(400)]
    )
    assert {round(each, 4) for each in draws[:, 0, 1:].unique().tolist()} == {2.0, 3.0}
    assert abs(float(draws[:, 0, 1:].mean()) - 2.3) < 0.03


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    """A saturated infinity would pass the vote before the update."""
    values = some(16, 32)
    values[3, 5] = bad
    kept = [
        rounded(values, E4M3, values.abs().amax()),
        rounded(values, E5M2, torch.tensor(3.0)),
        rounded_in_blocks(values, E4M3, (1, 32)),
        rounded_in_nvfp4(values, (1, 16)),
    ]
    assert all(each[3, 5].isnan() for each in kept)


def test_nothing_but_zeros_stays_zeros() -> None:
    """No scale is made of them."""
    zeros = torch.zeros(4, 32)
    kept = [
        rounded(zeros, E4M3, zeros.amax()),
        rounded_in_blocks(zeros, E4M3, (1, 32)),
        rounded_in_nvfp4(zeros, (1, 16)),
    ]
    assert all(torch.equal(each, zeros) for each in kept)


def test_chance_belongs_to_the_place_and_not_to_the_cut() -> None:
    """Any part of a matrix gets the numbers that it has in the whole; other keys get others."""
    device = torch.device("cpu")
    whole = uniform(7, range(0, 40), range(0, 30), device)
    assert torch.equal(uniform(7, range(8, 24), range(10, 30), device), whole[8:24, 10:30])
    assert not torch.equal(uniform(8, range(0, 40), range(0, 30), device), whole)
    assert float(whole.min()) >= 0
    assert float(whole.max()) < 1
    assert abs(float(whole.mean()) - 0.5) < 0.03


def test_mixing_keeps_products_over_rows() -> None:
    """Also with rows that are no multiple of the transform's size, which it fills up."""
    left, right = some(70, 8, seed=1), some(70, 12, seed=2)
    mixed = transform(left).t() @ transform(right)
    assert transform(left).shape[0] % HADAMARD_SIZE == 0
    torch.testing.assert_close(mixed, left.t() @ right, rtol=1e-5, atol=1e-5)
