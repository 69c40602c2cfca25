"""The agent's side of an examination of the network: measures what an order asks for, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from checkpointing.transfer_probe import measure
from cluster.messages import Measure, Measured
from health.network import Way

TIMEOUT_S = 5.0


class Measurer:
    """answer is called from the thread with each answer. key: the job's transfer key."""

    def __init__(self, node: str, key: bytes, answer: Callable[[Measured], None]) -> None:
        self._node = node
        self._key = key
        self._answer = answer
        self._newest = 0

    def obey(self, wanted: Measure | None) -> None:
        """An order came; begins the measurement if it is a new one. Called by one thread."""
        if wanted is None or wanted.number <= self._newest:
            return
        self._newest = wanted.number
        threading.Thread(target=self._measure, args=(wanted,), name="measure", daemon=True).start()

    def _measure(self, wanted: Measure) -> None:
        ways = []
        for peer in wanted.peers:
            found = measure(peer.address, self._key, wanted.for_s, TIMEOUT_S)
            ways.append(
                Way(
                    source=peer.node, target=self._node, problem=found.problem, latency_s=found.latency_s,
                    mb_per_s=found.mb_per_s,
                )
            )  # fmt: skip
        self._answer(Measured(wanted.number, tuple(ways)))
