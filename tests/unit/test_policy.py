"""The policy: the cheapest rung that the evidence allows, never past the budget, never the same bug for ever."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.actions import Action, Decision, Evict, Nothing, Replace, Restart, Stop, action_event
from cluster.events import NodeEvicted, VerdictGiven
from cluster.jobstate import JobState, NodeStatus
from cluster.policy import decide
from cluster.state import apply, replay
from health.verdict import Cause, Severity, Verdict
from tests.unit import stories
from tests.unit.stories import job, verdict

ROOTS = [cause for cause in Cause if cause not in (Cause.BAD_INPUT,)]


def running(spares: int = 1) -> JobState:
    nodes = [f"node{i}" for i in range(2 + spares)]
    return replay([stories.started(1, 0.0), *(stories.ready(node, 1.0) for node in nodes), stories.planned(1, 2.0)])


def said(what: Verdict, state: JobState, at_s: float = 10.0, others: tuple[Verdict, ...] = ()) -> VerdictGiven:
    return stories.given(what, state.generation, state.next_incident, at_s, others=others)


def act(what: Verdict, state: JobState, config: stories.JobConfig) -> Action:
    """The policy's action for an incident of one verdict."""
    return decide(said(what, state), state, config).action


def live(state: JobState, event: VerdictGiven, config: stories.JobConfig) -> tuple[JobState, Decision]:
    """One incident as the supervisor handles it: verdict, decision, action, next generation."""
    state = apply(state, event)
    decision = decide(event, state, config)
    at_s, action = event.t_wall_s + 1.0, decision.action
    state = apply(state, action_event(decision, event.incident, at_s, at_s, event.verdict.node))
    if isinstance(action, Replace | Evict):
        state = apply(state, NodeEvicted(t_wall_s=at_s, t_mono_s=at_s, node=action.node, reason=action.reason))
    if isinstance(action, Restart | Replace):
        state = apply(state, stories.planned(state.generation + 1, at_s, state.order))
    return state, decision


def suffer(state: JobState, what: Verdict, config: stories.JobConfig, at_s: float = 10.0) -> tuple[JobState, Action]:
    state, decision = live(state, said(what, state, at_s), config)
    return state, decision.action


def lost(node: str, step: int = 7) -> Verdict:
    return verdict(Cause.NODE_LOST, node, -1, step, Severity.NODE)


@pytest.mark.parametrize(
    "cause",
    [Cause.WORKER_KILLED, Cause.WORKER_CRASH, Cause.OUT_OF_MEMORY, Cause.USER_ERROR, Cause.HANG, Cause.PEER_LOST],
)
def test_the_first_failure_of_workers_is_a_restart_in_place(cause: Cause) -> None:
    assert isinstance(act(verdict(cause), running(), job()), Restart)


def test_a_lost_node_is_replaced_by_a_ready_spare_or_the_job_is_requeued() -> None:
    action = act(lost("node1"), running(), job())
    assert action == Replace("node1", "node2", action.reason)
    action = act(lost("node1"), running(spares=0), job())
    assert isinstance(action, Stop)
    assert action.exit_code == 75
    assert "run the same command again" in action.reason


def test_a_rack_that_is_taken_away_at_one_step_is_no_crash_loop() -> None:
    """Promise: as many nodes may be told to leave, or die, at the same step as there are spares for."""
    for cause in (Cause.PREEMPTED, Cause.NODE_LOST):
        state = running(spares=3)
        for node in ("node0", "node1", "node2"):
            state, action = suffer(state, verdict(cause, node, -1, 7, Severity.NODE), job())
            assert isinstance(action, Replace), action
    action = act(verdict(Cause.NODE_LOST, state.order[0], -1, 7, Severity.NODE), state, job())
    assert isinstance(action, Stop)
    assert action.exit_code == 75
    assert "4 nodes were lost in this step" in action.reason


def test_a_bad_node_by_its_own_word_is_replaced() -> None:
    action = act(verdict(Cause.WORKER_CRASH, "node0", severity=Severity.NODE), running(), job())
    assert isinstance(action, Replace)


