"""What it takes to evict a node: evidence that agrees, a price that is right, and no more than a few an hour."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.actions import Decision, Evict, Nothing, Replace, Restart, Stop
from cluster.events import NodeRemembered, Place, VerdictGiven
from cluster.evidence import GONE, goes_on
from cluster.jobstate import JobState
from cluster.policy import decide, leftover
from cluster.policy_pricing import spare_cost_s
from cluster.rehearsal import rehearse
from cluster.state import apply, replay
from configs.schema import JobConfig
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit import stories
from tests.unit.stories import job, verdict
from tests.unit.test_policy import act, live, running, said, suffer
from tests.unit.test_state import EVENTS
from trainer.events import FactKind

HINT, LIKELY, PROOF = Certainty.HINT, Certainty.LIKELY, Certainty.PROOF


def about(cause: Cause, certainty: Certainty, node: str = "node0", step: int = -1, slowdown: float = 0.0) -> Verdict:
    """What a node's own probe says of it."""
    return verdict(cause, node, -1, step, Severity.NODE, certainty=certainty, slowdown=slowdown)


def limited(spares: int = 1, evictions: int = 8, restarts: int = 100) -> JobConfig:
    config = job(spares=spares, max_restarts=restarts)
    health = msgspec.structs.replace(config.health, max_evictions_per_hour=evictions)
    return msgspec.structs.replace(config, health=health)


def test_a_hint_is_watched_and_a_second_of_another_kind_evicts() -> None:
    """Promise: one weak piece of evidence evicts nobody; two that are independent do, and the facts say which."""
    state, first = live(running(), said(about(Cause.GPU_DEGRADED, HINT), running()), job())
    assert isinstance(first.action, Nothing)
    assert any("not taken: evicting node0" in line for line in first.because)
    state, second = live(state, said(about(Cause.LINK_FAULT, HINT), state, 80.0), limited())
    assert isinstance(second.action, Replace)
    (line,) = [line for line in second.because if line.startswith("against node0")]
    for words in ("likely", "link_fault now", "gpu_degraded in incident 1, 1.2 min ago"):
        assert words in line


def test_an_impaired_node_trains_on_where_a_restart_is_dear() -> None:
    """Promise: over-eviction is priced: a restart for certain is weighed against a failure that is likely."""
    likely = about(Cause.GPU_DEGRADED, LIKELY)
    assert isinstance(act(likely, running(), job()), Replace)
    health = msgspec.structs.replace(job().health, restart_cost_s=600.0)
    dear = msgspec.structs.replace(job(), health=health)
    kept = decide(said(likely, running()), running(), dear)
    assert isinstance(kept.action, Nothing)
    assert "would cost more than keeping it" in kept.action.reason
    assert isinstance(act(about(Cause.GPU_FAULT, LIKELY), running(), dear), Replace), "it must restart anyway"
    assert isinstance(act(about(Cause.GPU_DEGRADED, PROOF), running(), dear), Replace)


@pytest.mark.parametrize("step", [0, 1])
def test_the_same_hint_again_is_no_second_witness(step: int) -> None:
    """Promise: a probe that repeats itself within a generation weighs no more than once, however far the run is."""
    state = running()
    for number in range(5):
        what = about(Cause.GPU_DEGRADED, HINT, step=10 + step * number)
        state, decision = live(state, said(what, state, 10.0 + number), job())
        assert "hint" in next(line for line in decision.because if line.startswith("against"))
        assert isinstance(decision.action, Nothing)


def test_the_same_hint_in_two_generations_is_two_witnesses() -> None:
    """Promise: what comes back after all workers were started anew is not chance."""
    state, _ = live(running(), said(about(Cause.GPU_DEGRADED, HINT), running()), job())
    state, action = suffer(state, verdict(Cause.USER_ERROR, "node1", step=5), job())
    assert isinstance(action, Restart)
    _, action = suffer(state, about(Cause.GPU_DEGRADED, HINT), job())
    assert isinstance(action, Replace)


