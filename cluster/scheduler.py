"""What Everstep needs of whoever owns the machines."""

from __future__ import annotations

from typing import Protocol


class Scheduler(Protocol):
    """Starts agents and ends nodes. Handles are strings, since they outlive this process in the journal."""

    def start(self, node: str) -> str:
        """Start the agent of a node; returns a handle for the calls below."""

    def alive(self, handle: str) -> bool:
        """Whether the scheduler knows the agent to be running; False only when it is sure that it is not."""

    def kill(self, node: str, handle: str) -> None:
        """End the agent and all its workers now, and give back what they held."""

    def last_words(self, node: str) -> tuple[str, ...]:
        """Last lines that the agent printed: evidence for an agent that never spoke."""
