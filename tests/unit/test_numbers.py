"""Promise: sane numbers pass, leaps and what is not finite do not, and a restart changes no decision."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import NumbersConfig
from trainer.events import Oddity
from trainer.numbers import NumbersWatch, Stretch, WatchState, level_of

CONFIG = NumbersConfig(window_steps=16, warmup_steps=8)
LAST = 10_000


class Run:
    """Feeds a watch as the step loop does, and writes down what was decided."""

    def __init__(self, config: NumbersConfig = CONFIG, last_step: int = LAST) -> None:
        self.watch = NumbersWatch(config, last_step)
        self.config = config
        self.last_step = last_step
        self.step = 0
        self.skipped: list[int] = []
        self.stretch: Stretch | None = None

    def restart(self) -> None:
        """The state goes through a snapshot's JSON into a new process."""
        text = msgspec.json.encode(msgspec.to_builtins(self.watch.state))
        state = msgspec.convert(msgspec.json.decode(text), WatchState)
        self.watch = NumbersWatch(self.config, self.last_step, state)

    def feed(self, loss: float, grad_norm: float = 1.0) -> None:
        self.step += 1
        finding = self.watch.judge(self.step, loss, grad_norm)
        if finding is None:
            self.stretch = self.watch.applied(self.step, loss, grad_norm)
        else:
            self.skipped.append(self.step)
            self.stretch = self.watch.skipped(finding)

    def feed_all(self, losses: Sequence[float]) -> None:
        for loss in losses:
            self.feed(loss)