def test_all_that_is_said_of_one_end_of_workers_is_one_witness() -> None:
    """Promise: an XID and the crash that it led to are one failure, in one incident or told in two."""
    crash, xid = (verdict(cause, "node0", step=5) for cause in (Cause.WORKER_CRASH, Cause.CUDA_ERROR))
    together = decide(said(xid, running(), others=(crash,)), running(), job())
    assert isinstance(together.action, Restart)
    state = running()
    after, decision = live(state, said(crash, state), job())
    assert isinstance(decision.action, Restart)
    late = stories.given(xid, state.generation, after.next_incident, 10.1)
    assert isinstance(decide(late, after, job()).action, Restart)


def test_a_hint_beside_a_crash_does_not_hide_the_crash() -> None:
    """Promise: workers that died start again, whatever weak suspicion came with it; the suspicion is remembered."""
    crash, hint = verdict(Cause.WORKER_CRASH, "node1"), about(Cause.GPU_DEGRADED, HINT)
    state, decision = live(running(), said(hint, running(), others=(crash,)), job())
    assert isinstance(decision.action, Restart)
    assert "crashed (rank 0 on node1)" in decision.action.reason
    state, decision = live(state, said(verdict(Cause.HANG, "node0", step=9), state), job())
    assert isinstance(decision.action, Replace)


def test_old_evidence_is_not_held_against_a_node() -> None:
    config = job()
    window_s = config.health.evidence_window_hours * 3600
    for later_s, kind in ((window_s - 60, Replace), (window_s + 60, Restart)):
        state, _ = suffer(running(), verdict(Cause.HANG, "node0", step=5), config)
        _, action = suffer(state, verdict(Cause.HANG, "node0", step=9), config, at_s=10.0 + later_s)
        assert isinstance(action, kind)


def test_what_earlier_runs_saw_corroborates_a_hint() -> None:
    """Promise: a node with a past has no credit: its first kill in this run is its second strike."""
    kill = verdict(Cause.WORKER_KILLED, "node1", step=5)
    assert isinstance(act(kill, running(), job()), Restart)
    past = NodeRemembered(
        t_wall_s=0.0, t_mono_s=0.0, node="node1", place=Place.SPARE, reason="evicted in run a", failures=1.0,
        node_days=0.1, failures_per_day=0.02,
    )  # fmt: skip
    state = apply(running(), past)
    decision = decide(said(kill, state), state, job())
    assert isinstance(decision.action, Replace)
    assert any("evicted in run a" in line for line in decision.because)


def test_nodes_with_a_past_are_the_last_spares() -> None:
    state = running(spares=3)
    past = {"t_wall_s": 0.0, "t_mono_s": 0.0, "reason": "x", "failures": 1.0, "node_days": 0.1, "failures_per_day": 1.0}
    state = apply(state, NodeRemembered(node="node2", place=Place.SPARE, **past))
    state = apply(state, NodeRemembered(node="node3", place=Place.MEMBER, **past))
    assert state.spares == ("node3", "node4", "node2")


@pytest.mark.parametrize(
    ("cause", "certainty", "kind", "code"),
    [
        (Cause.GPU_FAULT, LIKELY, Restart, None),
        (Cause.GPU_FAULT, PROOF, Stop, 75),
        (Cause.GPU_DEGRADED, PROOF, Nothing, None),
        (Cause.STRAGGLER, PROOF, Nothing, None),
        (Cause.NODE_LOST, LIKELY, Stop, 75),
    ],
)
def test_without_a_spare(cause: Cause, certainty: Certainty, kind: type, code: int | None) -> None:
    """Promise: a node that is only likely bad trains on, one that is proven bad does not, and what still trains is not
    stopped for an impairment."""
    action = act(about(cause, certainty, slowdown=0.5), running(spares=0), job(spares=0))
    assert isinstance(action, kind)
    assert getattr(action, "exit_code", None) == code


