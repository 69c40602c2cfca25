"""What a rank does about numbers that are out of line: it leaves updates out, and asks to go back.

Every rank takes the same decision in the same step, as all of them judge the same global numbers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trainer.events import FactKind, Phase
from trainer.numbers import Finding

if TYPE_CHECKING:
    from trainer.build import Rank
    from trainer.data import StepBatch

_POLL_S = 0.05
_REPEAT_S = 5.0


class NotTakenBackError(Exception):
    """The run was asked to leave while it waited to go back; the next attempt finds the same trouble and asks again."""


def leave_update_out(rank: Rank, batch: StepBatch, finding: Finding) -> None:
    """Forget a step's gradients, and say so: in the ledger of each rank, and to the journal."""
    rank.engine.discard_update()
    if rank.ledger is not None:
        rank.tell_once(
            rank.ledger.append(batch.step, batch.first, batch.count, batch.digest, batch.passed, skipped=True)
        )
    if rank.context.rank == 0:
        detail = f"{finding.detail}; batch {batch.batch} was read, its update left out"
        rank.context.note(FactKind.UPDATE_SKIPPED, detail, oddity=finding.oddity)
    rank.stretch = rank.watch.skipped(finding)


def wait_to_go_back(rank: Rank) -> None:
    """Ask for a new generation that leaves the bad stretch out, and wait for it: this process will be killed.

    Nothing that this generation still computes would count. The wish is repeated: a supervisor may have died with it.

    Raises:
        NotTakenBackError: if the job is to leave first.
    """
    stretch = rank.stretch
    assert stretch is not None
    words = f"steps {stretch.first} to {stretch.last} were out of line: {stretch.oddity.value}"
    asked_s = -_REPEAT_S
    while not rank.context.leave_requested:
        rank.context.heart.beat(Phase.SNAPSHOT)
        if rank.context.rank == 0 and time.monotonic() - asked_s >= _REPEAT_S:
            asked_s = time.monotonic()
            rank.context.note(
                FactKind.ROLLBACK_WANTED, words, step=stretch.first, oddity=stretch.oddity, batches=stretch.batches
            )
        time.sleep(_POLL_S)
    raise NotTakenBackError(f"asked to leave; {words}")
