"""Checks of `[evaluation]`: what is asked for can happen. Pure."""

from __future__ import annotations

from configs.errors import Problem
from configs.schema import JobConfig


def check_evaluation(config: JobConfig) -> list[Problem]:
    """What is wrong with the section."""
    wanted, persist = config.evaluation, config.checkpoint.persist_interval_steps
    problems = []
    if wanted.interval_steps and not (wanted.command and wanted.command[0].strip()):
        what = "there is nothing to run; set evaluation.command to a program and its arguments, or this to 0"
        problems.append(Problem("evaluation.interval_steps", wanted.interval_steps, what))
    if wanted.command and not wanted.interval_steps:
        what = f"it would never be run; set evaluation.interval_steps, for example to {10 * persist}"
        problems.append(Problem("evaluation.command", wanted.command, what))
    if wanted.interval_steps % persist:
        up = -(-wanted.interval_steps // persist) * persist
        what = f"only every {persist} steps is a snapshot written (checkpoint.persist_interval_steps); set {up}"
        problems.append(Problem("evaluation.interval_steps", wanted.interval_steps, what))
    if wanted.ema and not config.ema.decay:
        what = "no average of the weights is kept; set ema.decay, for example to 0.999, or this to false"
        problems.append(Problem("evaluation.ema", wanted.ema, what))
    return problems
