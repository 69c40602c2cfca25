"""Which step every rank holds whole in memory, and who trains first."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet import AgentView, all_finished, common_ram_step, first_members, ready_members
from cluster.messages import AgentReport, AgentStatus, RamShardInfo, Readiness


def view(node: str, ram: list[tuple[int, int, int]], ready_for: int = 2, world_size: int = 4) -> AgentView:
    """ram: (rank, generation, step)."""
    shards = tuple(RamShardInfo(rank, world_size, step, generation) for rank, generation, step in ram)
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
    )
    return AgentView(report, 0.0)


def test_the_newest_step_that_all_hold_is_taken() -> None:
    views = {
        "a": view("a", [(0, 1, 7), (0, 1, 8), (1, 1, 7)]),
        "b": view("b", [(2, 1, 7), (2, 1, 8), (3, 1, 7), (3, 1, 8)]),
    }
    assert common_ram_step(["a", "b"], views, 2) == 7


def test_a_node_without_memory_of_its_new_ranks_leaves_the_disk() -> None:
    views = {"a": view("a", [(0, 1, 7), (1, 1, 7)]), "spare": view("spare", [])}
    assert common_ram_step(["a", "spare"], views, 2) == -1


def test_halves_of_two_histories_make_no_snapshot() -> None:
    """The same step of different generations, or under another number of ranks, is not the same snapshot."""
    a, b = [(0, 1, 7), (1, 1, 7)], [(2, 2, 7), (3, 2, 7)]
    assert common_ram_step(["a", "b"], {"a": view("a", a), "b": view("b", b)}, 2) == -1
    b = [(2, 1, 7), (3, 1, 7)]
    assert common_ram_step(["a", "b"], {"a": view("a", a), "b": view("b", b, world_size=8)}, 2) == -1


def test_a_later_generation_beats_a_later_step() -> None:
    """After going on from an older step, what the dead generation held of later steps is another history."""
    ram = [(1, 9), (2, 6)]
    views = {
        "a": view("a", [(r, g, s) for r in (0, 1) for g, s in ram]),
        "b": view("b", [(r, g, s) for r in (2, 3) for g, s in ram]),
    }
    assert common_ram_step(["a", "b"], views, 2) == 6


@given(st.sets(st.integers(0, 20), min_size=1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_step_taken_is_held_by_every_rank(steps: set[int], missing_rank: int, dice: random.Random) -> None:
    held = {rank: {step for step in steps if rank != missing_rank or dice.random() < 0.5} for rank in range(4)}
    views = {
        node: view(node, [(rank, 1, step) for rank in ranks for step in held[rank]])
        for node, ranks in (("a", (0, 1)), ("b", (2, 3)))
    }
    found = common_ram_step(["a", "b"], views, 2)
    common = set.intersection(*held.values())
    assert found == max(common, default=-1)


def test_an_answer_for_an_older_generation_is_stale() -> None:
    views = {"a": view("a", [], ready_for=2), "b": view("b", [], ready_for=1)}
    assert ready_members(["a", "b", "unheard"], views, 2) == ["a"]
    assert not all_finished(["a"], views, 1)


def test_spares_are_the_last_by_number() -> None:
    assert first_members(["node10", "node2", "node0"], 2) == ("node0", "node2")