def test_what_was_put_right_already_stops_no_job() -> None:
    """Promise: a device that computed a wrong gradient, which was then replaced, goes if there is a spare; without
    one the job goes on, and the node is remembered."""
    proven = about(Cause.SILENT_CORRUPTION, PROOF, step=7)
    mended = msgspec.structs.replace(proven, mended=True)
    assert isinstance(act(mended, running(), job()), Replace)
    assert isinstance(act(mended, running(spares=0), job(spares=0)), Nothing)
    assert isinstance(act(proven, running(spares=0), job(spares=0)), Stop), "wrong weights are not trained on"


def evict_some(count: int, cause: Cause, config: JobConfig) -> JobState:
    state = running(spares=count + 1)
    for number in range(count):
        state, action = suffer(state, about(cause, PROOF, state.order[0]), config, at_s=100.0 + 60 * number)
        assert isinstance(action, Replace)
    return state


def test_beyond_the_limit_of_an_hour_a_proof_asks_for_a_person_and_a_likelihood_is_kept() -> None:
    """Promise: no more than max_evictions_per_hour without a person; an hour later there is room again."""
    config = limited(spares=3, evictions=2)
    state = evict_some(2, Cause.GPU_FAULT, config)
    stop = decide(said(about(Cause.GPU_FAULT, PROOF, "node1"), state, 300.0), state, config).action
    assert isinstance(stop, Stop)
    assert stop.exit_code == 93
    assert "2 nodes have been evicted on evidence within an hour" in stop.reason
    kept = decide(said(about(Cause.GPU_FAULT, LIKELY, "node1"), state, 300.0), state, config).action
    assert isinstance(kept, Restart)
    later = decide(said(about(Cause.GPU_FAULT, PROOF, "node1"), state, 300.0 + 3600), state, config).action
    assert isinstance(later, Replace)
    for event in (stories.stopped(93, 400.0), stories.started(2, 410.0)):
        state = apply(state, event)
    assert state.evictions == (), "a person has had a turn"


def test_nodes_that_are_gone_do_not_count_against_the_limit() -> None:
    """Promise: a rack that loses its power is replaced as far as spares go."""
    config = limited(spares=3, evictions=1)
    state = evict_some(3, Cause.NODE_LOST, config)
    assert isinstance(act(about(Cause.GPU_FAULT, PROOF, "node1"), state, config), Replace)


def test_a_spare_is_evicted_on_evidence_and_not_on_a_hint() -> None:
    assert isinstance(act(about(Cause.GPU_DEGRADED, HINT, "node2"), running(), job()), Nothing)
    action = act(about(Cause.GPU_FAULT, LIKELY, "node2"), running(), job())
    assert action == Evict("node2", action.reason)
    state, _ = suffer(running(), about(Cause.GPU_FAULT, LIKELY, "node2"), job())
    assert state.spares == ()
    assert state.restarts_used == 0
    assert not state.open_incidents


def test_before_training_begins_the_limit_holds_too() -> None:
    """Promise: where the judge is wrong (a tie between versions, a broken self-test), the run stops at the limit and
    asks for a person, instead of putting node after node out; nodes that are gone do not count."""
    config, state = limited(spares=4, evictions=2), replay([stories.started(1, 0.0)])
    for number in range(6):
        state = apply(state, stories.ready(f"node{number}", 1.0))
    for number in range(2):
        state, action = suffer(state, about(Cause.PREFLIGHT_FAILED, PROOF, f"node{number}"), config, 10.0 + number)
        assert isinstance(action, Evict)
    stop = act(about(Cause.PREFLIGHT_FAILED, PROOF, "node2"), state, config)
    assert isinstance(stop, Stop)
    assert stop.exit_code == 93
    assert "2 nodes have been evicted on evidence within an hour" in stop.reason
    assert "what judges them" in stop.reason
    assert isinstance(act(about(Cause.NODE_LOST, LIKELY, "node2"), state, config), Evict)


def test_two_bad_nodes_in_one_incident_are_both_dealt_with() -> None:
    """Promise: what an action leaves unsettled is handed back, hints excepted."""
    first, second, hint = (about(Cause.GPU_FAULT, PROOF, f"node{i}") for i in (0, 1, 1))
    hint = msgspec.structs.replace(hint, certainty=HINT)
    state = running(spares=2)
    event = said(first, state, others=(second, hint))
    state, decision = live(state, event, job(spares=2))
    assert isinstance(decision.action, Replace)
    assert leftover(event, decision.action, ("node0", "node1")) == (second,)
    state, decision = live(state, said(second, state), job(spares=2))
    assert isinstance(decision.action, Replace)
    assert state.order == ("node2", "node3")