def test_two_nodes_lost_at_once_get_two_different_spares() -> None:
    state, config = running(spares=2), job(spares=2)
    state, first = suffer(state, lost("node0"), config)
    state, second = suffer(state, lost("node1"), config)
    assert isinstance(first, Replace)
    assert isinstance(second, Replace)
    assert state.order == ("node2", "node3")


def test_a_lost_spare_does_not_touch_training_and_is_not_used() -> None:
    state, action = suffer(running(), lost("node2"), job())
    assert isinstance(action, Evict)
    assert state.spares == ()
    assert state.restarts_used == 0


def test_a_node_lost_before_training_began_stops_the_job_only_if_too_few_are_left() -> None:
    config = job()
    waiting = replay([stories.started(1, 0.0), *(stories.ready(f"node{i}", 1.0) for i in range(3))])
    assert isinstance(act(lost("node1"), waiting, config), Evict)
    fewer = replay([stories.started(1, 0.0), *(stories.ready(f"node{i}", 1.0) for i in range(2))])
    action = act(lost("node1"), fewer, config)
    assert isinstance(action, Stop)
    assert action.exit_code == 75


@pytest.mark.parametrize("cause", [Cause.HANG, Cause.WORKER_KILLED])
def test_the_second_hang_or_kill_on_a_node_replaces_it(cause: Cause) -> None:
    state, config = running(), job()
    state, first = suffer(state, verdict(cause, "node0", step=5), config)
    state, elsewhere = suffer(state, verdict(cause, "node1", step=6), config)
    assert isinstance(first, Restart)
    assert isinstance(elsewhere, Restart)
    state, second = suffer(state, verdict(cause, "node0", step=9), config)
    assert isinstance(second, Replace)
    assert (second.node, second.spare) == ("node0", "node2")
    state, third = suffer(state, verdict(cause, "node1", step=12), config)
    assert isinstance(third, Restart), "no spare is left: a restart is what remains"


def test_bad_input_stops_with_2_and_do_not_restart_with_93() -> None:
    bad = act(verdict(Cause.BAD_INPUT, severity=Severity.JOB, fingerprint="ValueError: no corpus"), running(), job())
    assert isinstance(bad, Stop)
    assert bad.exit_code == 2
    assert "no corpus" in bad.reason
    never = act(verdict(Cause.USER_ERROR, severity=Severity.JOB), running(), job())
    assert isinstance(never, Stop)
    assert never.exit_code == 93


def test_the_same_error_twice_at_the_same_step_on_two_nodes_stops_with_93_and_quotes_it() -> None:
    state, config = running(), job()
    state, first = suffer(state, verdict(node="node0", step=7, fingerprint="IndexError: index # is out"), config)
    state, second = suffer(state, verdict(node="node1", step=7, fingerprint="IndexError: index # is out"), config)
    assert isinstance(first, Restart)
    assert isinstance(second, Stop)
    assert second.exit_code == 93
    for words in ("IndexError: index # is out", "2 times at step 7", "node0, node1", "correct the code"):
        assert words in second.reason


def test_the_same_error_three_times_at_the_same_step_on_one_node_stops_with_93() -> None:
    state, config = running(), job()
    for _ in range(2):
        state, action = suffer(state, verdict(step=7), config)
        assert isinstance(action, Restart)
    _, action = suffer(state, verdict(step=7), config)
    assert isinstance(action, Stop)
    assert action.exit_code == 93


def test_ranks_that_fail_together_are_one_failure() -> None:
    """All ranks may raise the same error in one generation: that has not happened twice."""
    state = running()
    state = apply(state, stories.given(verdict(node="node1"), 1, 1, 9.0))
    state = apply(state, stories.given(verdict(node="node0"), 1, 1, 9.0))
    assert isinstance(act(verdict(node="node0"), state, job()), Restart)


def test_two_nodes_killed_at_the_same_step_are_not_taken_for_a_bug() -> None:
    state, config = running(), job()
    state, _ = suffer(state, verdict(Cause.WORKER_KILLED, "node0", step=7), config)
    _, action = suffer(state, verdict(Cause.WORKER_KILLED, "node1", step=7), config)
    assert isinstance(action, Restart)


