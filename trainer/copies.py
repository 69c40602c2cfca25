"""Waits, a bounded time, until the peers have the last snapshot."""

from __future__ import annotations

import time

from checkpointing.manager import SnapshotManager
from trainer.events import FactKind
from trainer.main import RankContext

_POLL_S = 0.0005


class CopyWait:
    """What stands between a step's gradients and its update: the copies of the step before must have arrived.

    Once they are late the job no longer waits for them, until they arrive in time again by themselves: a slow network
    makes copies older, not steps slower.
    """

    def __init__(self, context: RankContext, snapshots: SnapshotManager, wait_s: float) -> None:
        self.context = context
        self.snapshots = snapshots
        self.wait_s = wait_s
        self.late = False

    def wait(self) -> float:
        """Returns the seconds that this took away."""
        started_s = time.monotonic()
        deadline_s = started_s + (0.0 if self.late else self.wait_s)
        # The agent's mark is a byte in shared memory, which nothing can block on.
        while not (arrived := self.snapshots.settled) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if arrived == self.late:
            self.late = not arrived
            self._tell()
        return time.monotonic() - started_s

    def _tell(self) -> None:
        if self.late:
            detail = f"copies of rank {self.context.rank} on peers are late: updates no longer wait for them"
            self.context.note(FactKind.TIER_BEHIND, detail)
        else:
            self.context.note(FactKind.TIER_CAUGHT_UP, f"copies of rank {self.context.rank} arrive in time again")
