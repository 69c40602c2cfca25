"""Promise: dead and exploding layers and collapsed experts are told once, after two looks; healthy ones never are."""

from __future__ import annotations

import math
import random

import pytest

from trainer.events import Oddity
from trainer.layers import Balance, LayerFinding, LayerWatch, balance, spread

NAMES = ["the embeddings", *(f"layer {n}" for n in range(8)), "the output"]


def usual(dice: random.Random) -> dict[str, float]:
    """Norms of a healthy model: an order of magnitude between layers, and noise."""
    return {name: (0.1 + place / 5) * math.exp(dice.gauss(0, 0.3)) for place, name in enumerate(NAMES)}


def balanced(dice: random.Random, experts: int = 8) -> list[int]:
    return [dice.randrange(20, 200) for _ in range(experts)]


@pytest.mark.parametrize("seed", range(5))
def test_healthy_layers_are_left_alone(seed: int) -> None:
    """No finding in 2,000 looks at noisy layers and unevenly loaded experts."""
    dice, watch = random.Random(seed), LayerWatch(top_k=3)
    assert not [found for _ in range(2000) for found in watch.judge(usual(dice), {"layer 1": balanced(dice)})]


def looks(watch: LayerWatch, norms: dict[str, float], times: int) -> list[list[LayerFinding]]:
    return [watch.judge(norms, {}) for _ in range(times)]


def test_a_dead_layer_is_told_at_the_second_look_and_once() -> None:
    """Its gradients are next to nothing beside the others'; told again only if it was alive in between."""
    dice, watch = random.Random(1), LayerWatch(0)
    dead = {**usual(dice), "layer 3": 0.0}
    first, second, third = looks(watch, dead, 3)
    assert (first, third) == ([], [])
    (found,) = second
    assert found.oddity is Oddity.BAD_LAYER
    assert "layer 3 is dead" in found.detail
    watch.judge(usual(dice), {})
    assert [len(each) for each in looks(watch, dead, 3)] == [0, 1, 0]


def test_an_exploding_layer_is_told() -> None:
    """Many times the others' and many times what it was; a layer that was always large is not exploding."""
    dice, watch = random.Random(2), LayerWatch(0)
    large = {"layer 7": 400.0}
    for _ in range(10):
        assert watch.judge({**usual(dice), **large}, {}) == []
    first, second, third = looks(watch, {**usual(dice), **large, "layer 2": 90.0}, 3)
    assert (first, third) == ([], [])
    (found,) = second
    assert "layer 2 explodes" in found.detail


def test_where_most_layers_are_dead_they_are_told_and_the_rest_is_not_judged() -> None:
    """No median is left to hold the living ones against: that is no reason to fail."""
    watch = LayerWatch(0)
    norms = {**dict.fromkeys(NAMES, 0.0), NAMES[0]: 1.0}
    assert watch.judge(norms, {}) == []
    assert len(watch.judge(norms, {})) == len(NAMES) - 1


def test_collapsed_experts_are_told() -> None:
    """All tokens go to the same experts, look after look."""
    watch = LayerWatch(top_k=2)
    norms = dict.fromkeys(NAMES, 1.0)
    loads = {"layer 4": [500, 500, 3, 0, 0, 0, 0, 1], "layer 5": [100, 90, 120, 80, 110, 70, 130, 60]}
    assert watch.judge(norms, loads) == []
    (found,) = watch.judge(norms, loads)
    assert found.oddity is Oddity.EXPERT_COLLAPSE
    assert "layer 4" in found.detail
    assert "4 of 8 idle" in found.detail


def test_spread_is_one_for_even_loads_and_zero_for_the_fewest_experts() -> None:
    assert spread([10] * 8, 2) == pytest.approx(1)
    assert spread([40, 40, 0, 0, 0, 0, 0, 0], 2) == pytest.approx(0)
    assert spread([0] * 8, 2) == 1
    assert spread([5, 3], 2) == 1


def test_balance_is_that_of_the_worst_layer() -> None:
    """1 and 1 where all experts get the same; towards 0 and the number of experts where one gets all."""
    assert balance({"layer 1": (5, 5, 5, 5)}) == Balance(pytest.approx(1.0), 1.0)
    assert balance({"layer 1": (5, 5, 5, 5), "layer 2": (20, 0, 0, 0)}) == Balance(pytest.approx(0.0), 4.0)
    assert balance({"layer 1": (10, 10, 0, 0)}) == Balance(pytest.approx(0.5), 2.0)
    assert balance({}) is None
