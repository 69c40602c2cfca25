"""Several watchers of one supervisor, as one."""

from __future__ import annotations

from cluster import events
from cluster.supervisor import Watcher


class Watchers:
    """Tells each of them, in order. See `cluster.supervisor.Watcher`."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def open(self) -> None:
        """This process has the run now."""
        for watcher in self.watchers:
            watcher.open()

    def on_event(self, event: events.AnyEvent) -> None:
        """An event was written to the journal."""
        for watcher in self.watchers:
            watcher.on_event(event)

    def on_tick(self) -> None:
        """Called many times a second."""
        for watcher in self.watchers:
            watcher.on_tick()
