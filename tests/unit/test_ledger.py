"""ETTR: every second of wall time has one cause, and the causes are the right ones."""

from __future__ import annotations

import itertools
import random
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.events import AnyEvent, RunStopped
from cluster.ledger import Goodput, account
from cluster.timeline import TimeCause, cut
from tests.unit import stories
from tests.unit.stories import EPOCH_S, Story
from trainer.events import FactKind

SECONDS = st.floats(0.01, 30.0)
STEP = st.tuples(st.floats(0.05, 5.0), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
STEPS = st.lists(STEP, min_size=1, max_size=6)


def spent(goodput: Goodput) -> dict[TimeCause, float]:
    return {TimeCause.PRODUCTIVE: goodput.productive_s, **goodput.badput_s}


def check_partition(goodput: Goodput, wall_s: float) -> None:
    assert all(seconds >= 0 for seconds in spent(goodput).values())
    assert sum(spent(goodput).values()) == pytest.approx(goodput.wall_s, abs=1e-5)
    assert goodput.wall_s == pytest.approx(wall_s, abs=1e-5)
    assert goodput.ettr is None or 0 <= goodput.ettr <= 1


@st.composite
def runs(draw: st.DrawFn, log_interval: int = 1) -> Story:
    """A run with failures that resume anywhere, and full stops in between."""
    story = Story(log_interval)
    for attempt in range(draw(st.integers(1, 3))):
        if attempt:
            story.spend(TimeCause.STOPPED, draw(SECONDS))
            story.go_back(draw(st.integers(0, story.step)))
        story.start(draw(SECONDS))
        story.train(draw(STEPS))
        for _ in range(draw(st.integers(0, 3))):
            story.fail(
                resume_at=draw(st.integers(max(0, story.step - 5), story.step)),
                in_flight_s=draw(st.floats(0.0, 5.0)),
                notice_s=draw(SECONDS),
                decide_s=draw(SECONDS),
                restart_s=draw(SECONDS),
            )
            story.train(draw(STEPS))
        story.stop(75, draw(SECONDS))
    return story


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_second_gets_its_true_cause(story: Story) -> None:
    """With every step logged, the ledger finds exactly what the run really did with its time."""
    goodput = account(story.events, story.steps, None)
    check_partition(goodput, story.now_s - EPOCH_S)
    truth = story.truth()
    for cause, seconds in spent(goodput).items():
        assert seconds == pytest.approx(truth[cause], abs=1e-3), cause


@settings(max_examples=100, deadline=None)
@given(runs(log_interval=3))
def test_unlogged_steps_are_interpolated_and_the_partition_holds(story: Story) -> None:
    goodput = account(story.events, story.steps, None)
    check_partition(goodput, story.now_s - EPOCH_S)
    truth = story.truth()
    for cause in (TimeCause.NOTICING, TimeCause.DECIDING, TimeCause.STOPPED):
        assert goodput.badput_s[cause] == pytest.approx(truth[cause], abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(runs(), st.floats(-20, 20), st.integers(0, 2**32), st.integers(0, 40), st.booleans())
def test_skewed_clocks_and_cut_journals_never_break_the_partition(
    story: Story, skew_s: float, seed: int, keep: int, has_now: bool
) -> None:
    """Rank 0's clock is off, records are missing, the journal ends anywhere: still a partition, nothing negative."""
    pick = random.Random(seed)
    steps = [
        stories.record(each.step, each.generation, each.t_wall_s + skew_s, each.step_s, each.data_s, each.stall_s)
        for each in story.steps
        if pick.random() < 0.8
    ]
    events = story.events[: max(1, keep)]
    now_s = story.now_s + 5 if has_now else None
    goodput = account(events, steps, now_s)
    intervals = cut(events, steps, now_s).intervals
    assert all(before.end_us == after.start_us for before, after in itertools.pairwise(intervals))
    assert all(each.start_us < each.end_us for each in intervals)
    check_partition(goodput, goodput.wall_s)
    if has_now or isinstance(events[-1], RunStopped):
        latest_s = max(now_s or 0.0, *(event.t_wall_s for event in events), 0.0)
        assert goodput.wall_s <= latest_s - EPOCH_S + 1e-5, "a fast clock must not lengthen the run"


@settings(max_examples=50, deadline=None)
@given(STEPS, SECONDS, SECONDS)
def test_an_undisturbed_run_loses_nothing(lengths: list[tuple[float, float, float]], up_s: float, end_s: float) -> None:
    story = Story()
    story.start(up_s)
    story.train(lengths)
    story.stop(0, end_s)
    goodput = account(story.events, story.steps, None)
    assert goodput.lost_steps == goodput.restarts == 0
    assert goodput.incidents == ()
    for cause in (TimeCause.LOST, TimeCause.NOTICING, TimeCause.DECIDING, TimeCause.RESTARTING, TimeCause.UNKNOWN):
        assert goodput.badput_s[cause] == 0


def test_an_incident_is_charged_with_what_it_cost() -> None:
    story = Story()
    story.start(4.0)
    story.train([(1.0, 0.0, 0.0)] * 10)
    story.fail(resume_at=7, in_flight_s=0.5, notice_s=2.0, decide_s=0.25, restart_s=3.0)
    story.train([(1.0, 0.0, 0.0)] * 5)
    story.stop(0, 1.0)
    goodput = account(story.events, story.steps, None)
    (cost,) = goodput.incidents
    assert (cost.incident, cost.lost_steps) == (1, 3)
    assert cost.noticing_s == pytest.approx(2.0, abs=1e-3)
    assert cost.recovery_s == pytest.approx(3.25, abs=1e-3)
    assert cost.lost_s == pytest.approx(3.5, abs=1e-3)
    assert goodput.productive_s == pytest.approx(12.0, abs=1e-3)
    assert goodput.ettr == pytest.approx(12.0 / (4 + 10 + 0.5 + 2 + 3.25 + 5 + 1), abs=1e-3)


def test_a_failure_during_recovery_is_not_productive_and_has_its_own_cost() -> None:
    events: list[AnyEvent] = [
        stories.started(1, EPOCH_S),
        stories.planned(1, EPOCH_S + 1),
        stories.given(stories.verdict(), 1, 1, EPOCH_S + 5, EPOCH_S + 4),
        stories.action("restart", 1, EPOCH_S + 5),
        stories.planned(2, EPOCH_S + 6),
        stories.given(stories.verdict(), 2, 2, EPOCH_S + 10, EPOCH_S + 9),
        stories.action("restart", 2, EPOCH_S + 10),
        stories.planned(3, EPOCH_S + 12),
    ]
    steps = [stories.record(1, 1, EPOCH_S + 3, 1.0, 0, 0), stories.record(1, 3, EPOCH_S + 16, 1.0, 0, 0)]
    goodput = account(events, steps, EPOCH_S + 16)
    first, second = goodput.incidents
    assert (first.noticing_s, first.deciding_s, first.restarting_s, first.lost_steps) == (1.0, 1.0, 3.0, 1)
    assert (second.noticing_s, second.deciding_s, second.restarting_s, second.lost_steps) == (1.0, 2.0, 3.0, 0)
    assert goodput.productive_s == 1.0
    assert goodput.badput_s[TimeCause.LOST] == 2.0


def test_a_lost_spare_costs_nothing() -> None:
    story = Story()
    story.start(2.0)
    story.train([(1.0, 0.0, 0.0)] * 3)
    story.events.append(stories.given(stories.verdict(node="node2"), 1, 1, story.now_s))
    story.events.append(stories.action("nothing", 1, story.now_s))
    story.train([(1.0, 0.0, 0.0)] * 3)
    story.stop(0, 1.0)
    goodput = account(story.events, story.steps, None)
    assert goodput.productive_s == pytest.approx(6.0, abs=1e-3)
    assert goodput.badput_s[TimeCause.NOTICING] == 0


def test_steps_that_go_on_while_the_supervisor_is_dead_stay_productive() -> None:
    """A new supervisor begins (RunStarted again) while the same generation keeps training: nothing was stopped."""
    story = Story()
    story.start(2.0)
    story.train([(1.0, 0.0, 0.0)] * 3)
    story.events.append(stories.started(2, story.now_s + 0.5))
    story.train([(1.0, 0.0, 0.0)] * 3)
    story.stop(0, 1.0)
    goodput = account(story.events, story.steps, None)
    assert goodput.productive_s == pytest.approx(6.0, abs=1e-3)
    assert goodput.badput_s[TimeCause.STOPPED] == 0
    assert goodput.badput_s[TimeCause.STARTUP] == pytest.approx(2.0, abs=1e-3)
    assert goodput.badput_s[TimeCause.FINISHING] == pytest.approx(1.0, abs=1e-3)


def test_time_after_everything_was_killed_is_stopped_and_not_in_ettr() -> None:
    events: list[AnyEvent] = [
        stories.started(1, EPOCH_S),
        stories.planned(1, EPOCH_S + 1),
        stories.started(2, EPOCH_S + 1000),
        stories.planned(2, EPOCH_S + 1001),
        stories.stopped(0, EPOCH_S + 1004),
    ]
    steps = [stories.record(step, 1, EPOCH_S + 1 + step, 1.0, 0, 0) for step in (1, 2)]
    steps.append(stories.record(3, 2, EPOCH_S + 1003, 1.0, 0, 0))
    goodput = account(events, steps, None)
    assert goodput.badput_s[TimeCause.STOPPED] == 997.0
    assert goodput.productive_s == 3.0
    assert goodput.ettr == pytest.approx(3 / 7)


def test_a_silent_run_is_not_taken_for_productive() -> None:
    """While a run goes on, the step in flight counts only as long as it may well be one."""
    events: list[AnyEvent] = [stories.started(1, EPOCH_S), stories.planned(1, EPOCH_S + 1)]
    steps = [stories.record(step, 1, EPOCH_S + 1 + step, 1.0, 0, 0) for step in range(1, 6)]
    goodput = account(events, steps, EPOCH_S + 106)
    assert goodput.productive_s == pytest.approx(6.5)
    assert goodput.badput_s[TimeCause.UNKNOWN] == pytest.approx(98.5)


def test_time_between_steps_is_not_productive() -> None:
    events: list[AnyEvent] = [stories.started(1, EPOCH_S), stories.planned(1, EPOCH_S)]
    steps = [stories.record(step, 1, EPOCH_S + 3 * step, 1.0, 0, 0) for step in (1, 2, 3)]
    goodput = account(events, steps, None)
    assert goodput.productive_s == 3.0
    assert goodput.badput_s[TimeCause.BETWEEN_STEPS] == 4.0


@pytest.mark.parametrize("log_interval", [1, 2])
def test_validation_is_its_own_cause(log_interval: int) -> None:
    """Two seconds after each second step go to `validation`, those of steps that are computed again to `lost`."""
    events: list[AnyEvent] = [stories.started(1, EPOCH_S), stories.planned(1, EPOCH_S)]
    events.append(stories.fact(FactKind.FIRST_STEP, 1, 1, EPOCH_S + 1.0))
    end_s, steps = EPOCH_S, []
    for step in range(1, 7):
        measured_s = 0.0 if step % 2 else 2.0
        end_s += 1.0 + measured_s
        if step % log_interval == 0:
            row = stories.record(step, 1, end_s, 1.0, 0, 0)
            steps.append(msgspec.structs.replace(row, validation_loss=3.0, validation_s=measured_s))
    goodput = account(events, steps, None)
    assert goodput.productive_s == 6.0
    assert goodput.badput_s[TimeCause.VALIDATION] == 6.0
    events.append(stories.planned(2, end_s))
    again = stories.record(5, 2, end_s + 1.0, 1.0, 0, 0)
    goodput = account(events, [*steps, again], None)
    assert goodput.productive_s == 5.0
    assert goodput.badput_s[TimeCause.VALIDATION] == 4.0
    assert goodput.badput_s[TimeCause.LOST] == 4.0


def test_no_run_is_no_time() -> None:
    assert account([], [], 5.0).ettr is None


def test_a_hundred_thousand_steps_are_accounted_for_in_seconds() -> None:
    story = Story()
    story.start(1.0)
    story.train([(0.9, 0.05, 0.05)] * 100_000)
    story.stop(0, 1.0)
    began_s = time.monotonic()
    account(story.events, story.steps, None)
    assert time.monotonic() - began_s < 20
