"""The rungs of the ladder for bad numbers that come after single skipped updates: go back, further back, stop.

The rung between, a lower precision recipe, does not exist: there is no recipe below BF16 in this trainer.
"""

from __future__ import annotations

import msgspec

from cluster.events import Back
from cluster.state import JobState
from configs.schema import JobConfig
from health.verdict import Cause, Severity, Verdict
from trainer.exits import ExitCode
from trainer.history import Ranges, batches_of, union

_WORDS = {
    Cause.SPIKE: "the loss or the gradient norm leapt",
    Cause.NONFINITE: "the loss or a gradient was not finite",
}


class Rollback(msgspec.Struct, frozen=True, tag="rollback"):
    """All workers start again from a snapshot of to_step or earlier, and never read the batches left_out.

    generation: it and earlier ones made nothing after to_step that may still be loaded. left_out: ranges (first,
    count) of batches by their position, see `trainer.history`. step: where the trouble began this time.
    """

    generation: int
    step: int
    to_step: int
    left_out: Ranges
    reason: str


class Refusal(msgspec.Struct, frozen=True):
    """Going back would not help: the exit code and the reason to stop with."""

    exit_code: ExitCode
    reason: str


def back_to(action: Rollback) -> Back:
    """The action as the journal has it: all that follows from it is in one line, written whole or not at all."""
    return Back(generation=action.generation, step=action.step, to_step=action.to_step, left_out=action.left_out)


def decide_numbers(verdict: Verdict, state: JobState, config: JobConfig) -> Rollback | Refusal | None:
    """What to do about workers that wait to go back; None if the verdict is about something else.

    A place is as long as the window that steps are judged by. The same trouble at the same place with other data is
    answered by going further back each time, as the harm may have been done before it showed, and at last by stopping.
    """
    wanted = state.rollback_wanted
    if verdict.cause not in _WORDS or verdict.severity is not Severity.WORKERS or wanted is None:
        return None
    what = f"{_WORDS[verdict.cause].capitalize()} from step {wanted.step} on"
    numbers = config.numbers
    if state.restarts_used >= config.health.max_restarts:
        return Refusal(
            ExitCode.FAILED,
            f"{what}, and the {config.health.max_restarts} automatic restarts of this run are used up; "
            "look at the incidents, then raise health.max_restarts and run the same command again.",
        )
    before = [each for each in state.rollbacks if abs(each - wanted.step) <= numbers.window_steps]
    if len(before) >= numbers.max_rollbacks:
        return Refusal(
            ExitCode.DO_NOT_RESTART,
            f"{what}, although the run went back {len(before)} times here and left out other batches each time: the "
            "data is not to blame. Look at the learning rate, the gradient norms before it and the model, in a new "
            "run; or raise numbers.max_rollbacks or numbers.spike_z and run the same command again.",
        )
    first = max(1, wanted.step - numbers.back_steps * len(before), _oldest_kept(state, config, wanted.step) + 1)
    last = wanted.step + wanted.batches - 1
    left_out = batches_of(first, last, union(state.left_out, _configured(config)))
    words = " and ".join(_range_words(*each) for each in left_out)
    again = f", for the {len(before) + 1}. time here" if before else ""
    return Rollback(
        generation=wanted.generation,
        step=wanted.step,
        to_step=first - 1,
        left_out=left_out,
        reason=f"{what}{again}: the run goes back to before step {first} and leaves out {words}.",
    )


def _oldest_kept(state: JobState, config: JobConfig, before_step: int) -> int:
    """Step of the oldest snapshot that retention has surely left in the run directory; 0 if none is old enough."""
    kept = [step for step in state.snapshots[-config.checkpoint.keep_last :] if step < before_step]
    return min(kept, default=0)


def _configured(config: JobConfig) -> Ranges:
    return tuple((each.first, each.count) for each in config.data.leave_out)


def _range_words(first: int, count: int) -> str:
    return f"batch {first}" if count == 1 else f"batches {first} to {first + count - 1}"
