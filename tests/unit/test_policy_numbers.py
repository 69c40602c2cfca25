"""Promise: bad numbers are answered by the next rung each time, the journal remembers what is left out, and it ends."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import suspicions
from cluster.actions import Stop, action_event
from cluster.events import ActionTaken, Back, WorkersReported
from cluster.fleet import common_snapshot
from cluster.jobstate import JobState
from cluster.policy import decide
from cluster.policy_numbers import Rollback
from cluster.state import apply, replay
from configs.schema import DataConfig, JobConfig, LeaveOut, NumbersConfig, PrecisionConfig
from health.verdict import Cause, Severity, Verdict
from tests.unit import stories
from tests.unit.test_fleet import view
from trainer.events import Fact, FactKind, Oddity
from trainer.history import batch_of, union


def job(**numbers: int) -> JobConfig:
    base = msgspec.structs.replace(stories.job(), numbers=NumbersConfig(**numbers))
    checkpoint = msgspec.structs.replace(base.checkpoint, keep_last=3)
    return msgspec.structs.replace(base, checkpoint=checkpoint)


def running(*snapshots: int) -> JobState:
    nodes = [stories.ready(node, 1.0) for node in ("node0", "node1")]
    state = replay([stories.started(1, 0.0), *nodes, stories.planned(1, 2.0)])
    for step in snapshots:
        state = apply(state, stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, step, 3.0))
    return state


def wants(state: JobState, step: int, batches: int) -> WorkersReported:
    fact = Fact(
        kind=FactKind.ROLLBACK_WANTED, node="node0", rank=0, generation=state.generation, step=step, t_wall_s=9.0,
        oddity=Oddity.SPIKE, batches=batches,
    )  # fmt: skip
    return WorkersReported(t_wall_s=9.0, t_mono_s=9.0, fact=fact)


def spike(step: int) -> Verdict:
    return Verdict(
        node="", rank=-1, cause=Cause.SPIKE, severity=Severity.WORKERS, step=step, fingerprint="spike", evidence=("x",)
    )


def trouble(state: JobState, step: int, batches: int, config: JobConfig) -> tuple[JobState, Rollback | Stop]:
    """One trouble as the supervisor handles it, up to the next generation's plan."""
    state = apply(state, wants(state, step, batches))
    given = stories.given(spike(step), state.generation, state.next_incident, 10.0)
    state = apply(state, given)
    decision = decide(given, state, config)
    assert isinstance(decision.action, Rollback | Stop)
    event = action_event(decision, given.incident, 11.0, 11.0)
    state = apply(state, msgspec.json.decode(msgspec.json.encode(event), type=ActionTaken))
    if isinstance(decision.action, Rollback):
        state = apply(state, stories.planned(state.generation + 1, 12.0, state.order))
    return state, decision.action


@pytest.mark.parametrize("oddity", list(Oddity))
def test_every_oddity_has_a_cause_and_only_workers_that_wait_stop_the_job(oddity: Oddity) -> None:
    """What is odd is noted under its own cause; only the wish to go back reaches the workers, and no node is blamed."""
    fact = Fact(
        kind=FactKind.NUMBERS_ODD,
        node="node0",
        rank=0,
        generation=1,
        step=7,
        t_wall_s=1.0,
        detail="words",
        oddity=oddity,
    )
    noted = suspicions.odd_numbers(fact)
    assert (noted.cause.value, noted.severity, noted.node) == (oddity.value, Severity.NOTICE, "")
    assert noted.evidence == ("words",)
    wish = suspicions.odd_numbers(msgspec.structs.replace(fact, kind=FactKind.ROLLBACK_WANTED))
    assert (wish.cause, wish.severity, wish.node) == (noted.cause, Severity.WORKERS, "")


def test_the_first_time_just_the_stretch_is_left_out() -> None:
    """The run goes back to before the first bad step, its snapshots after that are refused, the batches gone."""
    state, action = trouble(running(10, 20), 25, 3, job())
    assert isinstance(action, Rollback)
    assert (action.to_step, action.left_out) == (24, ((25, 3),))
    assert "batches 25 to 27" in action.reason
    assert state.left_out == ((25, 3),)
    assert (1, 25) in state.refused
    assert (1, 24) not in state.refused
    assert (2, 25) not in state.refused
    assert state.snapshots == (10, 20)
    assert state.restarts_used == 1


def test_at_the_same_place_it_goes_further_back_and_then_stops() -> None:
    """Other data, the same trouble: the harm was done earlier. At last the run stops and blames no data."""
    config = job(back_steps=4, max_rollbacks=2)
    state, _ = trouble(running(10, 20), 25, 3, config)
    state, second = trouble(state, 26, 2, config)
    state, third = trouble(state, 25, 1, config)
    assert isinstance(second, Rollback)
    assert second.to_step == 21
    # Steps 22 .. 27 read batches 22, 23, 24, 28, 29, 30 by then.
    assert second.left_out == ((22, 3), (28, 3))
    assert state.left_out == ((22, 9),)
    assert isinstance(third, Stop)
    assert third.exit_code == 93
    assert "the data is not to blame" in third.reason


def in_fp8(config: JobConfig, **numbers: object) -> JobConfig:
    precision = PrecisionConfig(recipe="fp8_current")
    changed = msgspec.structs.replace(config.numbers, **numbers)
    return msgspec.structs.replace(config, precision=precision, numbers=changed)


