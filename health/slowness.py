"""What makes all ranks slow at once: the data source, the network, or everything. Pure.

Each is a series of one value a step, so chosen that one slow rank cannot move it:

- data: how long half of the ranks at least wait for their batch;
- network: how long every rank stands still for others. Where one rank is slow, that rank does not stand still;
- everything: how long half of the ranks at least work, reading data left out.

Data and network are weighed by the whole step, which they are a part of.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping

from health.changes import Agrees, Alarm, Bounds, Held, Noise, Past, always, ladder_for, percent
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import StepTimes

_FOLLOWED_AFTER = 64
# Whole machines have slow spells, and no peers show them to be spells: slow work everywhere must last longer.
_PATIENCE = 4
# One series a job, not one a rank: it takes longer until its noise is known.
_NOISE_STEPS = 32
_WINDOW_STEPS = 16


def own_s(times: StepTimes) -> float:
    """What a step takes of a rank's own time, without waiting for others."""
    return times.data_s + times.forward_s + times.backward_s + times.optimizer_s + times.snapshot_s


def _data_s(by_rank: Mapping[int, StepTimes]) -> float:
    return statistics.median_low([times.data_s for times in by_rank.values()])


def _wait_s(by_rank: Mapping[int, StepTimes]) -> float:
    return min(times.wait_s for times in by_rank.values())


def _work_s(by_rank: Mapping[int, StepTimes]) -> float:
    return statistics.median_low([own_s(times) - times.data_s for times in by_rank.values()])


class _Series:
    """One value a step: its past, its noise, and whether it rose. rest_s: what of the step is not in the value."""

    def __init__(self, cause: Cause, value_s: Callable[[Mapping[int, StepTimes]], float], of_step: bool) -> None:
        self.cause = cause
        self.value_s = value_s
        self.alarm = Alarm()
        self._of_step = of_step
        self._begin()

    def _begin(self) -> None:
        self.alarm.reset()
        self._noise = Noise()
        self._held: Held[tuple[float, float, float]] = Held()
        self._seconds = Past()
        self._total = Past()
        self.recent: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def add(
        self, step: int, by_rank: Mapping[int, StepTimes], change: float, steps: int, agrees: Agrees
    ) -> Bounds | None:
        """Take in a step; returns the lowest bounds if it rings. agrees: see `Alarm.add`."""
        value_s = self.value_s(by_rank)
        total_s = statistics.median(times.total_s for times in by_rank.values())
        self.recent.append(value_s)
        if not self._seconds.learnt:
            self._seconds.add(value_s)
            self._total.add(total_s)
            return None
        above = self._above(value_s)
        ladder = ladder_for(change, steps, self._noise.scale)
        rings = False
        if self._noise.steps >= _NOISE_STEPS:
            rings = self.alarm.add(step, above, ladder, agrees)
        if not self.alarm.ringing:
            for undisturbed in self._held.push((value_s, total_s, above), self.alarm.suspects(ladder)):
                self._remember(*undisturbed, cap=ladder[0].cap)
        elif step - self.alarm.rang_at >= _FOLLOWED_AFTER:
            # It was told; what is slower still must be told from this.
            self._begin()
        else:
            self._held.clear()
        return ladder[0] if rings else None

    def _remember(self, value_s: float, total_s: float, above: float, cap: float) -> None:
        self._seconds.add(value_s)
        self._total.add(total_s)
        self._noise.add({0: [above]}, cap)

    def _above(self, value_s: float) -> float:
        rest_s = max(0.0, self._total.median - self._seconds.median) if self._of_step else 0.0
        return math.log(max(rest_s + value_s, 1e-6) / max(rest_s + self._seconds.median, 1e-6))

    def slowdown(self, step: int) -> tuple[float, float, float]:
        """(before, now, and what that adds to a step as a part of it); seconds."""
        count = min(len(self.recent), step - self.alarm.since + 1)
        now_s = statistics.fmean(list(self.recent)[-count:])
        return self._seconds.median, now_s, max(0.0, now_s - self._seconds.median) / max(self._total.median, 1e-9)


_WORDS = {
    Cause.SLOW_DATA: "reading data takes {now:.4g} s a step instead of {before:.4g} s on half of the ranks or more",
    Cause.SLOW_NETWORK: (
        "every rank stands still for others for {now:.4g} s a step or more, instead of {before:.4g} s, "
        "and none of them works longer than it did"
    ),
    Cause.SLOW_JOB: "half of the ranks or more work {now:.4g} s a step instead of {before:.4g} s; none stands out",
}


class Common:
    """The three series of a generation."""

    def __init__(self, change: float, steps: int) -> None:
        """change: the log ratio to be seen, in at least so many steps."""
        self._change = change
        self._steps = steps
        self._data = _Series(Cause.SLOW_DATA, _data_s, of_step=True)
        self._work = _Series(Cause.SLOW_JOB, _work_s, of_step=False)
        self._network = _Series(Cause.SLOW_NETWORK, _wait_s, of_step=True)

    def judge(self, step: int, by_rank: Mapping[int, StepTimes], nobody_stands_out: Agrees) -> list[Verdict]:
        """What became slow for everybody by this step. nobody_stands_out: asked before the network is blamed."""
        verdicts = []
        for series in (self._data, self._work, self._network):
            agrees = self._network_alone(nobody_stands_out) if series is self._network else always
            steps = self._steps * (_PATIENCE if series is self._work else 1)
            bounds = series.add(step, by_rank, self._change, steps, agrees)
            if bounds is not None:
                verdicts.append(_verdict(series, step, bounds))
        return verdicts

    def _network_alone(self, nobody_stands_out: Agrees) -> Agrees:
        ringing = self._work.alarm.ringing or self._data.alarm.ringing
        return lambda since, change: not ringing and nobody_stands_out(since, change)


def _verdict(series: _Series, step: int, bounds: Bounds) -> Verdict:
    before_s, now_s, slowdown = series.slowdown(step)
    line = _WORDS[series.cause].format(now=now_s, before=before_s)
    return Verdict(
        node="",
        rank=-1,
        cause=series.cause,
        severity=Severity.NOTICE,
        step=step,
        fingerprint=series.cause.value,
        evidence=(f"{line}, since step {series.alarm.since}: {percent(slowdown)} of a step", bounds.words()),
        certainty=Certainty.HINT,
        slowdown=slowdown,
    )