def test_after_a_person_had_a_turn_old_failures_do_not_count_as_repeated() -> None:
    state, config = running(), job()
    for node in ("node0", "node1"):
        state, action = suffer(state, verdict(node=node, step=7), config)
    assert isinstance(action, Stop)
    for event in (stories.stopped(93, 20.0), stories.started(2, 30.0), stories.planned(3, 31.0)):
        state = apply(state, event)
    _, action = suffer(state, verdict(node="node0", step=7), config)
    assert isinstance(action, Restart)


def test_a_requeued_job_remembers_its_failures() -> None:
    state, config = running(), job()
    state, _ = suffer(state, verdict(node="node0", step=7), config)
    for event in (stories.stopped(75, 20.0), stories.started(2, 30.0), stories.planned(3, 31.0)):
        state = apply(state, event)
    _, action = suffer(state, verdict(node="node1", step=7), config)
    assert isinstance(action, Stop)
    assert action.exit_code == 93


def test_a_notice_is_only_noted() -> None:
    assert isinstance(act(verdict(Cause.NONFINITE, severity=Severity.NOTICE), running(), job()), Nothing)


VERDICTS = st.builds(
    verdict,
    cause=st.sampled_from(ROOTS),
    node=st.sampled_from(["", "node0", "node1", "node2", "node3", "elsewhere"]),
    rank=st.integers(-1, 3),
    step=st.integers(0, 3),
    severity=st.sampled_from([Severity.NOTICE, Severity.WORKERS, Severity.WORKERS, Severity.NODE]),
    fingerprint=st.sampled_from(["a", "b", "c"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(VERDICTS, max_size=25), st.integers(0, 6), st.integers(0, 2))
def test_whatever_fails_the_budget_holds_and_spares_are_really_spare(
    failures: list[Verdict], max_restarts: int, spares: int
) -> None:
    config = job(spares=spares, max_restarts=max_restarts)
    state = running(spares)
    restarts = 0
    for what in failures:
        before = state
        state, action = suffer(state, what, config)
        assert act(what, before, config) == action, "the same with and without the verdict in the state"
        assert action.reason.endswith((".", "!"))
        if isinstance(action, Replace):
            assert before.status(action.spare) is NodeStatus.READY
            assert action.spare not in before.order
            assert action.node in before.order
            assert state.status(action.node) is NodeStatus.EVICTED
        restarts += isinstance(action, Restart | Replace)
        assert restarts == state.restarts_used <= max_restarts
        assert len(set(state.order)) == 2
        assert not set(state.order) & set(state.evicted)
        if isinstance(action, Stop):
            break


@settings(max_examples=100, deadline=None)
@given(st.lists(VERDICTS, max_size=12), VERDICTS)
def test_deciding_is_deterministic(failures: list[Verdict], last: Verdict) -> None:
    """The same journal gives the same decision, also after a round trip through its encoding."""
    state, config = running(), job()
    for what in failures:
        state, _ = suffer(state, what, config)
    again = msgspec.json.decode(msgspec.json.encode(state), type=JobState)
    assert decide(said(last, state), state, config) == decide(said(last, state), again, config)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([Cause.USER_ERROR, Cause.OUT_OF_MEMORY, Cause.WORKER_CRASH]),
    st.integers(0, 100),
    st.lists(st.integers(101, 200), max_size=3, unique=True),
)
def test_a_software_failure_that_moves_between_nodes_never_outlives_its_second_time(
    cause: Cause, step: int, others: list[int]
) -> None:
    """Whatever else fails in between."""
    state, config = running(), job()
    state, _ = suffer(state, verdict(cause, "node0", step=step, fingerprint="same"), config)
    for other in others:
        state, _ = suffer(state, verdict(Cause.PEER_LOST, "node1", step=other), config)
    _, action = suffer(state, verdict(cause, "node1", step=step, fingerprint="same"), config)
    assert isinstance(action, Stop)
    assert action.exit_code == 93
