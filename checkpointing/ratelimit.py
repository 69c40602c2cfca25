"""How background traffic keeps out of training's way: a bound that all threads of a node share, and a low priority.

The bucket is kept as one instant, the earliest at which the next bytes may go (the "virtual scheduling" form of the
generic cell rate algorithm, ITU-T I.371): each taker moves it on by what its bytes cost and waits until its own turn,
so takers are served in the order they came and nobody recounts tokens.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

BURST_S = 0.1
MIN_SLICE_BYTES = 64 * 2**10
MAX_SLICE_BYTES = 4 * 2**20
_LOOK_AGAIN_S = 0.1
_TOS_CS1 = 0x20
_PRIORITY_FILLER = 1  # TC_PRIO_FILLER of linux/pkt_sched.h


def never() -> bool:
    """Nobody asks for an end."""
    return False


class Bucket:
    """The arithmetic of the bound: no clock, no waiting. Bytes unused for longer than BURST_S are lost."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._next_s = float("-inf")

    def reserve(self, size_bytes: int, now_s: float) -> float:
        """The instant, on the caller's clock, from which these bytes may go; at now_s or later."""
        start_s = max(self._next_s, now_s - BURST_S)
        self._next_s = start_s + size_bytes / self.bytes_per_s
        return max(start_s, now_s)


class RateLimit:
    """At most bytes_per_s over all threads; None or 0 bounds nothing."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bucket = Bucket(bytes_per_s) if bytes_per_s else None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def slice_bytes(self) -> int:
        """How much to send between two takes: a tenth of a second's worth, so that a small bound sends no bursts."""
        if self._bucket is None:
            return MAX_SLICE_BYTES
        return int(min(max(self._bucket.bytes_per_s * BURST_S, MIN_SLICE_BYTES), MAX_SLICE_BYTES))

    def take(self, size_bytes: int, stop: Callable[[], bool] = never) -> bool:
        """Wait until these bytes may go. False after close(), or if `stop` says so, asked ten times a second."""
        if self._bucket is None:
            return not self._closed.is_set() and not stop()
        with self._lock:
            turn_s = self._bucket.reserve(size_bytes, time.monotonic())
        while not stop():
            wait_s = turn_s - time.monotonic()
            if self._closed.wait(max(0.0, min(wait_s, _LOOK_AGAIN_S))):
                return False
            if wait_s <= _LOOK_AGAIN_S:
                return True
        return False

    def close(self) -> None:
        """Let everybody go who waits; nothing may be sent afterwards."""
        self._closed.set()


def yield_to_training(connection: socket.socket) -> None:
    """Mark a connection's packets as background: DSCP CS1 for the network, the lowest band of this machine's queues.

    Hints only: a network that does not look at them ignores them.
    """
    if connection.family == socket.AF_INET6:
        connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _TOS_CS1)
    else:
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _TOS_CS1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY_FILLER)  # after IP_TOS, which sets it too
