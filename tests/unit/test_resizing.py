"""A supervisor whose job changes its size: what only nodes hold is saved first, and no fault on the way leads astray.

The supervisor is the real one; its two borders are played as in `test_takeover`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster import events
from cluster.actions import Decision, Evict, Replace
from cluster.fleet import AgentView
from cluster.jobstate import JobState
from cluster.messages import AgentReport, AgentStatus, HeldInfo, NumberedFact, Order, Rescue, Wish
from cluster.planning import make_plan
from cluster.rescuing import Rescuing, newest_whole, share_out
from cluster.state import replay
from cluster.supervisor import Supervisor
from cluster.tiers import NodeTiers
from health.verdict import Cause
from tests.unit.stories import verdict
from tests.unit.test_takeover import Answer, Played, at, planned, take_over, turn_until
from trainer.events import Fact, FactKind

LOST = (
    at(events.NodeEvicted, node="node2", reason="r"),
    at(events.ActionTaken, incident=1, action="shrink", reason="r", node="node1", order=("node0",)),
    at(events.NodeEvicted, node="node1", reason="r"),
)


def holding(report: AgentReport, shards: Sequence[HeldInfo], facts: Sequence[Fact] = ()) -> AgentReport:
    assert report.readiness is not None
    ready = msgspec.structs.replace(report.readiness, held=tuple(shards))
    numbered = tuple(NumberedFact(number, fact) for number, fact in enumerate(facts, 1))
    return msgspec.structs.replace(report, readiness=ready, facts=numbered)


def shards(step: int, ranks: Sequence[int] = range(4), world_size: int = 4, generation: int = 1) -> list[HeldInfo]:
    return [HeldInfo(rank, world_size, step, generation, "ram") for rank in ranks]


def said(kind: FactKind, step: int) -> Fact:
    return Fact(kind=kind, node="node0", rank=0, generation=1, step=step, t_wall_s=1.0, detail="said so")


def view(*held: HeldInfo) -> AgentView:
    report = holding(Played(lambda _: []).ready("node0", 1), held)
    return AgentView(report, 0.0)


# What only nodes hold ----------------------------------------------------------------------------------------------


def test_the_newest_snapshot_of_any_layout_is_found_and_each_shard_written_once() -> None:
    views = {
        "a": view(*shards(9, (0, 1)), *shards(7), *shards(11, (0, 1))),
        "b": view(*shards(9, (2, 3)), *shards(9, (0, 1)), *shards(8, (0, 1), 2, 2)),
    }
    whole = newest_whole(views)
    assert whole is not None
    assert (whole.generation, whole.step, whole.world_size) == (2, 8, 2), "a later generation is newer"
    whole = newest_whole(views, {(2, 8)})
    assert whole is not None
    assert (whole.generation, whole.step, whole.world_size) == (1, 9, 4)
    assert share_out(whole) == {"a": Rescue(1, 9, (0, 1)), "b": Rescue(1, 9, (2, 3))}
    assert newest_whole({"a": view(*shards(9, (0, 1, 2)))}) is None
    copies = [msgspec.structs.replace(shard, tier="peer") for shard in shards(9)]
    whole = newest_whole({"a": view(*copies), "b": view(*shards(9))})
    assert whole is not None
    assert share_out(whole) == {"b": Rescue(1, 9, (0, 1, 2, 3))}, "it may be writing them anyway"


def test_a_job_that_shrinks_first_saves_what_only_memory_holds(tmp_path: Path) -> None:
    """Promise: the plan waits until the run directory has the old layout's newest snapshot, and all load from there."""
    facts: list[Fact] = []
    answer: Answer = lambda s: [holding(s.ready("node0", 2), shards(9), facts)]  # noqa: E731
    supervisor = take_over(tmp_path, answer, ("node1", "node2"), LOST)
    turn_until(supervisor, lambda: order_of(supervisor).rescue is not None)
    wanted = order_of(supervisor).rescue
    assert wanted == Rescue(1, 9, (0, 1, 2, 3), wanted.number)
    assert supervisor.generations.plan is None
    facts.append(said(FactKind.SNAPSHOT_COMMITTED, 9))
    turn_until(supervisor, planned(supervisor, "node0"))
    plan = supervisor.generations.plan
    assert plan is not None
    assert plan.layout is not None
    assert (plan.ram_step, plan.layout.tp, plan.layout.dp_shard, plan.layout.nodes) == (-1, 2, 1, 1)
    assert supervisor.state.layout == plan.layout
    assert order_of(supervisor).rescue is None


