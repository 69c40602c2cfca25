"""The rungs of the ladder for bad numbers that come after single skipped updates.

Go back, further back, leave FP8 or FP4 for bf16 if that is what the run computes in, stop.
"""

from __future__ import annotations

import msgspec

from cluster.events import Back
from cluster.jobstate import JobState
from cluster.policy_words import ordinal, what
from configs.precision import safer_than
from configs.schema import JobConfig
from health.verdict import Cause, Severity, Verdict
from trainer.events import Fact
from trainer.exits import ExitCode
from trainer.history import Ranges, batches_of, union

_CAUSES = (Cause.SPIKE, Cause.NONFINITE)


class Rollback(msgspec.Struct, frozen=True, tag="rollback"):
    """All workers start again from a snapshot of to_step or earlier, and never read the batches left_out.

    generation: it and earlier ones made nothing after to_step that may still be loaded. left_out: ranges (first,
    count) of batches by their position, see `trainer.history`. step: where the trouble began this time. recipe: what
    all compute in from now on, "" for no change.
    """

    generation: int
    step: int
    to_step: int
    left_out: Ranges
    reason: str
    recipe: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Going back would not help: the exit code and the reason to stop with."""

    exit_code: ExitCode
    reason: str


def back_to(action: Rollback) -> Back:
    """The action as the journal has it: all that follows from it is in one line, written whole or not at all."""
    return Back(
        generation=action.generation,
        step=action.step,
        to_step=action.to_step,
        left_out=action.left_out,
        recipe=action.recipe,
    )


def decide_numbers(verdict: Verdict, state: JobState, config: JobConfig) -> Rollback | Refusal | None:
    """What to do about workers that wait to go back; None if the verdict is about something else.

    The same trouble at the same place with other data is answered by going further back each time, as the harm may
    have been done before it showed; then by a recipe with more bits, where there is one; and at last by stopping.
    """
    wanted = state.rollback_wanted
    if verdict.cause not in _CAUSES or verdict.severity is not Severity.WORKERS or wanted is None:
        return None
    times = len(_earlier_here(wanted, state, config))
    safer = _safer(times, state, config)
    if refusal := _refusal(verdict, times, safer, state, config):
        return refusal
    first = max(
        1, wanted.step - config.numbers.back_steps * times, _oldest_kept(state, config, wanted.step) + 1
    )  # fmt: skip
    if safer:
        return Rollback(
            generation=wanted.generation,
            step=wanted.step,
            to_step=first - 1,
            left_out=(),
            recipe=safer,
            reason=f"{what(verdict)} for the {ordinal(times + 1)} time here, whatever was left out: the run goes back "
            f"to before step {first} and on without {config.precision.recipe}, all in the precision of the rest.",
        )
    left_out = batches_of(first, wanted.step + wanted.batches - 1, union(state.left_out, _configured(config)))
    again = f" for the {ordinal(times + 1)} time here" if times else ""
    ranges = " and ".join(_range_words(*each) for each in left_out)
    return Rollback(
        generation=wanted.generation,
        step=wanted.step,
        to_step=first - 1,
        left_out=left_out,
        reason=f"{what(verdict)}{again}: the run goes back to before step {first} and leaves out {ranges}.",
    )


def facts_about(state: JobState, config: JobConfig) -> tuple[str, ...]:
    """What the decision rests on, beside the verdict: a line each, for a person."""
    wanted = state.rollback_wanted
    if wanted is None:
        return ()
    times = len(_earlier_here(wanted, state, config))
    return (
        f"bad steps: {wanted.batches} from step {wanted.step} on",
        f"went back here before: {times} of {config.numbers.max_rollbacks} times",
        f"precision: {_precision_words(state, config)}",
        f"restarts used: {state.restarts_used} of {config.health.max_restarts}",
    )


def _precision_words(state: JobState, config: JobConfig) -> str:
    return f"{config.precision.recipe}, left before" if state.recipe else config.precision.recipe


def _safer(times: int, state: JobState, config: JobConfig) -> str:
    """The recipe to go over to now; "" for none: it is too early, there is none, or it is not wanted."""
    if times < config.numbers.max_rollbacks or times == 0 or not config.numbers.leave_low_precision:
        return ""
    return safer_than(state.recipe or config.precision.recipe)


def _refusal(verdict: Verdict, times: int, safer: str, state: JobState, config: JobConfig) -> Refusal | None:
    if state.restarts_used >= config.health.max_restarts:
        return Refusal(
            ExitCode.FAILED,
            f"{what(verdict)}, and the {config.health.max_restarts} automatic restarts of this run are used up; "
            "look at the incidents, then raise health.max_restarts and run the same command again.",
        )
    if times < config.numbers.max_rollbacks or safer:
        return None
    although = f", although the run went back {times} times here and left out other batches: the data is not to blame"
    if state.recipe:
        although += f", nor is {config.precision.recipe}, which it has left"
    return Refusal(
        ExitCode.DO_NOT_RESTART,
        f"{what(verdict)}{although if times else ''}. Look at the learning rate, the data and the gradient norms "
        "before it. A new run can try other settings; in this one numbers.max_rollbacks and numbers.spike_z may be "
        "raised, and the same command goes on.",
    )


def _earlier_here(wanted: Fact, state: JobState, config: JobConfig) -> list[int]:
    """Where troubles began that the run went back from at this place, which is as long as the window of judging."""
    return [each for each in state.rollbacks if abs(each - wanted.step) <= config.numbers.window_steps]


def _oldest_kept(state: JobState, config: JobConfig, before_step: int) -> int:
    """Step of the oldest snapshot that retention has surely left in the run directory; 0 if none is old enough."""
    kept = [step for step in state.snapshots[-config.checkpoint.keep_last :] if step < before_step]
    return min(kept, default=0)


def _configured(config: JobConfig) -> Ranges:
    return tuple((each.first, each.count) for each in config.data.leave_out)


def _range_words(first: int, count: int) -> str:
    return f"batch {first}" if count == 1 else f"batches {first} to {first + count - 1}"
