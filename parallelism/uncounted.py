"""What must not count: evaluations, and the trial runs by which a pipeline learns its activations' shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed.fsdp
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from parallelism.titan import expert_token_counters


def forget_trial_runs(schedule: Any, parts: list[nn.Module], forget: Sequence[Callable[[], object]]) -> None:
    """Have no expert count the tokens of a stage's trial runs, and no recorder note what they send.

    forget: what to call after each, for what else it may have left behind.

    Before its first step, and after each evaluation, a pipeline runs its stages once to learn the shapes that they
    exchange, on uninitialised memory where the real activations come from another rank. A step begins with empty
    counters, so emptying them is all that there is to do.
    """

    def forgetting(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = _unrecorded(prepare)(*args, **kwargs)
            with torch.no_grad():
                for counter in expert_token_counters(parts):
                    counter.zero_()
                for each in forget:
                    each()
            return result

        return run

    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        stage._prepare_forward_infra = forgetting(stage._prepare_forward_infra)
        stage._prepare_backward_infra = forgetting(stage._prepare_backward_infra)
    if hasattr(schedule, "_warmup_p2p"):
        schedule._warmup_p2p = _unrecorded(schedule._warmup_p2p)


def _unrecorded(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """What is sent to get a pipeline going is no part of the step that happens to come first."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return prepare(*args, **kwargs)

    return run


@contextlib.contextmanager
def evaluation(parts: list[nn.Module]) -> Iterator[None]:
    """Within it experts count no tokens; after it no weights stay gathered, as FSDP2 leaves them without a backward."""
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part in parts:
            part.train()
            for module in part.modules():
                if isinstance(module, torch.distributed.fsdp.FSDPModule):
                    module.reshard()
