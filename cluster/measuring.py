"""The agent's side of an examination of the network: measures what an order asks for, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.messages import Measure, Measured, PeerAt
from health.network import Way


class Measurer:
    """measure: the way from a peer, measured for so many seconds. answer is called from the thread with the result."""

    def __init__(self, measure: Callable[[PeerAt, float], Way], answer: Callable[[Measured], None]) -> None:
        self._measure_way = measure
        self._answer = answer
        self._newest = 0

    def obey(self, wanted: Measure | None) -> None:
        """An order came; begins the measurement if it is a new one. Called by one thread."""
        if wanted is None or wanted.number <= self._newest:
            return
        self._newest = wanted.number
        threading.Thread(target=self._measure, args=(wanted,), name="measure", daemon=True).start()

    def _measure(self, wanted: Measure) -> None:
        ways = tuple(self._measure_way(peer, wanted.for_s) for peer in wanted.peers)
        self._answer(Measured(wanted.number, ways))
