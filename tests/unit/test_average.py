"""Promise: the average of the weights is what its decay says, whatever the interval, and soon forgets its start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import EmaConfig
from parallelism.average import WeightAverage, weight_of
from parallelism.optimizer import Slot
from parallelism.updates import UpdateRule


@given(st.floats(0.01, 0.9999), st.integers(1, 20), st.integers(1, 10**6))
def test_the_weight_of_an_interval_is_that_of_its_steps(decay: float, interval_steps: int, step: int) -> None:
    """Never more than the warm-up allows, in the end 1 - decay^interval, and never rising."""
    config = EmaConfig(decay=decay, interval_steps=interval_steps)
    weight = weight_of(config, step)
    assert 0.0 < weight <= 1.0
    assert weight >= 1.0 - decay**interval_steps
    assert weight_of(config, step + 1) <= weight
    if (1 + step) / (10 + step) >= decay:
        assert weight == 1.0 - decay**interval_steps


def averaged(config: EmaConfig, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that grow by 1 a step from 5, and their average."""
    parameter = torch.nn.Parameter(torch.full((3,), 5.0))
    slot = Slot("w", parameter, parameter, UpdateRule(0.0), {})
    average = WeightAverage(config, [slot], with_weights=True)
    with torch.no_grad():
        for step in range(1, steps + 1):
            parameter.add_(1.0)
            average.update(step)
    return parameter.detach(), average.state_dict()["w"]


def test_an_average_trails_its_weights_by_the_length_that_its_decay_says() -> None:
    """Of weights that grow evenly it is decay / (1 - decay) steps old: 9, and a little less with an interval."""
    weights, average = averaged(EmaConfig(decay=0.9), 300)
    assert float((weights - average)[0]) == pytest.approx(9.0, rel=1e-3)
    weights, average = averaged(EmaConfig(decay=0.9, interval_steps=4), 300)
    assert float((weights - average)[0]) == pytest.approx(4 * 0.9**4 / (1 - 0.9**4), rel=1e-3)


def test_an_average_stands_still_between_intervals_and_is_its_own_memory() -> None:
    weights, average = averaged(EmaConfig(decay=0.5, interval_steps=10), 9)
    assert average.eq(5.0).all()
    assert weights.eq(14.0).all()
