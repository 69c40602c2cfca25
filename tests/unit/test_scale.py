"""What is kept up with each report is what a look at the whole fleet would say; an order does not grow with it."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.control_plane_supervisor import large_job
from cluster import events
from cluster.fleet import AgentView, ready_members
from cluster.generations import Generations
from cluster.journal import Journal
from cluster.messages import AgentReport, AgentStatus, Order, Plan, Readiness, encode
from cluster.noticing import ASKED_AT_ONCE, Noticing
from cluster.placement import Placement
from cluster.rundir import RunDir
from cluster.state import replay
from cluster.supervisor import Supervisor
from configs.load import load_job
from tests.unit.test_takeover import Deaf, Machines, Played, at

NODES = [f"node{index}" for index in range(5)]


def report(
    node: str, ready_for: int | None = None, address: str = "", domain: str = "", notice: str = ""
) -> AgentReport:
    return AgentReport(
        node=node, host="h", pid=1, seq=1, status=AgentStatus.READY, generation=0, finished_step=0,
        readiness=None if ready_for is None else Readiness(ready_for, "h", 1, ()), beats=(), exits=(), facts=(),
        peer_address=address, domain=domain, notice=notice,
    )  # fmt: skip


HEARD = st.tuples(st.just("hear"), st.sampled_from(NODES), st.none() | st.integers(0, 6))
GONE = st.tuples(st.just("forget"), st.sampled_from(NODES), st.none())
BEGUN = st.tuples(st.just("begin"), st.lists(st.sampled_from(NODES), unique=True), st.none())


@given(st.lists(st.one_of(HEARD, GONE, BEGUN), max_size=40))
def test_who_is_ready_is_kept_up(story: list) -> None:
    """Property: after any story, all are ready if looking at everybody's newest report says so."""
    views: dict[str, AgentView] = {}
    generations = Generations(load_job("demo"), views, 0)
    for what, of, ready_for in story:
        if what == "begin":
            generations.begin(of, "r", 0.0)
        elif what == "hear":
            views[of] = AgentView(report(of, ready_for), 0.0)
            generations.hear(views[of].report)
        else:
            views.pop(of, None)
            generations.forget(of)
        ready = ready_members(generations.members, views, generations.number)
        assert generations.all_ready == (bool(generations.members) and len(ready) == len(generations.members))


@given(
    st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(["", "a:1", "b:1"]), st.sampled_from(["", "x", "y"]),
                       st.booleans()), max_size=30),
    st.lists(st.sampled_from(NODES), unique=True, max_size=4),
)  # fmt: skip
def test_copies_are_placed_as_if_all_were_seen_at_once(story: list, members: list[str]) -> None:
    """Property: what was seen before, and when copies were placed in between, plays no part."""
    step_by_step, newest = Placement(2), dict[str, AgentReport]()
    for node, address, domain, stays in story:
        if stays:
            newest[node] = report(node, address=address, domain=domain)
            step_by_step.see(newest[node])
        else:
            newest.pop(node, None)
            step_by_step.forget(node)
        step_by_step.update(members[:2])
    at_once = Placement(2)
    for each in newest.values():
        at_once.see(each)
    step_by_step.update(members)
    at_once.update(members)
    for node in NODES:
        assert step_by_step.copy_to(node) == at_once.copy_to(node)
        assert step_by_step.keep_for(node, 2) == at_once.keep_for(node, 2)


def test_an_order_does_not_grow_with_the_fleet(tmp_path: Path) -> None:
    """Promise: telling n nodes takes n orders of one size: with 12,500 nodes each is as small as with three."""
    names = [f"node{index}" for index in range(12_500)]
    journal = Journal(tmp_path / "events.jsonl")
    played = Played(lambda s: [])
    supervisor = Supervisor(
        large_job(len(names)), RunDir(tmp_path), Machines(set()), played, journal, replay([]), {n: n for n in names},
        Deaf(),
    )  # type: ignore[arg-type]  # fmt: skip
    plan = Plan(generation=1, nodes=tuple(names), ranks_per_node=8, store_host="h", store_port=1, ram_step=9)
    supervisor.generations.resume(plan, (), names)
    for name in names:
        supervisor.take(msgspec.structs.replace(report(name, address="10.0.0.1:40000"), generation=1))
    supervisor._follow(plan)
    supervisor.broadcast()
    order = played.orders[names[-1]]
    assert isinstance(order, Order)
    assert order.plan is not None
    assert (order.plan.place, order.plan.nodes) == (12_499, 12_500)
    assert list(order.plan.ranks) == list(range(99_992, 100_000))
    assert len(encode(order)) < 1000


def test_in_a_large_fleet_everybody_is_asked_after_in_turn() -> None:
    """Promise: an agent that is gone is found within a few rounds, however many there are; none is left out."""
    names = [f"node{index}" for index in range(3 * ASKED_AT_ONCE + 17)]
    machines = Machines(set())
    now_s = time.monotonic()
    noticing = Noticing(load_job("demo"), machines, {}, now_s)
    noticing.expect(names, now_s)
    handles = {name: name for name in names}
    for gone in (names[0], names[ASKED_AT_ONCE], names[-1]):
        machines.gone = {gone}
        found = [each.verdict.node for _ in range(4) for each in noticing.silent(handles, (), now_s)]
        assert set(found) == {gone}


def test_the_longest_silent_are_found_and_nobody_else() -> None:
    """Promise: whoever spoke in time is not blamed, whatever the order in which they spoke."""
    config = load_job("demo")
    timeout_s = config.health.heartbeat_timeout_s
    noticing = Noticing(config, Machines(set()), {}, 0.0)
    noticing.adopt(NODES, 0.0)
    handles = {name: name for name in NODES}
    for node in reversed(NODES):
        noticing.hear(node, 1.0)
    noticing.hear("node3", timeout_s)
    noticing.forget("node4")
    found = noticing.silent(handles, (), timeout_s + 1.5)
    assert sorted(each.verdict.node for each in found) == ["node0", "node1", "node2"]
    assert not noticing.waits_for_adopted


def test_evictions_are_known_however_they_came_about(tmp_path: Path) -> None:
    """Promise: what the supervisor keeps beside its state never differs from it."""
    supervisor = Supervisor(
        load_job("demo"), RunDir(tmp_path), Machines(set()), Played(lambda s: []), Journal(tmp_path / "events.jsonl"),
        replay([]), {}, Deaf(),
    )  # type: ignore[arg-type]  # fmt: skip
    story = [
        at(events.RunStarted, run="x", attempt=1, supervisor_pid=1, target_steps=60),
        *[at(events.AgentStarted, node=node, handle=node) for node in NODES],
        at(events.NodeEvicted, node="node1", reason="r"),
        at(events.ActionTaken, incident=1, action="replace", reason="r", node="node2", spare="node3"),
        at(events.ActionTaken, incident=2, action="evict", reason="r", node="node4"),
        at(events.NodeReadmitted, node="node1", reason="r"),
        at(events.RunStarted, run="x", attempt=2, supervisor_pid=1, target_steps=60),
    ]
    for event in story:
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if not name.startswith("t_")}
        supervisor.emit(type(event), **fields)
        assert supervisor.evicted == frozenset(supervisor.state.evicted)
    assert supervisor.evicted == {"node2", "node4"}