@pytest.mark.parametrize("how", ["a disk that refuses", "too long", "nothing newer"])
def test_a_rescue_that_cannot_be_is_not_waited_for(how: str, tmp_path: Path) -> None:
    """Promise: the job then goes on from what the run directory has."""
    facts = [said(FactKind.SNAPSHOT_COMMITTED, 9)] if how == "nothing newer" else []
    answer: Answer = lambda s: [holding(s.ready("node0", 2), shards(9), facts)]  # noqa: E731
    supervisor = take_over(tmp_path, answer, ("node1", "node2"), LOST)
    supervisor.rescuing.timeout_s = 0.2 if how == "too long" else 60.0
    if how != "nothing newer":
        turn_until(supervisor, lambda: order_of(supervisor).rescue is not None)
    facts += [said(FactKind.SNAPSHOT_FAILED, 9)] if how == "a disk that refuses" else []
    turn_until(supervisor, planned(supervisor, "node0"))
    assert order_of(supervisor).rescue is None


def rescuing(views: dict[str, AgentView]) -> Rescuing:
    """A job of two ranks, in generation 2, waits for what four ranks made."""
    found = Rescuing(60.0)
    assert found.waits(2, 2, views, JobState(), 0.0, nobody)
    return found


def nobody() -> None:
    """Orders go to nobody."""


def test_where_a_writer_goes_others_that_hold_its_shards_take_over(tmp_path: Path) -> None:
    """Promise: a rescue is given up only when the snapshot is not whole any more."""
    views = {"a": view(*shards(9)), "b": view(*shards(9))}
    found = rescuing(views)
    assert found.order_of("b") is not None
    del views["b"]
    assert found.waits(2, 2, views, JobState(), 1.0, nobody)
    wanted = found.order_of("a")
    assert wanted is not None
    assert wanted.ranks == (0, 1, 2, 3)
    del views["a"]
    assert not found.waits(2, 2, views, JobState(), 2.0, nobody)


def test_only_who_was_asked_can_fail_at_a_rescue(tmp_path: Path) -> None:
    views = {"a": view(*shards(9, (0, 1))), "b": view(*shards(9, (2, 3)))}
    found, failed = rescuing(views), said(FactKind.SNAPSHOT_FAILED, 9)
    for node, rank in (("c", 0), ("a", 2), ("b", -1)):
        found.hear(msgspec.structs.replace(failed, node=node, rank=rank))
    assert found.waits(2, 2, views, JobState(), 1.0, nobody)
    found.hear(msgspec.structs.replace(failed, node="a", rank=-1))
    assert not found.waits(2, 2, views, JobState(), 1.0, nobody)


def test_each_rescue_is_asked_for_anew(tmp_path: Path) -> None:
    """Promise: agents, to whom equal orders count once, try again for the next supervisor."""
    views = {"a": view(*shards(9))}
    assert rescuing(views).order_of("a") != rescuing(views).order_of("a")


def test_a_later_step_of_an_older_history_is_not_newer() -> None:
    """Promise: after growing back, what was left on disks does not beat what the smaller job saved."""
    facts = [msgspec.structs.replace(said(FactKind.SNAPSHOT_COMMITTED, 58), generation=2)]
    state = replay([at(events.WorkersReported, fact=fact) for fact in facts])
    views = {"node0": view(*shards(60))}
    plan, _ = make_plan(3, ["node0"], 4, views, state)
    assert (plan.ram_generation, plan.ram_step) == (-1, -1)
    views = {"node0": view(*shards(59, generation=2))}
    plan, _ = make_plan(3, ["node0"], 4, views, state)
    assert (plan.ram_generation, plan.ram_step) == (2, 59)


class Written:
    """What tiers ask of the store for a rescue."""

    def __init__(self) -> None:
        self.followed, self.dropped, self.rescued = 0, 0, list[object]()

    def follow(self, generation: int) -> None:
        self.followed = generation

    def drop_rescues(self) -> None:
        self.dropped += 1

    def rescue(self, shard: object) -> None:
        self.rescued.append(shard)


