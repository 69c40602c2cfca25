"""How far a node's clock is from the supervisor's, from the times that their messages carry.

The four times of NTP (RFC 5905, section 8) with the supervisor's receiving and sending taken as one: it answers at
once, and where it does not the round trip is long and says so itself. The offset is known to half a round trip; of the
samples in a window the one with the shortest round trip counts.
"""

from __future__ import annotations

from collections import deque

import msgspec

from health.verdict import Cause, Certainty, Severity, Verdict

LIMIT_S = 1.0
SAMPLES = 16
_SUSTAINED = 8


class Offset(msgspec.Struct, frozen=True):
    """seconds: what the node's clock must be turned forward by to agree; it is right to within error_s."""

    seconds: float
    error_s: float


class ClockFilter:
    """One node's clock against the supervisor's."""

    def __init__(self) -> None:
        self._samples: deque[Offset] = deque(maxlen=SAMPLES)
        self._off_in_a_row = 0
        self._said = False

    def see(self, sent_s: float, answered_s: float, received_s: float) -> None:
        """A round trip: sent_s and received_s by the node's clock, answered_s by the supervisor's. 0: not known.

        Wall times in seconds. A trip that ends before it began (the clock was set meanwhile) is dropped.
        """
        trip_s = received_s - sent_s
        if not sent_s or not answered_s or trip_s < 0:
            return
        sample = Offset(answered_s - (sent_s + received_s) / 2, trip_s / 2)
        self._samples.append(sample)
        off = abs(sample.seconds) - sample.error_s > LIMIT_S
        self._off_in_a_row = self._off_in_a_row + 1 if off else 0

    @property
    def offset(self) -> Offset | None:
        """The best estimate now; None before the first round trip."""
        return min(self._samples, key=lambda sample: sample.error_s, default=None)

    def judge(self, node: str, step: int = -1) -> Verdict | None:
        """A notice, once, when the clock was surely off by more than LIMIT_S in _SUSTAINED round trips in a row."""
        best = self.offset
        if best is None or self._off_in_a_row < _SUSTAINED:
            self._said = self._said and self._off_in_a_row > 0
            return None
        if self._said:
            return None
        self._said = True
        way = "behind" if best.seconds > 0 else "ahead of"
        line = (
            f"{node}: the clock is {abs(best.seconds):.1f} s {way} the supervisor's, known to {best.error_s:.3f} s "
            f"(limit {LIMIT_S:g} s): times in logs do not compare, and an object store may refuse its signatures"
        )
        return Verdict(
            node=node, rank=-1, cause=Cause.NODE_DEGRADED, severity=Severity.NOTICE, step=step,
            fingerprint="clock off", evidence=(line,), certainty=Certainty.PROOF, device="clock",
        )  # fmt: skip