def test_a_run_in_fp8_leaves_it_before_it_stops() -> None:
    """Going back and leaving data out did not help: the same steps again, in the precision of the rest; then stop."""
    config = in_fp8(job(back_steps=4, max_rollbacks=2))
    state, _ = trouble(running(10, 20), 25, 3, config)
    state, second = trouble(state, 26, 2, config)
    assert isinstance(second, Rollback)
    assert (second.recipe, state.recipe) == ("", "")
    left_out = state.left_out
    state, third = trouble(state, 25, 1, config)
    assert isinstance(third, Rollback)
    assert third.recipe == "auto"
    assert third.left_out == ()
    assert third.to_step == 16
    assert "without fp8_current" in third.reason
    assert (state.recipe, state.left_out) == ("auto", left_out)
    state, fourth = trouble(state, 25, 1, config)
    assert isinstance(fourth, Stop)
    assert fourth.exit_code == 93
    assert "nor is fp8_current, which it has left" in fourth.reason


def test_what_a_run_went_over_to_is_for_ever() -> None:
    """Also after another supervisor, and for every later generation; old journals know of none."""
    config = in_fp8(job(max_rollbacks=1))
    state, _ = trouble(running(10, 20), 25, 3, config)
    state, _ = trouble(state, 25, 3, config)
    assert state.recipe == "auto"
    state = apply(apply(state, stories.stopped(75, 20.0)), stories.started(2, 21.0))
    assert state.recipe == "auto"
    _, elsewhere = trouble(state, 225, 1, config)
    assert isinstance(elsewhere, Rollback)
    assert elsewhere.recipe == ""
    old = b'{"generation":1,"step":5,"to_step":4,"left_out":[]}'
    assert msgspec.json.decode(old, type=Back).recipe == ""


@pytest.mark.parametrize("change", [{"leave_low_precision": False}, {"max_rollbacks": 0}])
def test_it_stays_in_fp8_where_it_shall_not_leave_it(change: dict[str, object]) -> None:
    """As if there were no such rung; nor is anything gone over to by a run that may not go back at all."""
    config = in_fp8(job(max_rollbacks=1), **change)
    state, action = trouble(running(10, 20), 25, 3, config)
    if isinstance(action, Rollback):
        state, action = trouble(state, 25, 3, config)
    assert isinstance(action, Stop)
    assert state.recipe == ""


def test_at_another_place_it_begins_anew() -> None:
    """Bad data far away has nothing to do with it."""
    state, _ = trouble(running(10, 20), 25, 3, job(max_rollbacks=1))
    _, action = trouble(state, 225, 1, job(max_rollbacks=1))
    assert isinstance(action, Rollback)
    assert (action.to_step, action.left_out) == (224, ((228, 1),))


def test_it_goes_no_further_back_than_there_are_snapshots() -> None:
    """What retention has removed cannot be had again."""
    config = job(back_steps=30)
    state, _ = trouble(running(10, 20, 30, 40), 45, 1, config)
    _, second = trouble(state, 45, 1, config)
    assert isinstance(second, Rollback)
    assert second.to_step == 20


def test_a_person_who_had_a_turn_is_given_all_rollbacks_again() -> None:
    """After a stop with 93 the count begins anew; what is left out stays so."""
    config = job(max_rollbacks=1)
    state, _ = trouble(running(10, 20), 25, 3, config)
    state, action = trouble(state, 25, 3, config)
    assert isinstance(action, Stop)
    state = apply(apply(state, stories.stopped(93, 20.0)), stories.started(2, 21.0))
    assert state.rollbacks == ()
    assert state.left_out == ((25, 3),)
    assert (1, 25) in state.refused


def test_what_was_configured_counts_as_left_out_already() -> None:
    """The batches of steps are those that the workers really read."""
    config = job()
    data = msgspec.structs.replace(config.data, leave_out=(LeaveOut(first=5, count=10),))
    assert isinstance(data, DataConfig)
    _, action = trouble(running(10, 20), 25, 2, msgspec.structs.replace(config, data=data))
    assert isinstance(action, Rollback)
    assert action.left_out == ((35, 2),)


def test_a_budget_of_restarts_is_one_budget() -> None:
    """Going back is a restart too."""
    config = job()
    spent = msgspec.structs.replace(running(10, 20), restarts_used=config.health.max_restarts)
    _, action = trouble(spent, 25, 3, config)
    assert isinstance(action, Stop)
    assert action.exit_code == 1


def test_a_plan_takes_no_snapshot_of_what_was_given_up() -> None:
    """Memory holds newer snapshots of the old history: none of them is gone on from."""
    state, _ = trouble(running(10, 20), 25, 3, job())
    views = {"node0": view("node0", [(0, 1, 24), (0, 1, 27)], world_size=1)}
    assert common_snapshot(1, views) == (1, 27)
    assert common_snapshot(1, views, state.refused) == (1, 24)
    late = stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, 27, 13.0)
    assert apply(state, late).snapshots == state.snapshots


@given(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 8)), max_size=40), st.integers(0, 3), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_it_always_ends(troubles: list[tuple[int, int]], max_rollbacks: int, back_steps: int) -> None:
    """Whatever the workers ask for: never more than max_rollbacks at a place; each rollback leaves more out, and never
    moves a step before it."""
    config, state = job(max_rollbacks=max_rollbacks, back_steps=back_steps), running(10, 20)
    for step, batches in troubles:
        before = state
        state, action = trouble(state, step, batches, config)
        if isinstance(action, Stop):
            break
        first = action.to_step + 1
        assert first <= step
        assert [batch_of(s, state.left_out) for s in range(1, first)] == [
            batch_of(s, before.left_out) for s in range(1, first)
        ]
        assert batch_of(first, state.left_out) == batch_of(step + batches, before.left_out)
        assert union(state.left_out, before.left_out) == state.left_out
        assert len([each for each in before.rollbacks if abs(each - step) <= 64]) < max_rollbacks
