"""Which snapshot the fleet holds whole, where each rank gets its shard, who keeps copies, and who trains first."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet import (
    AgentView,
    all_finished,
    common_snapshot,
    first_members,
    gatherings,
    place_copies,
    ready_members,
)
from cluster.messages import AgentReport, AgentStatus, Gather, HeldInfo, Readiness
from cluster.placement import Placement

Held = tuple[int, int, int] | tuple[int, int, int, str]


def view(
    node: str, held: list[Held], ready_for: int = 2, world_size: int = 4, address: str = "", domain: str = ""
) -> AgentView:
    """held: (rank, generation, step) or with a tier behind it."""
    shards = tuple(HeldInfo(rank, world_size, step, generation, *tier) for rank, generation, step, *tier in held)
    report = AgentReport(
        node=node,
        host="h",
        pid=1,
        seq=1,
        status=AgentStatus.READY,
        generation=1,
        finished_step=0,
        readiness=Readiness(ready_for, "h", 1, shards),
        beats=(),
        exits=(),
        facts=(),
        peer_address=address,
        domain=domain,
    )
    return AgentView(report, 0.0)


def test_the_newest_step_of_which_every_shard_is_held_is_taken() -> None:
    views = {
        "a": view("a", [(0, 1, 7), (0, 1, 8), (1, 1, 7)]),
        "b": view("b", [(2, 1, 7), (2, 1, 8), (3, 1, 7), (3, 1, 8)]),
    }
    assert common_snapshot(4, views) == (1, 7)


def test_a_copy_stands_in_for_a_lost_node() -> None:
    """Promise: with the lost node's shards in a peer's memory no step is lost, and the spare is told where they are."""
    views = {
        "a": view("a", [(0, 1, 7), (1, 1, 7), (2, 1, 7, "peer"), (3, 1, 7, "peer")]),
        "spare": view("spare", []),
    }
    assert common_snapshot(4, views) == (1, 7)
    assert gatherings(["a", "spare"], 2, views, (1, 7)) == (Gather(2, ("a",)), Gather(3, ("a",)))


def test_without_a_copy_a_lost_node_leaves_the_disk() -> None:
    views = {"a": view("a", [(0, 1, 7), (1, 1, 7)]), "spare": view("spare", [])}
    assert common_snapshot(4, views) == (-1, -1)


def test_the_node_itself_comes_before_memory_and_memory_before_disk() -> None:
    views = {
        "a": view("a", [(0, 1, 7), (1, 1, 7, "node"), (2, 1, 7, "node")]),
        "b": view("b", [(1, 1, 7, "peer"), (2, 1, 7, "node"), (3, 1, 7)]),
        "c": view("c", [(2, 1, 7, "peer")]),
    }
    assert gatherings(["a", "b"], 2, views, (1, 7)) == (Gather(1, ("a", "b")), Gather(2, ("b", "c", "a")))


def test_halves_of_two_histories_make_no_snapshot() -> None:
    """The same step of different generations, or under another number of ranks, is not the same snapshot."""
    a, b = [(0, 1, 7), (1, 1, 7)], [(2, 2, 7), (3, 2, 7)]
    assert common_snapshot(4, {"a": view("a", a), "b": view("b", b)}) == (-1, -1)
    b = [(2, 1, 7), (3, 1, 7)]
    assert common_snapshot(4, {"a": view("a", a), "b": view("b", b, world_size=8)}) == (-1, -1)


def test_a_later_generation_beats_a_later_step() -> None:
    """After going on from an older step, what the dead generation held of later steps is another history."""
    ages = [(1, 9), (2, 6)]
    views = {
        "a": view("a", [(r, g, s) for r in (0, 1) for g, s in ages]),
        "b": view("b", [(r, g, s) for r in (2, 3) for g, s in ages]),
    }
    assert common_snapshot(4, views) == (2, 6)
    assert common_snapshot(4, views, rejected=[(2, 6)]) == (1, 9)


@given(st.sets(st.integers(0, 20), min_size=1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_step_taken_is_held_for_every_rank(steps: set[int], missing_rank: int, dice: random.Random) -> None:
    held = {rank: {step for step in steps if rank != missing_rank or dice.random() < 0.5} for rank in range(4)}
    views: dict[str, list[Held]] = {"a": [], "b": [], "c": []}
    for rank in range(4):
        for step in held[rank]:
            views[dice.choice("abc")].append((rank, 1, step, dice.choice(["ram", "peer", "node"])))
    known = {node: view(node, shards) for node, shards in views.items()}
    common = set.intersection(*held.values())
    found = common_snapshot(4, known)
    assert found[1] == max(common, default=-1)
    if common:
        for gather in gatherings(["a", "b"], 2, known, found):
            assert gather.nodes
            for node in gather.nodes:
                assert any(s.rank == gather.rank and s.step == found[1] for s in known[node].report.readiness.held)


NODES = st.integers(2, 12).map(lambda n: [f"node{i}" for i in range(n)])


@given(NODES, st.integers(0, 3), st.integers(1, 4), st.data())
def test_copies_lie_elsewhere_and_are_spread_evenly(
    nodes: list[str], spares: int, racks: int, data: st.DataObject
) -> None:
    """Promise: never on the node itself, in other domains as long as there are any, and nobody keeps many."""
    copies = data.draw(st.integers(0, 3))
    domains = {node: f"rack{data.draw(st.integers(0, racks - 1))}" for node in nodes}
    members = nodes[: max(1, len(nodes) - spares)]
    placed = place_copies(members, nodes, domains, copies)
    for member in members:
        holders = placed[member]
        assert member not in holders
        assert len(set(holders)) == len(holders) == min(copies, len(nodes) - 1)
        others = {domains[node] for node in nodes if node != member} - {domains[member]}
        assert len({domains[h] for h in holders} - {domains[member]}) == min(len(others), len(holders))


@given(NODES, st.integers(1, 3))
def test_without_domains_everybody_keeps_as_much_as_the_next(nodes: list[str], copies: int) -> None:
    placed = place_copies(nodes, nodes, {}, copies)
    kept = [sum(node in holders for holders in placed.values()) for node in nodes]
    assert max(kept) - min(kept) <= 1


def test_orders_name_addresses_and_forget_the_dead() -> None:
    """A keeper that is gone is replaced in the next order; what it had is no longer offered."""
    views = {name: view(name, [], address=f"{name}:1") for name in ("a", "b", "c")}
    placement = Placement(1)
    for each in views.values():
        placement.see(each.report)
    placement.update(["a", "b"])
    assert (placement.copy_to("a"), placement.copy_to("b"), placement.copy_to("c")) == (("b:1",), ("c:1",), ())
    assert [placement.keep_for(node, 2) for node in ("a", "b", "c")] == [(), (0, 1), (2, 3)]
    assert placement.sources((Gather(1, ("c", "a")),), "a")[0].addresses == ("c:1",)
    placement.forget("c")
    assert placement.copy_to("b") == (), "not even before copies are placed anew"
    placement.update(["a", "b"])
    assert placement.copy_to("b") == ("a:1",)
    assert placement.sources((Gather(1, ("c", "a")),), "a")[0].addresses == ()


def test_an_answer_for_an_older_generation_is_stale() -> None:
    views = {"a": view("a", [], ready_for=2), "b": view("b", [], ready_for=1)}
    assert ready_members(["a", "b", "unheard"], views, 2) == ["a"]
    assert not all_finished(["a"], views, 1)


def test_spares_are_the_last_by_number() -> None:
    assert first_members(["node10", "node2", "node0"], 2) == ("node0", "node2")