def test_a_spare_in_an_incident_of_ranks_is_handed_back_whatever_is_done() -> None:
    """Promise: a proof against a node without ranks is not lost in a restart, and ends in an incident about it."""
    bad, worse = (about(Cause.GPU_FAULT, sure, f"node{i}") for i, sure in ((2, LIKELY), (3, PROOF)))
    state, order = running(spares=2), ("node0", "node1")
    event = said(verdict(Cause.PEER_LOST, step=7), state, others=(bad, worse))
    decision = decide(event, state, job(spares=2))
    assert isinstance(decision.action, Restart)
    assert leftover(event, decision.action, order) == (bad, worse)
    both = said(worse, state, others=(bad,))
    assert leftover(both, decide(both, state, job(spares=2)).action, order) == (bad,)
    kept = decide(both, state, limited(2, evictions=0)).action
    assert isinstance(kept, Nothing)
    assert leftover(both, kept, order) == (bad,), "each is judged once"


def paced(step_s: float, at_step: int, target: int = 100) -> JobState:
    """A run of which the journal shows how fast it is."""
    started = msgspec.structs.replace(stories.started(1, 0.0), target_steps=target)
    nodes = [stories.ready(f"node{i}", 1.0) for i in range(3)]
    first = stories.fact(FactKind.FIRST_STEP, 1, 1, 10.0)
    committed = stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, at_step, 10.0 + step_s * (at_step - 1))
    return replay([started, *nodes, stories.planned(1, 2.0), first, committed])


@pytest.mark.parametrize(
    ("left", "slowdown", "kind"),
    [(1000, 0.2, Replace), (20, 0.2, Nothing), (1000, 0.001, Nothing), (1000, 0.0, Nothing)],
)
def test_a_straggler_is_replaced_only_if_its_slowness_costs_more_than_a_restart(
    left: int, slowdown: float, kind: type
) -> None:
    """Promise: 20% of 1,000 steps of 5 s are worth a restart of 20 s, those of 20 steps are not."""
    state = paced(5.0, 50, 50 + left)
    assert state.step_s == pytest.approx(5.0)
    slow = about(Cause.STRAGGLER, LIKELY, "node0", 50, slowdown)
    decision = decide(said(slow, state, 300.0), state, job())
    assert isinstance(decision.action, kind)
    (line,) = [line for line in decision.because if line.startswith("price")]
    assert f"{slowdown:.0%} longer steps" in line


def test_the_price_of_a_restart_is_the_one_that_was_measured() -> None:
    state, _ = suffer(running(), verdict(step=7), job(), at_s=100.0)
    state = apply(state, stories.fact(FactKind.FIRST_STEP, 2, 7, 103.5))
    assert state.recoveries_s == (3.5,)
    decision = decide(said(about(Cause.GPU_FAULT, LIKELY), state, 110.0), state, job())
    assert any("a restart takes 3.5 s (median of 1)" in line for line in decision.because)


@given(st.integers(0, 12), st.integers(1, 20_000), st.floats(1.0, 1e6))
def test_a_spare_is_worth_what_its_lack_would_cost(spares: int, nodes: int, horizon_s: float) -> None:
    """The closed form is the difference of two chances that spares do not suffice."""
    mean = nodes * 6.5e-3 * 0.325 * horizon_s / 86400

    def short(stock: int) -> float:
        return 1 - sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(stock + 1))

    expected = 1800 * (short(spares - 1) - short(spares))
    assert spare_cost_s(spares, nodes, horizon_s, 1800) == pytest.approx(expected, abs=1e-6)


