"""Who is told what happens in a run, and several of them as one."""

from __future__ import annotations

from typing import Protocol

from cluster import events


class Watcher(Protocol):
    """Who is told what happens: the console, telemetry. Both calls must be quick."""

    def open(self) -> None:
        """This process has the run now."""

    def on_event(self, event: events.AnyEvent) -> None:
        """An event was written to the journal."""

    def on_tick(self) -> None:
        """Called many times a second."""


class Watchers:
    """Tells each of them, in order. See `Watcher`."""

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
