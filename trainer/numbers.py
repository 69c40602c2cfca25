"""Whether a step's numbers are sane: finite, and in line with those of the steps before. Pure arithmetic.

Every rank feeds the same global numbers, and so every rank decides alike. What is known travels in the scalars of a
snapshot: a run that was restarted decides as it would have without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from configs.schema import NumbersConfig
from trainer.events import Oddity

NUMBERS = "numbers"  # the scalar of a snapshot that holds a WatchState

# The deviation of a normal distribution is so many median absolute deviations.
_NORMAL = 1.4826
# Least deviation, in parts of the value: what is steadier than this still moves so much when nothing is wrong.
_LOSS_FLOOR = 0.02
_GRAD_NORM_FLOOR = 0.2
# A loss that is so many times its lowest median is out of line, however slowly it got there.
_LOST = 1.5
_TINY = 1e-30


class Finding(msgspec.Struct, frozen=True):
    """What is wrong with a step's numbers, before its update; detail: in words, for a person."""

    oddity: Oddity
    step: int
    detail: str


class Stretch(msgspec.Struct, frozen=True):
    """Steps first .. last, whose batches shall be left out: the run has to go back to before `first`."""

    oddity: Oddity
    first: int
    last: int

    @property
    def batches(self) -> int:
        """How many batches these are."""
        return self.last - self.first + 1


class Level(msgspec.Struct, frozen=True):
    """Where a window of values lies, on a logarithmic scale: its median, and the deviation around that."""

    middle: float
    spread: float

    def z(self, value: float) -> float:
        """How many deviations a value lies above the median."""
        return (_log(value) - self.middle) / self.spread


class WatchState(msgspec.Struct, frozen=True):
    """All that the watch knows, as plain values.

    losses, grad_norms: of the newest applied steps, oldest first. bad: newest bad steps, oldest first. oddity: what
    the last of them was. lowest: the level of the window with the lowest median loss so far. unsettled_since: the first
    bad step since there was none lately; 0 if there is none.
    """

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    bad: tuple[int, ...] = ()
    oddity: Oddity = Oddity.SPIKE
    lowest: Level | None = None
    unsettled_since: int = 0


class NumbersWatch:
    """Judges steps in order. Call `judge` before each update, then either `applied` or `skipped`, each step once."""

    def __init__(self, config: NumbersConfig, last_step: int, state: WatchState | None = None) -> None:
        """last_step: where training ends. state: what `state` said when the snapshot was made that is gone on from."""
        self._config = config
        self._last_step = last_step
        self.state = state or WatchState()

    def unsettled(self, step: int) -> bool:
        """Whether steps were bad so lately that the run may have to go back to before them.

        Numbers that stay half bad do not keep a run without snapshots for ever: none is longer in doubt than a stretch
        may be, and one that is gone back from later is distrusted then.
        """
        since = self.state.unsettled_since
        return self._config.max_skips > 0 and since > 0 and step - since < self._config.max_stretch_steps

    def judge(self, step: int, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step's global loss and gradient norm (before clipping); None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Finding(Oddity.NONFINITE, step, f"not finite: loss {loss:g}, gradient norm {grad_norm:g}")
        if not self._config.spike_z or step <= self._config.warmup_steps or not self._knows_enough():
            return None
        state, known = self.state, f"the median of the last {len(self.state.losses)} applied steps"
        words = [
            f"{name} {value:.4g} is {level.z(value):.0f} deviations above {math.exp(level.middle):.4g}, {known}"
            for name, value, level in (
                ("loss", loss, level_of(state.losses, _LOSS_FLOOR)),
                ("gradient norm", grad_norm, level_of(state.grad_norms, _GRAD_NORM_FLOOR)),
            )
            if level.z(value) > self._config.spike_z
        ]
        lowest = state.lowest
        if not words and lowest is not None and lowest.z(loss) > self._config.spike_z:
            times = math.exp(_log(loss) - lowest.middle)
            words += [f"loss {loss:.4g} is {times:.1f} times its lowest median so far"] if times > _LOST else []
        return Finding(Oddity.SPIKE, step, "; ".join(words)) if words else None

    def applied(self, step: int, loss: float, grad_norm: float) -> Stretch | None:
        """The step's update was applied. Returns what shall be left out, if a bad stretch has just ended."""
        size = self._config.window_steps
        self.state = msgspec.structs.replace(
            self.state,
            losses=(*self.state.losses, loss)[-size:],
            grad_norms=(*self.state.grad_norms, grad_norm)[-size:],
        )
        if self._knows_enough():
            level, lowest = level_of(self.state.losses, _LOSS_FLOOR), self.state.lowest
            if lowest is None or level.middle < lowest.middle:
                self.state = msgspec.structs.replace(self.state, lowest=level)
        return self._look_back(step, ended=True)

    def skipped(self, finding: Finding) -> Stretch | None:
        """The step's update was left out. Returns what shall be left out, if the bad stretch may not grow further."""
        bad = (*(self.state.bad if self._in_trouble else self._recent(finding.step)), finding.step)
        since = self.state.unsettled_since or finding.step
        self.state = msgspec.structs.replace(self.state, bad=bad, oddity=finding.oddity, unsettled_since=since)
        return self._look_back(finding.step, ended=finding.step >= self._last_step)

    def _knows_enough(self) -> bool:
        return 2 * len(self.state.losses) >= self._config.window_steps

    def _look_back(self, step: int, ended: bool) -> Stretch | None:
        """A stretch is bad with max_skips bad steps among skip_window_steps; it ends with the first good step."""
        bad = self.state.bad
        if not self._in_trouble:
            recent = self._recent(step)
            since = self.state.unsettled_since if recent else 0
            self.state = msgspec.structs.replace(self.state, bad=recent, unsettled_since=since)
        elif ended or step - bad[0] + 1 >= self._config.max_stretch_steps:
            return Stretch(self.state.oddity, bad[0], bad[-1])
        return None

    @property
    def _in_trouble(self) -> bool:
        return 0 < self._config.max_skips <= len(self.state.bad)

    def _recent(self, step: int) -> tuple[int, ...]:
        """The bad steps of the window that ends with this one."""
        return tuple(each for each in self.state.bad if each > step - self._config.skip_window_steps)


def level_of(window: Sequence[float], floor: float) -> Level:
    """Median and deviation of the window's logarithms; floor: the least deviation.

    The deviation is taken from the median absolute one, which a few outliers do not move. On a logarithmic scale the
    noise of a loss or a norm is about as wide above its median as below, however large it is.
    """
    logs = [_log(each) for each in window]
    middle = median(logs)
    return Level(middle, max(_NORMAL * median([abs(each - middle) for each in logs]), floor))


def _log(value: float) -> float:
    return math.log(max(value, _TINY))
