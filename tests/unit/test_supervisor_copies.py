"""What a supervisor makes of copies: it counts on all that there are, and on none that are not.

The supervisor is the real one; its two borders are played as in `test_takeover`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster import events
from cluster.messages import AgentReport, Gather, HeldInfo
from tests.unit.test_takeover import REPLACED, RESTARTED, Answer, Played, at, planned, take_over, turn_until

ADDRESSES = {"node0": "h:1", "node1": "h:2", "node2": "h:3"}


def holding(report: AgentReport, ranks: Sequence[int], step: int, ready_for: int | None = None) -> AgentReport:
    """The report of a node that holds these ranks' shards of a step, and said so for a generation."""
    assert report.readiness is not None
    held = tuple(HeldInfo(rank, 4, step, 1, "peer") for rank in ranks)
    ready = msgspec.structs.replace(report.readiness, held=held)
    if ready_for is not None:
        ready = msgspec.structs.replace(ready, ready_for=ready_for)
    return msgspec.structs.replace(report, readiness=ready, peer_address=ADDRESSES[report.node])


def test_last_words_of_an_evicted_node_do_not_bring_it_back(tmp_path: Path) -> None:
    """Promise: a report that arrives after its node was killed makes nobody send copies there, or count on it."""
    answer: Answer = lambda s: [holding(s.ready(node, 1), range(4), 9) for node in ADDRESSES]  # noqa: E731
    supervisor = take_over(tmp_path, answer)
    turn_until(supervisor, lambda: len(supervisor.views) == 3)
    supervisor.scheduler.kill("node1", "node1")
    turn_until(supervisor, planned(supervisor, "node0", "node2"))
    assert "node1" not in supervisor.views
    assert supervisor.generations.placement.copy_to("node0") == (ADDRESSES["node2"],)
    assert supervisor.generations.gather == (
        Gather(0, ("node0", "node2")),
        Gather(1, ("node0", "node2")),
        *supervisor.generations.gather[2:],
    )


def test_a_spare_that_is_told_to_leave_is_gone_at_once(tmp_path: Path) -> None:
    answer: Answer = lambda s: [s.ready(node, 1) for node in ADDRESSES]  # noqa: E731
    supervisor = take_over(tmp_path, answer)
    for report in answer(supervisor.socket):  # type: ignore[arg-type]
        supervisor.take(msgspec.structs.replace(report, notice="SIGTERM" if report.node == "node2" else ""))
    assert "node2" in supervisor.state.evicted
    assert "node2" not in supervisor.views


def test_where_copies_go_is_told_when_it_changes(tmp_path: Path) -> None:
    """Promise: nobody, whose reports are not answered each time, sends copies for long to one that is gone."""
    answer: Answer = lambda s: [holding(s.ready(node, 1), (), 9) for node in ADDRESSES]  # noqa: E731
    supervisor = take_over(tmp_path, answer, (), RESTARTED)
    turn_until(supervisor, planned(supervisor, "node0", "node1"))
    orders = supervisor.socket.orders  # type: ignore[attr-defined]
    supervisor.watch(time.monotonic())
    before = orders["node0"].copy_to
    orders.clear()
    supervisor.watch(time.monotonic())
    assert orders == {}, "nothing has changed"
    moved = next(report for report in answer(supervisor.socket) if report.peer_address in before)  # type: ignore[arg-type]
    supervisor.generations.placement.see(msgspec.structs.replace(moved, peer_address="h:9"))
    supervisor.watch(time.monotonic())
    assert orders["node0"].copy_to == ("h:9",)


def test_a_take_over_orders_nothing_before_it_knows_all_addresses(tmp_path: Path) -> None:
    """Promise: a supervisor that dies between a plan and its orders has no node gather from nowhere."""
    plan = {"store_host": "127.0.0.1", "store_port": 1, "ram_step": 9, "ram_generation": 1, "reason": "r"}
    gather = (Gather(2, ("node0",)), Gather(3, ("node0",)))
    later = at(
        events.GenerationPlanned, generation=2, nodes=("node0", "node2"), ranks_per_node=2, gather=gather, **plan
    )
    answer: Answer = lambda s: [holding(s.ready(node, 2), (), 9) for node in ("node2", "node0")]  # noqa: E731
    supervisor = take_over(tmp_path, answer, ("node1",), (*REPLACED, later))
    played = supervisor.socket
    assert isinstance(played, Played)
    for report in answer(played):
        supervisor.take(report)
        order = played.orders.get("node2")
        assert order is None or [sources.addresses for sources in order.gather] == [("h:1",), ("h:1",)]
    supervisor.broadcast()
    assert played.orders["node2"].plan is not None


def test_a_take_over_waits_for_no_node_that_is_gone(tmp_path: Path) -> None:
    supervisor = take_over(tmp_path, lambda s: [s.ready("node0", 1), s.ready("node1", 1)])
    turn_until(supervisor, lambda: len(supervisor.socket.orders) == 3)  # type: ignore[attr-defined]
    assert supervisor.state.evicted == ("node2",)


def test_copies_on_a_spare_that_still_looks_through_its_memory_count(tmp_path: Path) -> None:
    """Promise: a plan does not overlook the only copy of a lost node's shards, because its keeper takes a moment."""
    looks_until = time.monotonic() + 0.15

    def answer(played: Played) -> list[AgentReport]:
        target = played.target("node0", 2)
        if time.monotonic() < looks_until:
            spare = holding(played.ready("node2", 1), (), 9, ready_for=1)
        else:
            spare = holding(played.ready("node2", target), (2, 3), 9)
        members = [holding(played.ready("node0", 2), (0, 1), 9), holding(played.ready("node1", 2), (), 9)]
        return [*members, spare]

    supervisor = take_over(tmp_path, answer, (), RESTARTED)
    turn_until(supervisor, planned(supervisor, "node0", "node1"))
    assert supervisor.generations.plan is not None
    assert supervisor.generations.plan.ram_step == 9


def test_a_spare_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    def answer(played: Played) -> list[AgentReport]:
        members = [holding(played.ready(node, 2), (), 9) for node in ("node0", "node1")]
        return [*members, holding(played.ready("node2", 1), (), 9, ready_for=1)]

    supervisor = take_over(tmp_path, answer, (), RESTARTED)
    turn_until(supervisor, planned(supervisor, "node0", "node1"))
