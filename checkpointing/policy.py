"""When each tier is fed: pure, from the step and the configuration, so that all ranks decide alike."""

from __future__ import annotations

import msgspec

from checkpointing.segment import PersistTo
from configs.schema import CheckpointConfig


class Feed(msgspec.Struct, frozen=True):
    """What to do with a step's state: stage it in memory or not, and what the agent shall write it to."""

    stage: bool
    persist: PersistTo


class TierPolicy(msgspec.Struct, frozen=True):
    """How often each tier is fed. (What is kept is `checkpointing.keep`; a bucket takes what the run directory has.)"""

    config: CheckpointConfig

    def feed(self, step: int, final: bool, busy: bool, clock_due: bool) -> Feed:
        """For a finished step.

        final: training ends or leaves after it. busy: some rank's last snapshot is still on its way to a disk, so that
        this one is left out there. clock_due: rank 0's clock says that the run directory should get one.
        """
        config = self.config
        run = final or clock_due or step % config.persist_interval_steps == 0
        node = bool(config.node_dir) and (final or step % config.node_interval_steps == 0)
        persist = (PersistTo.RUN if run else PersistTo.NOTHING) | (PersistTo.NODE if node else PersistTo.NOTHING)
        if busy and not final:
            persist = PersistTo.NOTHING
        return Feed(bool(persist) or step % config.ram_interval_steps == 0, persist)

    def copies(self, step: int) -> bool:
        """Whether a staged step is also sent to peers."""
        interval = self.config.peer_interval_steps or self.config.ram_interval_steps
        return self.config.peer_copies > 0 and step % interval == 0

    def clock_due(self, seconds: float) -> bool:
        """Whether the run directory has waited long enough since it got its last snapshot, `seconds` ago."""
        minutes = self.config.persist_interval_minutes
        return minutes > 0 and seconds >= minutes * 60
