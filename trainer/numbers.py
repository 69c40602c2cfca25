"""Whether a step's numbers are sane: finite, and in line with those of the steps before. Pure arithmetic.

Every rank feeds the same global numbers, and so every rank decides alike. What is known travels in the scalars of a
snapshot: a run that was restarted decides as it would have without.
"""

from __future__ import annotations

import math
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


class WatchState(msgspec.Struct, frozen=True):
    """All that the watch knows, as plain values.

    losses, grad_norms: of the newest applied steps, oldest first. bad: newest bad steps, oldest first. oddity: what
    the last of them was.
    """

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    bad: tuple[int, ...] = ()
    oddity: Oddity = Oddity.SPIKE


class NumbersWatch:
    """Judges steps in order. Call `judge` before each update, then either `applied` or `skipped`, each step once."""

    def __init__(self, config: NumbersConfig, last_step: int, state: WatchState | None = None) -> None:
        """last_step: where training ends. state: what `state` said when the snapshot was made that is gone on from."""
        self._config = config
        self._last_step = last_step
        self.state = state or WatchState()

    @property
    def unsettled(self) -> bool:
        """Whether steps were bad so lately that the run may have to go back to before them."""
        return self._config.max_skips > 0 and bool(self.state.bad)

    def judge(self, step: int, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step's global loss and gradient norm (before clipping); None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Finding(Oddity.NONFINITE, step, f"not finite: loss {loss:g}, gradient norm {grad_norm:g}")
        known = len(self.state.losses)
        if not self._config.spike_z or step <= self._config.warmup_steps or 2 * known < self._config.window_steps:
            return None
        words = []
        for name, value, window, floor in (
            ("loss", loss, self.state.losses, _LOSS_FLOOR),
            ("gradient norm", grad_norm, self.state.grad_norms, _GRAD_NORM_FLOOR),
        ):
            z = robust_z(value, window, floor)
            if z > self._config.spike_z:
                words.append(f"{name} {value:.4g} is {z:.0f} deviations above {median(window):.4g}")
        if not words:
            return None
        return Finding(Oddity.SPIKE, step, f"{', '.join(words)}, the median of the last {known} applied steps")

    def applied(self, step: int, loss: float, grad_norm: float) -> Stretch | None:
        """The step's update was applied. Returns what shall be left out, if a bad stretch has just ended."""
        size = self._config.window_steps
        self.state = msgspec.structs.replace(
            self.state,
            losses=(*self.state.losses, loss)[-size:],
            grad_norms=(*self.state.grad_norms, grad_norm)[-size:],
        )
        return self._look_back(step, ended=True)

    def skipped(self, finding: Finding) -> Stretch | None:
        """The step's update was left out. Returns what shall be left out, if the bad stretch may not grow further."""
        self.state = msgspec.structs.replace(self.state, bad=(*self.state.bad, finding.step), oddity=finding.oddity)
        return self._look_back(finding.step, ended=finding.step >= self._last_step)

    def _look_back(self, step: int, ended: bool) -> Stretch | None:
        """A stretch is bad with max_skips bad steps among skip_window_steps; it ends with the first good step."""
        bad, config = self.state.bad, self._config
        in_trouble = 0 < config.max_skips <= len(bad)
        if in_trouble and (ended or step - bad[0] + 1 >= config.max_stretch_steps):
            return Stretch(self.state.oddity, bad[0], bad[-1])
        if not in_trouble:
            recent = tuple(each for each in bad if each > step - config.skip_window_steps)
            self.state = msgspec.structs.replace(self.state, bad=recent)
        return None


def robust_z(value: float, window: tuple[float, ...], floor: float) -> float:
    """How many deviations a value lies above the median of the window, on a logarithmic scale.

    Deviations are taken from the median absolute one, which a few outliers do not move, and are at least `floor`. On a
    logarithmic scale the noise of a loss or a norm is about as wide above its median as below, however large it is.
    """
    logs = [math.log(max(each, _TINY)) for each in window]
    middle = median(logs)
    spread = _NORMAL * median([abs(each - middle) for each in logs])
    return (math.log(max(value, _TINY)) - middle) / max(spread, floor)
