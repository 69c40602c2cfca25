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
from array import array
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

LEARNT_AFTER = 12
"""Values that a series must have before anything is said about it."""
LONGEST = 32
"""A change that would take more steps to see than this is not looked for, but the smallest that does not: the past of a
series would begin to follow it."""

PAST = 256
"""Values of its past that a series remembers."""
_LADDER = (1.0, 2.0, 4.0)
_BLOCKS = (4, 16)
_LOOK_EVERY = 4
_DOUBT = 16.0
_KNOWN_AFTER = 8
_HELD_STEPS = 8
_CAP = 0.82
# A sum that drifts by -drift a step passes a bound by chance once in exp(2 * drift * bound / scale^2) steps or so.
_RARE = 16.0


T = TypeVar("T")


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


def ladder_for(change: float, steps: int, scale: float) -> tuple[Bounds, ...]:
    """Bounds for a change that at least `steps` steps must show, or for the smallest larger one that noise does not
    hide; then for larger ones, which show sooner."""
    while _bounds(change, steps, scale).steps > max(LONGEST, steps):
        change *= 1.2
    return tuple(_bounds(times * change, steps, scale) for times in _LADDER)


def _bounds(change: float, steps: int, scale: float) -> Bounds:
    drift = change / 2
    cap = max(_CAP * change, 2.0 * scale)
    fewest = (steps - 1) * (cap - drift) * 1.05 + 0.02 * change
    return Bounds(change, scale, drift, cap, max(fewest, _RARE * scale * scale / (2 * drift)))


class Newest:
    """The newest rows of numbers, eight bytes for each: a large job has a hundred thousand series.

    width: numbers in a row. Rows are in no order.
    """

    def __init__(self, width: int = 1, rows: int = PAST) -> None:
        self._width = width
        self._most = rows * width
        self._values = array("d")
        self._next = 0

    def __len__(self) -> int:
        return len(self._values) // self._width

    def add(self, *row: float) -> None:
        """One more row; the oldest goes when there is no room."""
        assert len(row) == self._width
        if len(self._values) < self._most:
            self._values.extend(row)
        else:
            self._values[self._next : self._next + self._width] = array("d", row)
            self._next = (self._next + self._width) % self._most

    def median(self, column: int = 0) -> float:
        """The median of a column. StatisticsError if there is no row."""
        return statistics.median(self._values[column :: self._width])


class Past:
    """What a series used to be: the median of its last values, looked up again every few of them."""

    def __init__(self) -> None:
        self.values = Newest()
        self.median = 0.0
        self._new = 0

    def add(self, value: float) -> None:
        """One more value of the undisturbed series."""
        self.values.add(value)
        self._new += 1
        if len(self.values) <= LEARNT_AFTER or self._new >= LEARNT_AFTER:
            self._new = 0
            self.median = self.values.median()

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
        self._scale: float | None = None

    def add(self, values: Mapping[int, Sequence[float]], cap: float) -> None:
        """More steps: what was above the past (below: negative), by series. Beyond the cap nothing counts in a sum."""
        if not values:
            return
        self.steps += 1
        for series, steps in values.items():
            self._values.extend(steps)
            for blocks in self._blocks.values():
                blocks.add(series, steps, cap)
        if self.steps % (_LOOK_EVERY if self.steps < 64 else 4 * _LOOK_EVERY) == 0:
            self._scale = None

    @property
    def known(self) -> bool:
        """Whether enough steps were seen to say anything."""
        return self.steps >= _KNOWN_AFTER

    @property
    def scale(self) -> float:
        """Standard deviation of a step; as large as sums of several steps need it, if steps hang together.

        Outliers count as three deviations at most: the cap of a step holds them back already. While few steps are
        known it is taken to be larger than it looks.
        """
        if self._scale is None:
            scales = [_bounded_rms(self._values)]
            scales += [
                _bounded_rms(each.means) * math.sqrt(each.length) for each in self._blocks.values() if each.telling
            ]
            self._scale = max(scales) * (1.0 + _DOUBT / max(self.steps, 1))
        return self._scale


