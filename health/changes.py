"""When a noisy series has really changed. Pure.

A one-sided CUSUM (E. S. Page, Continuous Inspection Schemes, 1954) over what a series is above its own past, in logs:
each step adds what it is above, less half of the change that is looked for, and the sum never falls below nought. Two
things are not as in the book. No single step can add more than a cap, so that outliers, which steps have many of, never
make an alarm: so many steps in a row are needed as were asked for. And the bound follows the noise that is measured: a
noisy series takes longer, and does not alarm more often.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

LEARNT_AFTER = 12
"""Values that a series must have before anything is said about it."""
LONGEST = 32
"""A change that would take more steps to see than this is not looked for, but the smallest that does not: the past of a
series would begin to follow it."""

PAST = 256
"""Values of its past that a series remembers."""
_BLOCKS = (4, 16)
_LOOK_EVERY = 4
_CAP = 0.82
# A sum that drifts by -drift a step passes a bound by chance once in exp(2 * drift * bound / scale^2) steps or so.
_RARE = 16.0


@dataclass(frozen=True)
class Bounds:
    """How a change (a log ratio) is told from noise of a scale: drift and cap of a step, and the bound of the sum."""

    change: float
    scale: float
    drift: float
    cap: float
    bound: float

    @property
    def steps(self) -> int:
        """Steps until a change of just this size is seen, when noise neither helps nor hinders."""
        return math.ceil(self.bound / (min(self.change, self.cap) - self.drift))

    def words(self) -> str:
        """What this noise allows, for a person."""
        seen = f"{percent(math.expm1(self.change))} shows within {self.steps} steps"
        return f"steps vary by {percent(self.scale, 1)}; with that, {seen}, and less may not"


def percent(part: float, decimals: int = 0) -> str:
    """A part of one as percent."""
    return f"{100 * part:.{decimals}f}%"


def bounds_for(change: float, steps: int, scale: float) -> Bounds:
    """Bounds for a change that at least `steps` steps must show, or for a larger one where noise hides it."""
    while (bounds := _bounds(change, steps, scale)).steps > max(LONGEST, steps):
        change *= 1.2
    return bounds


def _bounds(change: float, steps: int, scale: float) -> Bounds:
    drift = change / 2
    cap = max(_CAP * change, 2.0 * scale)
    fewest = (steps - 1) * (cap - drift) * 1.05 + 0.02 * change
    return Bounds(change, scale, drift, cap, max(fewest, _RARE * scale * scale / (2 * drift)))


class Past:
    """What a series used to be: the median of its last values, looked up again every few of them."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=PAST)
        self.median = 0.0
        self._new = 0

    def add(self, value: float) -> None:
        """One more value of the undisturbed series."""
        self.values.append(value)
        self._new += 1
        if len(self.values) <= LEARNT_AFTER or self._new >= LEARNT_AFTER:
            self._new = 0
            self.median = statistics.median(self.values)

    @property
    def learnt(self) -> bool:
        """Whether enough is known."""
        return len(self.values) >= LEARNT_AFTER


class Noise:
    """How undisturbed series of one kind lie about their past, tails and slow waves included."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=512)
        self._blocks = {length: _Blocks(length) for length in _BLOCKS}
        self.steps = 0
        self._found: tuple[float, float] | None = None

    def add(self, values: Mapping[int, float], cap: float) -> None:
        """One step: what is above the past (below: negative), by series. Beyond the cap nothing counts in a sum."""
        self.steps += 1
        self._values.extend(values.values())
        for blocks in self._blocks.values():
            blocks.add(values, cap)
        if self.steps % (_LOOK_EVERY if self.steps < 64 else 4 * _LOOK_EVERY) == 0:
            self._found = None

    @property
    def middle(self) -> float:
        """Where they lie on average: comparing with the worse of two makes it less than nought."""
        return self._look()[0]

    @property
    def scale(self) -> float:
        """Standard deviation of a step; as large as sums of several steps need it, if steps hang together.

        Outliers count as three deviations at most: the cap of a step holds them back already. While few steps are
        known it is taken to be larger than it looks.
        """
        return self._look()[1]

    def _look(self) -> tuple[float, float]:
        if self._found is None:
            if not self._values:
                return 0.0, 0.0
            centre = statistics.median(self._values)
            limit = 3.0 * 1.4826 * statistics.median(abs(value - centre) for value in self._values)
            bounded = [centre + max(-limit, min(value - centre, limit)) for value in self._values]
            middle = statistics.fmean(bounded)
            scales = [_rms(bounded, middle)]
            scales += [_rms(each.means, middle) * math.sqrt(each.length) for each in self._blocks.values()]
            self._found = middle, max(scales) * (1.0 + 16.0 / self.steps)
        return self._found


class _Blocks:
    """Means of so many successive steps of one series."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.means: deque[float] = deque(maxlen=max(512 // length, 64))
        self._open: dict[int, list[float]] = {}

    def add(self, values: Mapping[int, float], cap: float) -> None:
        for series, value in values.items():
            block = self._open.setdefault(series, [])
            block.append(max(-cap, min(value, cap)))
            if len(block) == self.length:
                self.means.append(sum(block) / self.length)
                block.clear()


def _rms(values: Collection[float], middle: float) -> float:
    return math.sqrt(sum((value - middle) ** 2 for value in values) / len(values)) if values else 0.0


class Alarm:
    """One series' sum: rings when it changed, and is quiet again when the series came back."""

    def __init__(self) -> None:
        self.since = -1
        self.rang_at = -1
        self._sum = 0.0
        self._back = 0.0

    @property
    def ringing(self) -> bool:
        """Whether the change is there."""
        return self.rang_at >= 0

    def suspects(self, bounds: Bounds) -> bool:
        """Whether it rings, or is half-way there."""
        return self.ringing or self._sum > bounds.bound / 2

    def add(self, step: int, above: float, bounds: Bounds) -> bool:
        """Take in how far the series is above its past in this step. Returns whether it begins to ring."""
        if self.ringing:
            gain = min(bounds.change - above, bounds.cap) - bounds.drift
            self._back = max(0.0, self._back + gain)
            if self._back > bounds.bound:
                self.reset()
            return False
        if self._sum <= 0.0:
            self.since = step
        self._sum = max(0.0, self._sum + max(-bounds.cap, min(above, bounds.cap)) - bounds.drift)
        if self._sum <= bounds.bound:
            return False
        self.rang_at, self._back = step, 0.0
        return True

    def reset(self) -> None:
        """Begin anew."""
        self.since, self.rang_at, self._sum, self._back = -1, -1, 0.0, 0.0
