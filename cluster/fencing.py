"""Raises the run directory's fence (`checkpointing.fence`) before a generation begins."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cluster import events

logger = logging.getLogger("everstep.fencing")


class FenceWatcher:
    """A `cluster.watchers.Watcher`: events are told before anything follows from them, so no order of a generation
    goes out before nodes that will not hear it are kept out. raise_fence may raise OSError."""

    def __init__(self, raise_fence: Callable[[int], None]) -> None:
        self.raise_fence = raise_fence

    def open(self) -> None:
        """See `Watcher`."""

    def on_event(self, event: events.AnyEvent) -> None:
        """A full disk must not keep a generation from beginning: orphans then lose by their number alone."""
        if isinstance(event, events.GenerationPlanned):
            try:
                self.raise_fence(event.generation)
            except OSError as error:
                logger.warning("the fence of generation %d could not be raised: %s", event.generation, error)

    def on_tick(self) -> None:
        """See `Watcher`."""