def noisy_run(dice: random.Random, steps: int) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of a run like those that were recorded: a loss that falls with 1.5 % of noise and drifts,
    a norm with log-normal noise of a quarter and a heavy tail (one step in a hundred up to three times the median)."""
    drift = 0.0
    for step in range(steps):
        drift = 0.995 * drift + dice.gauss(0, 0.002)
        loss = (2.0 + 4.0 * math.exp(-step / 400)) * math.exp(drift + dice.gauss(0, 0.015))
        tail = dice.uniform(1, 3) if dice.random() < 0.01 else 1.0
        yield loss, (0.4 + math.exp(-step / 200)) * tail * math.exp(dice.gauss(0, 0.25))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike(seed: int) -> None:
    """No false alarm in 10,000 noisy steps, with the bounds that a job has if nobody sets any."""
    run = Run(NumbersConfig())
    for loss, grad_norm in noisy_run(random.Random(seed), 10_000):
        run.feed(loss, grad_norm)
    assert run.skipped == []


@pytest.mark.parametrize("seed", range(5))
def test_leaps_are_found_in_their_own_step(seed: int) -> None:
    """A loss half as large again, or a norm fifty times as large, is found at once amid the same noise."""
    dice = random.Random(seed)
    run = Run(NumbersConfig(max_skips=0))
    leaps = set(dice.sample(range(1200, 3000), 20))
    for step, (loss, grad_norm) in enumerate(noisy_run(dice, 3000), 1):
        if step in leaps and dice.random() < 0.5:
            loss *= 1.5
        elif step in leaps:
            grad_norm *= 50
        run.feed(loss, grad_norm)
    assert set(run.skipped) == leaps


@given(st.lists(st.sampled_from([3.0, 3.1, 2.9, 9.0, math.nan, math.inf]), max_size=60), st.data())
@settings(max_examples=200, deadline=None)
def test_a_restart_changes_no_decision(tail: list[float], data: st.DataObject) -> None:
    """Whatever the numbers are, and wherever the process was restarted, the same steps are left out."""
    losses = [3.0, 3.02, 2.98, 3.01] * 4 + tail
    whole, broken = Run(), Run()
    cuts = data.draw(st.sets(st.integers(0, len(losses))))
    for index, loss in enumerate(losses):
        if index in cuts:
            broken.restart()
        whole.feed(loss)
        broken.feed(loss)
        assert (broken.skipped, broken.stretch) == (whole.skipped, whole.stretch)
        if whole.stretch is not None:
            return


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_found_from_the_first_step_on(bad: tuple[float, float]) -> None:
    """Non-finite numbers need no window; they are told apart from spikes."""
    finding = NumbersWatch(CONFIG, LAST).judge(1, *bad)
    assert finding is not None
    assert finding.oddity is Oddity.NONFINITE
    assert "not finite" in finding.detail


def test_spikes_are_not_judged_in_the_warm_up_or_by_too_few_steps() -> None:
    """Before warmup_steps, or with fewer than half of the window, nothing finite is a spike."""
    run = Run()
    run.feed_all([3.0] * 7 + [30.0])
    assert run.skipped == []
    fresh = NumbersWatch(CONFIG, LAST)
    assert fresh.judge(500, 1e9, 1e9) is None


def test_a_loss_that_climbs_slowly_is_found_too() -> None:
    """The window follows a loss that rises by 2 % a step; its lowest median does not."""
    run = Run()
    run.feed_all([3.0 * dice.uniform(0.98, 1.02) for dice in [random.Random(1)] for _ in range(40)])
    run.feed_all([3.0 * 1.02**step for step in range(30)])
    assert run.skipped
    assert 60 <= run.skipped[0] <= 64
    assert run.skipped == list(range(run.skipped[0], 71))


def test_no_bound_no_spikes() -> None:
    """spike_z = 0 switches the bound off, and only that."""
    run = Run(NumbersConfig(window_steps=16, warmup_steps=8, spike_z=0))
    run.feed_all([3.0] * 20 + [30.0, math.nan])
    assert run.skipped == [22]


def test_a_stretch_is_as_long_as_the_bad_steps_are() -> None:
    """The third bad step of eight makes it a stretch, the next good one ends it; good ones in between belong to it."""
    run = Run()
    run.feed_all([3.0] * 20 + [9.0, 3.0, 9.0, 9.0, 9.0])
    assert run.skipped == [21, 23, 24, 25]
    assert run.stretch is None
    assert run.watch.unsettled(run.step)
    run.feed(3.0)
    assert run.stretch == Stretch(Oddity.SPIKE, 21, 25)


def test_bad_steps_far_apart_are_no_stretch() -> None:
    """Single bad steps are left out and forgotten: the weights are those of before."""
    run = Run()
    for _ in range(10):
        run.feed_all([3.0] * 10 + [9.0])
        assert run.stretch is None
    run.feed_all([3.0] * 8)
    assert not run.watch.unsettled(run.step)


def test_the_window_ends_with_the_step_that_is_judged() -> None:
    """Three bad steps in nine are no stretch where eight are looked at; three in eight are."""
    wide, close = Run(), Run()
    wide.feed_all([3.0] * 20 + [9.0, 3.0, 3.0, 3.0, 9.0, 3.0, 3.0, 3.0, 9.0, 3.0])
    assert wide.skipped == [21, 25, 29]
    assert wide.stretch is None
    close.feed_all([3.0] * 20 + [9.0, 3.0, 3.0, 3.0, 9.0, 3.0, 3.0, 9.0, 3.0])
    assert close.stretch == Stretch(Oddity.SPIKE, 21, 28)


@pytest.mark.parametrize("every", [5, 7, 8])
def test_a_run_that_is_always_a_little_bad_gets_its_snapshots(every: int) -> None:
    """Never two bad steps close enough to go back, never none lately: a crash may not cost all of it."""
    run = Run(last_step=1000)
    run.feed_all([3.0] * 20)
    gaps, since = [], 0
    for step in range(400):
        run.feed(9.0 if step % every == 0 else 3.0)
        since = since + 1 if run.watch.unsettled(run.step) else 0
        gaps.append(since)
    assert run.stretch is None
    assert max(gaps) <= CONFIG.max_stretch_steps
    run.restart()
    assert not run.watch.unsettled(run.step)


def test_a_stretch_does_not_grow_without_end() -> None:
    """What never ends, or lasts until training does, is answered too."""
    run = Run()
    run.feed_all([3.0] * 20 + [9.0] * 16)
    assert run.stretch == Stretch(Oddity.SPIKE, 21, 36)
    late = Run(last_step=23)
    late.feed_all([3.0] * 20 + [9.0] * 3)
    assert late.stretch == Stretch(Oddity.SPIKE, 21, 23)


def test_never_going_back_can_be_chosen() -> None:
    """max_skips = 0: updates are left out, for ever if need be."""
    run = Run(NumbersConfig(window_steps=16, warmup_steps=8, max_skips=0))
    run.feed_all([3.0] * 20 + [9.0] * 50)
    assert len(run.skipped) == 50
    assert run.stretch is None
    assert not run.watch.unsettled(run.step)


@given(st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=64), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_units_do_not_matter(window: list[float], value: float, unit: float) -> None:
    """The scale is logarithmic: a loss in other units is judged the same."""
    scaled = level_of([each * unit for each in window], 0.02).z(value * unit)
    assert scaled == pytest.approx(level_of(window, 0.02).z(value), rel=1e-6, abs=1e-6)