ANY = st.builds(
    verdict,
    cause=st.sampled_from(list(Cause)),
    node=st.sampled_from(["", "node0", "node1", "node2", "node3", "elsewhere"]),
    rank=st.integers(-1, 3),
    step=st.integers(-1, 3),
    severity=st.sampled_from([Severity.NOTICE, *[Severity.WORKERS, Severity.NODE] * 4, Severity.JOB]),
    fingerprint=st.sampled_from(["a", "b"]),
    certainty=st.sampled_from(list(Certainty)),
    slowdown=st.sampled_from([0.0, 0.2, 3.0]),
)
INCIDENTS = st.lists(st.tuples(ANY, st.lists(ANY, max_size=2), st.sampled_from([1.0, 300.0, 4000.0])), max_size=20)


def endure(incidents: list, config: JobConfig, state: JobState) -> list[tuple[JobState, VerdictGiven, Decision]]:  # type: ignore[type-arg]
    """Live through incidents until the run stops: the state before each, what was said, and what was decided."""
    at_s, told = 10.0, []
    for root, others, gap_s in incidents:
        at_s += gap_s
        event = said(root, state, at_s, tuple(others))
        before = state
        state, decision = live(state, event, config)
        told.append((before, event, decision))
        if isinstance(decision.action, Stop):
            break
    return told


@settings(max_examples=300, deadline=None)
@given(INCIDENTS, st.integers(0, 3))
def test_whatever_is_said_nobody_is_evicted_on_one_weak_piece(incidents: list, spares: int) -> None:  # type: ignore[type-arg]
    """Promise (property): who is evicted is gone, or accused by more than a hint, or in two generations, or by two
    probes."""
    for before, event, decision in endure(incidents, limited(spares), running(spares)):
        if not isinstance(decision.action, Replace | Evict):
            continue
        node = decision.action.node
        now = [v for v in (event.verdict, *event.others) if v.node == node and v.severity is not Severity.NOTICE]
        gone = any(v.cause in GONE for v in now)
        strong = any(v.severity is Severity.NODE and v.certainty is not HINT for v in now)
        old = [f for f in before.failures if f.node == node and f.incident != event.incident]
        again = any(f.generation != event.generation for f in old)
        probes = {each.cause for each in (*old, *now) if each.severity is Severity.NODE}
        workers = any(each.severity is Severity.WORKERS for each in (*old, *now))
        assert gone or strong or again or len(probes) + workers > 1


@settings(max_examples=300, deadline=None)
@given(INCIDENTS, st.integers(0, 3), st.integers(0, 2), st.integers(0, 5))
def test_no_budget_is_exceeded(incidents: list, spares: int, evictions: int, restarts: int) -> None:  # type: ignore[type-arg]
    """Promise (property): restarts of the whole run, and evictions on evidence in any hour, stay within bounds."""
    config = limited(spares, evictions, restarts)
    judged, restarted = [], 0
    for before, event, decision in endure(incidents, config, running(spares)):
        restarted += isinstance(decision.action, Restart | Replace)
        if isinstance(decision.action, Replace):
            assert decision.action.spare in before.spares
        if isinstance(decision.action, Replace | Evict):
            node = decision.action.node
            told = (event.verdict, *event.others)
            if not any(each.cause in GONE and each.node == node for each in told):
                judged.append(event.t_wall_s)
    assert restarted <= restarts
    assert all(sum(0 <= other - one < 3600 for other in judged) <= evictions for one in judged)


