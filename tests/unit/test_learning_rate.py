"""The learning rate: bounded, without jumps, falling after warm-up, and equal to Megatron's where both define it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import OptimizerConfig
from parallelism.schedule import learning_rate

SCHEDULES = ("cosine", "wsd", "linear", "constant")
SHAPES = ("linear", "cosine", "sqrt")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, int]:
    """A configuration and its number of steps, warm-up included."""
    steps = draw(st.integers(1, 400))
    config = OptimizerConfig(
        lr=draw(st.floats(1e-6, 1.0)),
        warmup_steps=draw(st.integers(0, steps)),
        schedule=draw(st.sampled_from(SCHEDULES)),
        decay_fraction=draw(st.floats(0.0, 1.0)),
        decay_shape=draw(st.sampled_from(SHAPES)),
        min_lr_ratio=draw(st.floats(0.0, 1.0)),
    )
    return config, steps


@given(schedules())
def test_rate_stays_within_its_bounds(case: tuple[OptimizerConfig, int]) -> None:
    """Never above lr, never negative, never below the floor once warm-up is over."""
    config, steps = case
    for step in range(1, steps + 1):
        rate = learning_rate(config, steps, step)
        assert 0.0 <= rate <= config.lr * (1 + 1e-12)
        if step >= config.warmup_steps:
            assert rate >= config.lr * config.min_lr_ratio * (1 - 1e-12)


@given(schedules())
def test_rate_rises_in_warmup_and_never_again(case: tuple[OptimizerConfig, int]) -> None:
    """Strictly up until lr is reached at the last warm-up step, then never up."""
    config, steps = case
    rates = [learning_rate(config, steps, step) for step in range(1, steps + 1)]
    top = max(1, config.warmup_steps)
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[top - 1 :]))
    if config.warmup_steps:
        assert rates[config.warmup_steps - 1] == config.lr


@given(schedules())
def test_rate_has_no_jumps(case: tuple[OptimizerConfig, int]) -> None:
    """No step changes the rate by more than the steepest slope of warm-up and decay: pi/2 of a line's for a cosine,
    and for a root its first step.
    """
    config, steps = case
    decay = steps - config.warmup_steps
    if config.schedule == "wsd":
        decay = min(decay, round(config.decay_fraction * steps))
    falls = 1.5708 / max(decay, 1)
    if (config.schedule, config.decay_shape) == ("wsd", "sqrt"):
        falls = max(decay, 1) ** -0.5
    steepest = config.lr * max(1 / max(config.warmup_steps, 1), falls)
    rates = [learning_rate(config, steps, step) for step in range(1, steps + 1)]
    assert all(abs(a - b) <= steepest * (1 + 1e-9) for a, b in pairwise(rates))


@given(schedules())
def test_borders_are_exact(case: tuple[OptimizerConfig, int]) -> None:
    """Not a rounding beside lr while it is held, nor beside the floor at the last step and after it."""
    config, steps = case
    if config.schedule == "wsd":
        begin = max(config.warmup_steps, steps - round(config.decay_fraction * steps))
        held = range(max(config.warmup_steps, 1), begin + 1)
        assert {learning_rate(config, steps, step) for step in held} <= {config.lr}
    decays = config.schedule in ("cosine", "linear") or (
        config.schedule == "wsd" and round(config.decay_fraction * steps) > 0
    )
    if decays and config.warmup_steps < steps:
        floor = config.lr * config.min_lr_ratio
        assert learning_rate(config, steps, steps) == learning_rate(config, steps, 10 * steps) == floor


@pytest.mark.parametrize("shape", SHAPES)
def test_half_way_down_each_shape_is_where_its_name_says(shape: str) -> None:
    config = OptimizerConfig(
        lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.5, min_lr_ratio=0.0, decay_shape=shape  # type: ignore[arg-type]
    )  # fmt: skip
    quarter = {"linear": 0.75, "cosine": 0.5 + 0.5**1.5, "sqrt": 0.5}[shape]
    assert learning_rate(config, 80, 50) == pytest.approx(quarter)


def test_step_zero_is_refused() -> None:
    """Steps count from 1."""
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate(OptimizerConfig(), 10, 0)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [*((schedule, "linear") for schedule in SCHEDULES), ("wsd", "cosine"), ("wsd", "sqrt")],
)
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_rate_equals_megatron(schedule: str, shape: str, warmup_steps: int) -> None:
    """Megatron's scheduler gives the same rate at every step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    steps = 50
    config = OptimizerConfig(
        lr=3e-4,
        warmup_steps=warmup_steps,
        schedule=schedule,  # type: ignore[arg-type]
        decay_fraction=0.3,
        decay_shape=shape,  # type: ignore[arg-type]
        min_lr_ratio=0.1,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    oracle = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if schedule == "wsd" else schedule,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=round(config.decay_fraction * steps),
        lr_wsd_decay_style={"sqrt": "minus_sqrt"}.get(shape, shape),
    )
    for step in range(1, steps + 1):
        oracle.step(1)
        assert learning_rate(config, steps, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
