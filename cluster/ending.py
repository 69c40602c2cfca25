"""How a run ends: the exit code, and why in a sentence. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.exits import ExitCode


@dataclass(frozen=True)
class End:
    """The run's end."""

    exit_code: ExitCode
    reason: str


def ended_after(last: int, target: int, saved: int, reason: str) -> End:
    """All workers ended well after step `last`: done only if training is, and its last state is on disk.

    saved: the newest snapshot's step, -1 for none. reason: why they were asked to leave, "" if the supervisor did not.
    """
    if saved < last:
        return End(
            ExitCode.REQUEUE,
            f"step {last} is trained, but the newest snapshot on disk is of step {max(saved, 0)}: mend "
            "what was said above about it (or, if nothing was, the disk is slow: raise cluster.leave_timeout_s), "
            "and the same command goes on from there",
        )
    if last >= target:
        return End(ExitCode.DONE, "training is done")
    return End(ExitCode.REQUEUE, reason or "a worker was asked to leave by a signal")


def too_few(usable: int, wanted: int, fewest: int) -> End:
    """Training cannot begin. fewest: how few nodes it could do with, if a layout fitted."""
    least = f", and no layout of {fewest} nodes or more fits on them" if fewest < wanted else ""
    return End(
        ExitCode.REQUEUE,
        f"only {usable} of cluster.nodes = {wanted} nodes came up{least}; logs/<node>/agent.log says why",
    )
