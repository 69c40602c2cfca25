"""Learning rate as a pure function of the step: warm-up, then a decay. Nothing to save, nothing to restore."""

from __future__ import annotations

import math

from configs.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """Rate for update `step`, counted from 1 to `steps`.

    Warm-up is linear and is exactly lr at step warmup_steps. Afterwards `cosine` and `linear` fall to exactly
    lr * min_lr_ratio at the last step, `wsd` (warm-up, stable, decay; arXiv 2404.06395) holds lr and falls over the
    last decay_fraction of the steps, in the shape of decay_shape, `constant` holds lr. Steps beyond the last keep its
    rate.

    Raises:
        ValueError: step is below 1.
    """
    if step < 1:
        raise ValueError(f"step {step} has no learning rate; steps count from 1")
    step = min(step, steps)
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    share = _share_left(config, _decay_progress(config, steps, step))
    # Not floor + (lr - floor) * share: that misses lr by a rounding at its border.
    return config.lr * share + config.lr * config.min_lr_ratio * (1.0 - share)


def _share_left(config: OptimizerConfig, progress: float) -> float:
    """What is left of the way from the floor to lr, from 1 to 0."""
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress


def _decay_progress(config: OptimizerConfig, steps: int, step: int) -> float:
    """How far the decay has gone, from 0 (not begun) to 1 (at the floor)."""
    if config.schedule == "constant":
        return 0.0
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, steps - round(config.decay_fraction * steps))
    if step <= begin or steps <= begin:
        return 0.0
    return (step - begin) / (steps - begin)
