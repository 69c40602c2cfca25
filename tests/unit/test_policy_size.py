"""Fewer nodes when there is no other way, more again when it is worth it: never flapping, never on a doubtful node."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events
from cluster.actions import Decision, Evict, Grow, Nothing, Replace, Restart, Shrink, Stop, action_event
from cluster.jobstate import JobState, NodeStatus
from cluster.policy import decide, leftover
from cluster.policy_size import decide_growth, resumed_words, smaller_order
from cluster.rehearsal import rehearse
from cluster.state import apply, replay
from configs.schema import ClusterConfig, JobConfig, ParallelismConfig
from configs.shrinking import fewest_nodes, largest_layout
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit import stories
from tests.unit.stories import verdict
from trainer.events import FactKind

NODES = ("node0", "node1", "node2", "node3")


def job(nodes: int = 4, **cluster: float | bool) -> JobConfig:
    """Two ranks a node and 24 sequences a step: it may shrink to 3 and 2 of 4 nodes."""
    base = stories.job(nodes=nodes, spares=0)
    settings = {"nodes": nodes, "ranks_per_node": 2, "grow_after_minutes": 10.0, **cluster}
    return msgspec.structs.replace(
        base,
        training=msgspec.structs.replace(base.training, global_batch_size=24),
        parallelism=ParallelismConfig(dp_shard=2 * nodes),
        cluster=ClusterConfig(**settings),  # type: ignore[arg-type]
    )


def began(*nodes: str, wanted: int = 4) -> list[events.AnyEvent]:
    start = msgspec.structs.replace(stories.started(1, 0.0), nodes=wanted)
    return [
        start, *(stories.ready(node, 1.0) for node in nodes), stories.planned(1, 2.0, nodes),
        stories.fact(FactKind.FIRST_STEP, 1, 1, 3.0),
    ]  # fmt: skip


def running(*nodes: str) -> JobState:
    return replay(began(*(nodes or NODES)))


def lost(node: str, step: int = 7) -> Verdict:
    return verdict(Cause.NODE_LOST, node, -1, step, Severity.NODE)


def suffer(state: JobState, what: Verdict, config: JobConfig, at_s: float = 10.0) -> tuple[JobState, Decision]:
    """One incident as the supervisor handles it, up to the first step after it."""
    event = stories.given(what, state.generation, state.next_incident, at_s)
    state = apply(state, event)
    decision = decide(event, state, config)
    action = decision.action
    state = apply(state, action_event(decision, event.incident, at_s, at_s, what.node))
    if isinstance(action, Replace | Shrink | Evict):
        state = apply(state, events.NodeEvicted(t_wall_s=at_s, t_mono_s=at_s, node=action.node, reason="r"))
    if isinstance(action, Restart | Replace | Shrink):
        state = plan(state, config, state.order, at_s)
    return state, decision


def plan(state: JobState, config: JobConfig, order: tuple[str, ...], at_s: float, step: int = 8) -> JobState:
    number = state.generation + 1
    layout = largest_layout(config, len(order)) if len(order) < config.cluster.nodes else None
    event = msgspec.structs.replace(stories.planned(number, at_s, order), layout=layout)
    return apply(apply(state, event), stories.fact(FactKind.FIRST_STEP, number, step, at_s))


def came_back(state: JobState, node: str, at_s: float) -> JobState:
    for event in (
        events.NodeReadmitted(t_wall_s=at_s, t_mono_s=at_s, node=node, reason="r"),
        events.AgentStarted(t_wall_s=at_s, t_mono_s=at_s, node=node, handle="h"),
        stories.ready(node, at_s),
    ):
        state = apply(state, event)
    return state


# Smaller -----------------------------------------------------------------------------------------------------------


def test_a_lost_node_without_a_spare_makes_the_job_smaller() -> None:
    state, decision = suffer(running(), lost("node1"), job())
    assert decision.action == Shrink("node1", ("node0", "node2", "node3"), decision.action.reason)
    assert "3 of 4 nodes (dp_shard 6)" in decision.action.reason
    assert (state.order, state.restarts_used, state.layout is not None) == (("node0", "node2", "node3"), 1, True)
    assert state.resizes[-1].nodes == 3


def test_a_spare_is_taken_before_the_job_becomes_smaller() -> None:
    ready = stories.ready("node4", 1.0)
    assert isinstance(suffer(apply(running(), ready), lost("node1"), job())[1].action, Replace)


def test_it_ends_where_no_smaller_layout_is_allowed_and_says_why() -> None:
    for config, why in ((job(shrink=False), "cluster.shrink is false"), (job(min_nodes=4), "cluster.min_nodes")):
        _, decision = suffer(running(), lost("node1"), config)
        assert isinstance(decision.action, Stop)
        assert decision.action.exit_code == 75
        assert any(why in line for line in decision.because)


def test_nodes_that_the_smaller_layout_leaves_out_are_spares_at_once() -> None:
    """24 sequences are not cut by 10 ranks: of 5 nodes that are left 4 hold ranks, and the last one stands by."""
    config, nodes = job(6), tuple(f"node{i}" for i in range(6))
    state, decision = suffer(running(*nodes), lost("node0"), config)
    assert isinstance(decision.action, Shrink)
    assert (state.order, state.spares) == (("node1", "node2", "node3", "node4"), ("node5",))
    _, again = suffer(state, lost("node2"), config)
    assert isinstance(again.action, Replace)


def test_a_node_with_a_past_is_left_out_first() -> None:
    config, nodes = job(6), tuple(f"node{i}" for i in range(6))
    past = events.NodeRemembered(
        t_wall_s=1.0, t_mono_s=1.0, node="node2", place=events.Place.SPARE, reason="r", failures=2.0, node_days=1.0,
        failures_per_day=1.0,
    )  # fmt: skip
    state = apply(running(*nodes), past)
    assert smaller_order({"node0"}, state, config) == ("node1", "node3", "node4", "node5")


def test_nodes_that_are_lost_together_are_one_change_of_size() -> None:
    config, state = job(), running()
    event = stories.given(lost("node1"), 1, 1, 10.0, others=(lost("node3"),))
    state = apply(state, event)
    decision = decide(event, state, config)
    assert isinstance(decision.action, Shrink)
    assert decision.action.order == ("node0", "node2")
    assert leftover(event, decision.action, state.order) == (lost("node3"),)


def test_a_proven_bad_node_is_not_gone_on_with_where_the_job_can_do_without_it() -> None:
    bad = verdict(Cause.SILENT_CORRUPTION, "node1", -1, 7, Severity.NODE, certainty=Certainty.PROOF)
    assert isinstance(suffer(running(), bad, job())[1].action, Shrink)
    limited = job()
    limited = msgspec.structs.replace(limited, health=msgspec.structs.replace(limited.health, max_evictions_per_hour=0))
    stopped = suffer(running(), bad, limited)[1].action
    assert isinstance(stopped, Stop)
    assert stopped.exit_code == 93


def test_a_job_that_does_not_fit_in_its_new_size_waits_for_nodes() -> None:
    """Promise: a smaller job that runs out of memory ends with 75, not as a bug, and says which bound helps."""
    config = job()
    state, _ = suffer(running(), lost("node1"), config)
    state = msgspec.structs.replace(state, proven_size=False)
    stop = suffer(state, verdict(Cause.OUT_OF_MEMORY, "node0"), config)[1].action
    assert isinstance(stop, Stop)
    assert stop.exit_code == 75
    assert "cluster.min_nodes = 4" in stop.reason
    for _ in range(3):
        broken = verdict(Cause.USER_ERROR, "node0", step=7, fingerprint="no room")
        event = stories.given(broken, state.generation, state.next_incident, 20.0)
        state = apply(state, event)
        action = decide(event, state, config).action
        state = apply(state, msgspec.structs.replace(stories.planned(state.generation + 1, 20.0, state.order)))
    assert isinstance(action, Stop)
    assert action.exit_code == 75


def test_a_node_lost_before_training_leaves_a_smaller_job() -> None:
    waiting = replay([stories.started(1, 0.0), *(stories.ready(node, 1.0) for node in NODES)])
    assert isinstance(suffer(waiting, lost("node1"), job())[1].action, Evict)
    few = replay([stories.started(1, 0.0), *(stories.ready(node, 1.0) for node in NODES[:2])])
    assert isinstance(suffer(few, lost("node1"), job())[1].action, Stop)


def test_what_a_change_of_size_costs_is_said() -> None:
    config = job()
    state, _ = suffer(running(), lost("node1"), config)
    state = apply(state, stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, 20, 11.0))
    whole = type("P", (), {"ram_step": -1, "layout": None, "nodes": NODES})
    assert resumed_words(whole, state, 24).endswith("from step 20, finished steps that are computed again: 3")  # type: ignore[arg-type]
    assert resumed_words(whole, state, 21).endswith("from step 20")  # type: ignore[arg-type]
    assert resumed_words(whole, JobState(), 24) == ""  # type: ignore[arg-type]


# Larger ------------------------------------------------------------------------------------------------------------


def shrunk(config: JobConfig, at_s: float = 10.0) -> JobState:
    return suffer(running(), lost("node1"), config, at_s)[0]


def test_it_grows_back_when_a_node_returns_and_not_before_its_time() -> None:
    config = job()
    state = came_back(shrunk(config), "node1", 20.0)
    assert decide_growth(state, config, 10.0 + 599) is None
    decision = decide_growth(state, config, 10.0 + 600)
    assert decision is not None
    assert decision.action == Grow(("node0", "node2", "node3", "node1"), decision.action.reason)
    assert "from 3 to 4 of 4 nodes" in decision.action.reason
    state = apply(state, action_event(decision, 0, 700.0, 700.0))
    assert state.growing == decision.action.order
    assert state.order == ("node0", "node2", "node3"), "until all have saved, ranks are where they were"
    assert decide_growth(state, config, 701.0) is None
    state = plan(state, config, state.growing, 702.0)
    assert (state.growing, state.layout, state.resizes[-1].nodes, state.restarts_used) == ((), None, 4, 1)


@pytest.mark.parametrize(
    "why", ["nobody is there", "probation", "still starting", "no step yet", "open", "not worth it"]
)
def test_it_does_not_grow(why: str) -> None:
    config = job()
    state = shrunk(config)
    if why != "nobody is there":
        state = came_back(state, "node1", 20.0)
    if why == "probation":
        state = apply(state, events.NodeRemembered(
            t_wall_s=21.0, t_mono_s=21.0, node="node1", place=events.Place.SPARE, reason="r", failures=1.0,
            node_days=1.0, failures_per_day=1.0,
        ))  # fmt: skip
    if why == "still starting":
        state = came_back(shrunk(config), "node9", 20.0)
        state = apply(state, events.AgentStarted(t_wall_s=21.0, t_mono_s=21.0, node="node9", handle="h"))
    if why == "no step yet":
        state = msgspec.structs.replace(state, proven_size=False)
    if why == "open":
        state = apply(state, stories.given(verdict(), state.generation, 9, 30.0))
    if why == "not worth it":
        state = msgspec.structs.replace(state, step_s=1.0, newest_step=95, recoveries_s=(20.0,))
    assert decide_growth(state, config, 10_000.0) is None


def test_a_node_that_comes_and_goes_does_not_make_the_job_flap() -> None:
    """Promise: no more than max_resizes_per_hour changes in any hour are growths or lead to them."""
    config = job(grow_after_minutes=0.0, max_resizes_per_hour=3)
    state, grown, now_s = running(), [], 10.0
    while now_s < 4 * 3600:
        victim = state.order[-1]
        state, decision = suffer(state, lost(victim, int(now_s)), config, now_s)
        assert isinstance(decision.action, Shrink)
        state = came_back(state, victim, now_s + 1)
        while (growth := decide_growth(state, config, now_s := now_s + 30)) is None:
            pass
        assert isinstance(growth.action, Grow)
        state = plan(apply(state, action_event(growth, 0, now_s, now_s)), config, growth.action.order, now_s)
        grown.append(now_s)
        now_s += 1
    assert all(sum(t - 3600 < other <= t for other in grown) <= 2 for t in grown)
    assert len(grown) > 4


WHAT = st.sampled_from(["lose", "return", "probation", "fail", "nothing"])
EVENTS = st.lists(st.tuples(WHAT, st.integers(0, 5), st.integers(1, 1500)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.sampled_from([0.0, 5.0, 20.0]), st.integers(1, 4))
def test_whatever_comes_and_goes_the_size_is_legal_and_growth_keeps_its_rules(
    story: list[tuple[str, int, int]], after_minutes: float, most: int
) -> None:
    config = job(grow_after_minutes=after_minutes, max_resizes_per_hour=most)
    state, now_s = running(), 10.0
    for what, number, pause_s in story:
        now_s, node = now_s + pause_s, f"node{number}"
        if what == "return" and state.status(node) in (None, NodeStatus.EVICTED):
            state = came_back(state, node, now_s)
        elif what == "probation" and state.status(node) is NodeStatus.READY:
            state = apply(state, events.NodeRemembered(
                t_wall_s=now_s, t_mono_s=now_s, node=node, place=events.Place.SPARE, reason="r", failures=1.0,
                node_days=1.0, failures_per_day=1.0,
            ))  # fmt: skip
        elif what in ("lose", "fail") and state.status(node) is not None:
            said = lost(node, int(now_s)) if what == "lose" else verdict(Cause.WORKER_KILLED, node, step=int(now_s))
            before = state
            state, decision = suffer(state, said, config, now_s)
            if isinstance(decision.action, Stop):
                assert before.spares == ()
                assert smaller_order({node}, before, config) == ()
                break
        growth = decide_growth(state, config, now_s)
        if growth is not None:
            assert isinstance(growth.action, Grow)
            check_growth(growth.action, state, config, now_s)
            state = plan(apply(state, action_event(growth, 0, now_s, now_s)), config, growth.action.order, now_s)
        assert fewest_nodes(config) <= len(state.order) <= config.cluster.nodes
        layout = largest_layout(config, len(state.order))
        assert layout is not None
        assert layout.nodes == len(state.order)
        assert len(set(state.order)) == len(state.order)
        assert not set(state.order) & set(state.evicted)
    assert msgspec.json.decode(msgspec.json.encode(state), type=JobState) == state


def check_growth(action: Grow, state: JobState, config: JobConfig, now_s: float) -> None:
    """What `decide_growth` promises of the moment and of the nodes."""
    assert len(action.order) > len(state.order)
    assert action.order[: len(state.order)] == state.order
    for node in action.order[len(state.order) :]:
        assert state.status(node) is NodeStatus.READY
        assert node not in state.doubtful
    assert now_s - state.resizes[-1].t_wall_s >= 60 * config.cluster.grow_after_minutes
    lately = [each for each in state.resizes if now_s - each.t_wall_s < 3600]
    assert len(lately) < config.cluster.max_resizes_per_hour


# The journal -------------------------------------------------------------------------------------------------------


def test_a_shrink_can_be_decided_again_from_its_journal() -> None:
    config, journal = job(), began(*NODES)
    event = stories.given(lost("node1"), 1, 1, 10.0)
    decision = decide(event, replay([*journal, event]), config)
    journal += [event, action_event(decision, 1, 11.0, 11.0, "node1")]
    (again,) = rehearse(journal, config)
    assert not again.differs
    (other,) = rehearse(journal, job(shrink=False))
    assert other.differs
    assert isinstance(other.again.action, Stop)


def test_journals_of_before_a_run_could_shrink_are_read() -> None:
    """Promise: a run that was begun by an older release goes on: what it did not write is as it was then."""
    plain = {"t_wall_s": 1.0, "t_mono_s": 1.0}
    lines = [
        {"event": "run_started", **plain, "run": "x", "attempt": 1, "supervisor_pid": 1, "target_steps": 9},
        {"event": "node_ready", **plain, "node": "node0", "host": "h", "pid": 1},
        {"event": "generation_planned", **plain, "generation": 1, "nodes": ["node0", "node1"], "ranks_per_node": 2,
         "store_host": "h", "store_port": 1, "ram_step": -1, "reason": "start"},
        {"event": "action", **plain, "incident": 1, "action": "replace", "reason": "r", "node": "node1", "spare": "n2"},
    ]  # fmt: skip
    old = [msgspec.json.decode(msgspec.json.encode(line), type=events.AnyEvent) for line in lines]
    state = replay(old)
    assert (state.order, state.layout, state.resizes, state.wanted_nodes) == (("node0", "n2"), None, (), 2)
    assert isinstance(decide(stories.given(verdict(severity=Severity.NOTICE), 1, 0, 2.0), state, job()).action, Nothing)