@settings(max_examples=300, deadline=None)
@given(EVENTS, ANY, st.lists(ANY, max_size=2), st.integers(0, 6))
def test_the_same_again_and_again_ends(events: list, root: Verdict, others: list[Verdict], restarts: int) -> None:  # type: ignore[type-arg]
    """Promise (property): from any state, the same incident repeated restarts the job a bounded number of times; then
    the run stops, or training is left alone."""
    config, state = limited(restarts=restarts), replay(events)
    restarted = 0
    for number in range(restarts + 8):
        event = said(root, state, 100.0 + number, tuple(others))
        state, decision = live(state, event, config)
        assert decision.action.reason.endswith(".")
        if isinstance(decision.action, Stop):
            break
        restarted += isinstance(decision.action, Restart | Replace)
    else:
        assert not isinstance(decision.action, Restart | Replace), "it still restarts"
    assert restarted <= restarts


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([cause for cause in Cause if cause not in GONE]), st.sampled_from(list(Certainty)), st.data())
def test_one_failure_that_follows_the_job_is_stopped_the_third_time(
    cause: Cause, certainty: Certainty, data: st.DataObject
) -> None:
    """Promise (property): the same failure at the same step, on whichever node, restarts the job at most twice."""
    state, restarted = running(spares=5), 0
    severity = data.draw(st.sampled_from([Severity.WORKERS, Severity.NODE]))
    for _ in range(10):
        node = data.draw(st.sampled_from(state.order))
        what = verdict(cause, node, -1, 7, severity, certainty=certainty)
        if goes_on(what):
            return
        state, action = suffer(state, what, limited(spares=5))
        restarted += isinstance(action, Restart | Replace)
        if isinstance(action, Stop):
            break
    assert isinstance(action, Stop)
    assert restarted <= 2


@settings(max_examples=100, deadline=None)
@given(INCIDENTS, st.integers(0, 2))
def test_every_decision_can_be_made_again_from_the_journal(incidents: list, spares: int) -> None:  # type: ignore[type-arg]
    """Promise (property): the journal alone holds all that a decision needs, through its encoding and back."""
    from cluster.actions import action_event
    from cluster.events import AnyEvent, NodeEvicted

    nodes = [stories.ready(f"node{i}", 1.0) for i in range(2 + spares)]
    journal: list[AnyEvent] = [stories.started(1, 0.0), *nodes, stories.planned(1, 2.0)]
    config = limited(spares)
    for before, event, decision in endure(incidents, config, replay(journal)):
        at_s, action = event.t_wall_s + 1.0, decision.action
        journal += [event, action_event(decision, event.incident, at_s, at_s, event.verdict.node)]
        if isinstance(action, Replace | Evict):
            journal.append(NodeEvicted(t_wall_s=at_s, t_mono_s=at_s, node=action.node, reason=action.reason))
        if isinstance(action, Restart | Replace):
            order = replay(journal).order
            journal.append(stories.planned(before.generation + 1, at_s, order))
    written = [msgspec.json.decode(msgspec.json.encode(each), type=AnyEvent) for each in journal]
    again = rehearse(written, config)
    assert not [each for each in again if each.differs]
    assert [each.again.because for each in again] == [each.taken.because for each in again if each.taken]


def test_another_configuration_decides_otherwise_and_says_where() -> None:
    """Promise: a changed configuration can be tried on what has happened."""
    state = running()
    fault = said(about(Cause.GPU_FAULT, PROOF), state)
    nodes = [stories.ready(f"node{i}", 1.0) for i in range(3)]
    replaced = stories.action("replace", 1, 11.0, "node0", "node2")
    journal = [stories.started(1, 0.0), *nodes, stories.planned(1, 2.0), fault, replaced]
    assert not any(each.differs for each in rehearse(journal, limited()))
    (changed,) = [each for each in rehearse(journal, limited(evictions=0)) if each.differs]
    assert changed.would.action == "stop"


def test_a_journal_of_an_older_version_is_understood() -> None:
    """Promise: events from before there were `others` and `because` decode, and their decisions can be made again."""
    from cluster.events import AnyEvent

    lines = (
        '{"event":"verdict","t_wall_s":5.0,"t_mono_s":5.0,"generation":1,"verdict":{"node":"node1","rank":-1,"cause":'
        '"node_lost","severity":"node","step":32,"fingerprint":"node_lost","evidence":["gone"]},"t_failed_wall_s":4.0,'
        '"incident":1}',
        '{"event":"action","t_wall_s":5.1,"t_mono_s":5.1,"incident":1,"action":"replace","reason":"r","node":"node1",'
        '"spare":"node2"}',
    )
    events = [msgspec.json.decode(line, type=AnyEvent) for line in lines]
    nodes = [stories.ready(f"node{i}", 1.0) for i in range(3)]
    (decided,) = rehearse([stories.started(1, 0.0), *nodes, stories.planned(1, 2.0), *events], job())
    assert not decided.differs