def test_a_rescue_is_carried_out_once_and_ends_with_the_wish_for_it() -> None:
    """Promise: in a new attempt the fence keeps no rescue out, and one that was given up does not go on."""
    tiers, store = NodeTiers.__new__(NodeTiers), Written()
    tiers._rescued, tiers.store, tiers.find = None, store, lambda ref: ref  # type: ignore[assignment, method-assign, return-value]
    wanted = Order(ack_seq=0, wish=Wish.RUN, target_generation=5, plan=None, rescue=Rescue(4, 9, (0, 1), 1))
    for _ in range(2):
        tiers._rescue(wanted)
    assert (store.followed, len(store.rescued)) == (4, 2)
    before = store.dropped
    tiers._rescue(msgspec.structs.replace(wanted, rescue=None))
    assert store.dropped == before + 1


def order_of(supervisor: Supervisor, node: str = "node0") -> Any:
    return supervisor.socket.orders.get(node, Nothing)  # type: ignore[attr-defined]


class Nothing:
    """No order yet."""

    rescue = None


def running(played: Played, node: str) -> AgentReport:
    """Its workers of generation 1 have not ended yet."""
    return msgspec.structs.replace(played.finished(node), status=AgentStatus.RUNNING)


def test_a_node_that_a_shrink_leaves_without_ranks_is_waited_for(tmp_path: Path) -> None:
    """Promise: what it holds, of itself and of others, is part of the newest snapshot, and is not given up for want of
    patience: the plan waits until it has looked through it, and then for the rescue."""
    stopped: list[str] = []

    def answer(played: Played) -> list[AgentReport]:
        mine = holding(played.ready("node0", 2), shards(9, (0, 1)))
        if not stopped:
            return [mine, running(played, "node1")]
        return [mine, holding(played.ready("node1", 2), shards(9, (2, 3)))]

    shrunk = at(events.ActionTaken, incident=1, action="shrink", reason="r", node="node2", order=("node0",))
    supervisor = take_over(tmp_path, answer, ("node2",), (shrunk, at(events.NodeEvicted, node="node2", reason="r")))
    turn_for(supervisor, 2 * supervisor.config.health.heartbeat_timeout_s)
    assert supervisor.generations.plan is None
    stopped.append("node1")
    turn_until(supervisor, lambda: order_of(supervisor, "node1").rescue is not None)


def turn_for(supervisor: Supervisor, for_s: float) -> None:
    until_s = time.monotonic() + for_s
    turn_until(supervisor, lambda: time.monotonic() >= until_s)


# Growing -----------------------------------------------------------------------------------------------------------

SMALL = (
    *LOST,
    at(
        events.GenerationPlanned, generation=2, nodes=("node0",), ranks_per_node=2, store_host="127.0.0.1",
        store_port=1, ram_step=-1, reason="r",
    ),
    at(events.NodeReadmitted, node="node2", reason="r"),
    at(events.AgentStarted, node="node2", handle="again"),
    at(events.NodeReady, node="node2", host="h", pid=2),
)  # fmt: skip
GROWING = (*SMALL, at(events.ActionTaken, incident=0, action="grow", reason="r", order=("node0", "node2")))


def finished_or_ready(played: Played) -> list[AgentReport]:
    """Workers have left node0; each node gets ready for what is wanted of it."""
    target = played.target("node0", 2)
    done = msgspec.structs.replace(played.finished("node0"), generation=2, finished_step=30)
    again = msgspec.structs.replace(played.ready("node2", target), life="again")
    return [done if target == 2 else played.ready("node0", target), again]


def test_a_growth_that_was_decided_is_carried_out_by_the_next_supervisor(tmp_path: Path) -> None:
    """Promise: one that dies while all save leaves the growth to its successor, with everybody's state saved first."""
    supervisor = take_over(tmp_path, finished_or_ready, ("node1",), GROWING)
    assert supervisor.wish is Wish.SAVE_AND_LEAVE
    turn_with_end(supervisor, planned(supervisor, "node0", "node2"))
    assert supervisor.state.growing == ()
    assert supervisor.generations.plan is not None
    assert supervisor.generations.plan.layout is None


def test_a_node_that_is_gone_by_then_is_not_grown_onto(tmp_path: Path) -> None:
    supervisor = take_over(
        tmp_path,
        lambda s: finished_or_ready(s)[:1],
        ("node1",),
        (*GROWING, at(events.NodeEvicted, node="node2", reason="r")),
    )
    turn_with_end(supervisor, lambda: supervisor.state.generation == 3)
    assert supervisor.state.order == ("node0",)
    assert supervisor.exit_code is None