class _Blocks:
    """Means of so many successive steps of one series."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.means: deque[float] = deque(maxlen=max(512 // length, 64))
        self._open: dict[int, list[float]] = {}

    @property
    def telling(self) -> bool:
        """Whether there are so many that the error of a young past is not taken for a wave."""
        return len(self.means) >= _KNOWN_AFTER

    def add(self, series: int, steps: Sequence[float], cap: float) -> None:
        block = self._open.setdefault(series, [])
        for value in steps:
            block.append(max(-cap, min(value, cap)))
            if len(block) == self.length:
                self.means.append(sum(block) / self.length)
                block.clear()


def _bounded_rms(values: Collection[float]) -> float:
    if not values:
        return 0.0
    limit = 3.0 * 1.4826 * statistics.median(abs(value) for value in values)
    return _rms([min(abs(value), limit) for value in values])


def _rms(values: Collection[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


class Held(Generic[T]):
    """Steps that are not yet taken for undisturbed: they would hide the change that they may be the beginning of."""

    def __init__(self) -> None:
        self._steps: deque[T] = deque()

    def push(self, step: T, suspected: bool) -> list[T]:
        """Hold a step back; returns those that are taken for undisturbed now. suspected: something may have changed."""
        self._steps.append(step)
        keep = 3 * _HELD_STEPS if suspected else _HELD_STEPS
        # Not all at once: the past must not leap where a suspicion ends.
        return [self._steps.popleft() for _ in range(min(2, max(0, len(self._steps) - keep)))]

    def clear(self) -> None:
        """They were not undisturbed."""
        self._steps.clear()


Agrees = Callable[[int, float], bool]


def always(since: int, change: float) -> bool:
    """Nothing else is asked."""
    return True


class _Sum:
    """The sum for one size of change, and the step that it grew from."""

    def __init__(self) -> None:
        self.value = 0.0
        self.since = -1

    def add(self, step: int, above: float, bounds: Bounds) -> bool:
        """Take in a step; returns whether the bound is broken."""
        if self.value <= 0.0:
            self.since = step
        self.value += max(-bounds.cap, min(above, bounds.cap)) - bounds.drift
        self.value = max(0.0, min(self.value, 2 * bounds.bound))
        return self.value > bounds.bound


class Alarm:
    """One series' sums: rings when it changed, and is quiet again when the series came back.

    since: the step from which on it is seen to have changed; rang_at: the one that showed it. -1 before.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.since, self.rang_at = -1, -1
        self._sums = [_Sum() for _ in _LADDER]
        self._back = 0.0

    @property
    def ringing(self) -> bool:
        """Whether the change is there."""
        return self.rang_at >= 0

    def suspects(self, ladder: Sequence[Bounds]) -> bool:
        """Whether it rings, or is half-way there."""
        return self.ringing or any(
            each.value > bounds.bound / 2 for each, bounds in zip(self._sums, ladder, strict=True)
        )

    def add(self, step: int, above: float, ladder: Sequence[Bounds], agrees: Agrees = always) -> bool:
        """Take in how far the series is above what it is held against. Returns whether it begins to ring.

        agrees: asked before it rings, with the first of the steps that show the change, and the change.
        """
        if self.ringing:
            self._come_back(above, ladder[0])
            return False
        for each, bounds in zip(self._sums, ladder, strict=True):
            if each.add(step, above, bounds) and agrees(each.since, bounds.change):
                self.since, self.rang_at = each.since, step
                return True
        return False

    def _come_back(self, above: float, bounds: Bounds) -> None:
        self._back = max(0.0, self._back + min(bounds.change - above, bounds.cap) - bounds.drift)
        if self._back > bounds.bound:
            self.reset()