BIG = (
    *SMALL,
    *(at(events.AgentStarted, node=node, handle=node) for node in ("node3", "node4")),
    *(at(events.NodeReady, node=node, host="h", pid=2) for node in ("node3", "node4")),
    at(
        events.GenerationPlanned, generation=2, nodes=("node2", "node0"), ranks_per_node=2, store_host="127.0.0.1",
        store_port=1, ram_step=-1, reason="r",
    ),
    at(events.ActionTaken, incident=0, action="grow", reason="r", order=("node2", "node0", "node3", "node4")),
)  # fmt: skip


def saved(folder: Path) -> Supervisor:
    """All have saved, and the job is about to grow from two nodes to four; nobody is ready for the plan yet."""
    supervisor = take_over(folder, lambda _: [], (), BIG)
    supervisor.handing_over.over()
    supervisor.generations.begin(supervisor.state.growing, "the job grows", 0.0)
    return supervisor


def test_a_node_lost_between_saving_and_the_larger_plan_is_replaced_once(tmp_path: Path) -> None:
    """Promise: no plan names a node twice, whoever the spare is that the growth had in mind for other ranks."""
    supervisor = saved(tmp_path)
    decision = Decision(Replace("node0", "node3", "r"))
    supervisor.carry_out(decision, verdict(Cause.NODE_LOST, "node0"), supervisor.state.next_incident)
    assert supervisor.generations.members == ("node2", "node3")


def test_a_new_node_lost_between_saving_and_the_larger_plan_leaves_all_as_they_were(tmp_path: Path) -> None:
    supervisor = saved(tmp_path)
    decision = Decision(Evict("node3", "r"))
    supervisor.carry_out(decision, verdict(Cause.NODE_LOST, "node3"), supervisor.state.next_incident)
    assert supervisor.generations.members == ("node2", "node0")


def leaving(node: str, notice: str = "maintenance") -> AgentReport:
    return msgspec.structs.replace(Played(lambda _: []).ready(node, 1), notice=notice, life="again")


def test_a_node_that_must_go_is_not_grown_onto(tmp_path: Path) -> None:
    """Promise: it would have to be left again at once; whether it says so after all have saved, or had ranks before."""
    supervisor = saved(tmp_path)
    supervisor.take(leaving("node3"))
    assert supervisor.generations.members == ("node2", "node0")
    assert "node3" in supervisor.evicted


def test_a_node_that_must_go_while_all_save_to_grow_is_given_up(tmp_path: Path) -> None:
    """Promise: one save is enough; its ranks go to one of those that the job was to grow onto."""
    supervisor = take_over(tmp_path, lambda _: [], (), BIG)
    assert supervisor.wish is Wish.SAVE_AND_LEAVE
    until_s = supervisor.leave_by_s
    supervisor.take(leaving("node0"))
    assert (supervisor.handing_over.node, supervisor.leave_by_s) == ("node0", until_s)
    supervisor.handing_over.over()
    assert supervisor.generations.members == ("node2", "node3")


def test_a_spare_that_must_go_first_writes_what_it_alone_holds(tmp_path: Path) -> None:
    supervisor = saved(tmp_path)
    supervisor.rescuing._orders = {"node4": Rescue(1, 9, (0,))}
    supervisor.take(leaving("node4"))
    assert "node4" not in supervisor.evicted
    supervisor.rescuing._orders = {}
    supervisor.take(leaving("node4"))
    assert "node4" in supervisor.evicted


def test_a_run_that_an_older_version_began_tells_of_its_first_shrink() -> None:
    """Promise: its first plan says how many nodes it wants, where its start does not."""
    whole = at(
        events.GenerationPlanned, generation=1, nodes=("node0", "node1"), ranks_per_node=2, store_host="h",
        store_port=1, ram_step=-1, reason="r",
    )  # fmt: skip
    begun = at(events.RunStarted, run="x", attempt=1, supervisor_pid=1, target_steps=60)
    state = replay([begun, whole, *SMALL])
    assert state.wanted_nodes == 2
    assert [each.nodes for each in state.resizes] == [1]


def turn_with_end(supervisor: Supervisor, condition: Callable[[], bool]) -> None:
    """As `turn_until`, and ends of generations are seen to."""
    deadline_s = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline_s
        assert supervisor.exit_code is None, supervisor.stop_reason
        for report in supervisor.socket.receive(0.0):
            supervisor.take(report)
        supervisor.try_plan()
        supervisor.try_finish(time.monotonic())
