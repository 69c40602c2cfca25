"""What the owner of the machines says, and nodes that come while a run works.

The supervisor is the real one; its two borders are played (`tests/unit/test_takeover.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from cluster.events import AgentStarted, NodeEvicted, NodeReadmitted
from cluster.jobstate import NodeStatus
from cluster.journal import read_events
from cluster.messages import Wish
from cluster.run import _start_agents
from cluster.supervisor import Supervisor
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit.stories import verdict
from tests.unit.test_deciding import Fleet
from tests.unit.test_takeover import Machines, Played, planned, take_over, turn_until


class Owner(Machines):
    """A scheduler whose owner speaks, and has more nodes."""

    def __init__(self) -> None:
        super().__init__(set())
        self.found: list[Verdict] = []
        self.came: list[str] = []
        self.started: list[str] = []

    def start(self, node: str) -> str:
        if node == "broken":
            raise OSError("no such node")
        self.started.append(node)
        self.came.remove(node)
        return f"{node}, again"

    def appeared(self) -> tuple[str, ...]:
        return tuple(self.came)

    def verdicts(self, step: int, nodes: Collection[str]) -> Sequence[Verdict]:
        found, self.found = self.found, []
        return [each for each in found if each.node in nodes]


def owned(folder: Path, fleet: Fleet) -> tuple[Supervisor, Owner]:
    """A supervisor over such a scheduler."""
    supervisor, owner = take_over(folder, fleet), Owner()
    supervisor.scheduler = supervisor.noticing.scheduler = owner
    return supervisor, owner


def until(supervisor: Supervisor, condition: Callable[[], bool]) -> None:
    """Turn the whole loop until something holds."""

    def turned() -> bool:
        supervisor.owners.listen()
        supervisor.returning.look(time.monotonic())
        return condition()

    turn_until(supervisor, turned)


def test_a_node_that_its_owner_calls_bad_is_replaced(tmp_path: Path) -> None:
    """Promise: what a monitor outside proves counts as much as a probe's proof."""
    supervisor, owner = owned(tmp_path, Fleet())
    owner.found = [verdict(Cause.GPU_FAULT, "node1", -1, 7, Severity.NODE, certainty=Certainty.PROOF)]
    until(supervisor, planned(supervisor, "node0", "node2"))
    assert supervisor.state.evicted == ("node1",)


def test_a_notice_that_only_the_owner_gave_has_all_save_first(tmp_path: Path) -> None:
    """Promise: a node whose end is announced, though its agent hears nothing of it, loses no step."""
    supervisor, owner = owned(tmp_path, Fleet())
    until(supervisor, lambda: set(supervisor.views) == {"node0", "node1", "node2"})
    owner.found = [
        verdict(Cause.PREEMPTED, "node1", -1, 7, Severity.NODE, fingerprint="spot"),
        verdict(Cause.PREEMPTED, "node9", -1, 7, Severity.NODE, fingerprint="spot"),
    ]
    until(supervisor, lambda: supervisor.wish is Wish.SAVE_AND_LEAVE)
    assert supervisor.state.incidents == ()
    supervisor.leave_by_s = 0.0
    supervisor.try_finish(time.monotonic())
    until(supervisor, planned(supervisor, "node0", "node2"))
    (incident,) = supervisor.state.incidents
    assert (incident.verdict.cause, incident.verdict.node) == (Cause.PREEMPTED, "node1")


def test_what_is_said_of_an_evicted_node_is_not_heard(tmp_path: Path) -> None:
    supervisor, owner = owned(tmp_path, Fleet())
    proof = verdict(Cause.GPU_FAULT, "node1", -1, 7, Severity.NODE, certainty=Certainty.PROOF)
    owner.found = [proof]
    until(supervisor, planned(supervisor, "node0", "node2"))
    owner.found = [proof, msgspec.structs.replace(proof, cause=Cause.PREEMPTED)]
    until(supervisor, lambda: not owner.found)
    assert len(supervisor.state.incidents) == 1
    assert supervisor.wish is Wish.RUN


def lose(supervisor: Supervisor, owner: Owner, cause: Cause) -> None:
    """The node that has the second half of the ranks is evicted for this."""
    owner.found = [verdict(cause, "node1", -1, 7, Severity.NODE, certainty=Certainty.PROOF)]
    until(supervisor, planned(supervisor, "node0", "node2"))


def test_a_node_that_came_is_a_spare(tmp_path: Path) -> None:
    """Promise: one that takes the place of another; nobody is started who is not missing."""
    supervisor, owner = owned(tmp_path, Fleet())
    supervisor.config = msgspec.structs.replace(
        supervisor.config, cluster=msgspec.structs.replace(supervisor.config.cluster, nodes=2, spares=1)
    )
    owner.came = ["broken", "node7", "node8"]
    until(supervisor, lambda: set(supervisor.views) == {"node0", "node1", "node2"})
    assert owner.started == []
    lose(supervisor, owner, Cause.NODE_LOST)
    until(supervisor, lambda: "node7" in supervisor.handles)
    assert supervisor.state.status("node7") is NodeStatus.STARTING
    assert owner.started == ["node7"]


def test_a_lost_node_that_is_there_again_has_a_new_agent(tmp_path: Path) -> None:
    """Promise: the agent that it had before is heard no more, and one with the same pid is not taken for it."""
    fleet = Fleet()
    fleet.says["node1"]["life"] = "first"
    supervisor, owner = owned(tmp_path, fleet)
    supervisor.config = msgspec.structs.replace(
        supervisor.config, cluster=msgspec.structs.replace(supervisor.config.cluster, nodes=2, spares=1)
    )
    supervisor.state = msgspec.structs.replace(
        supervisor.state,
        nodes={**supervisor.state.nodes,
               "node1": msgspec.structs.replace(supervisor.state.nodes["node1"], life="first")},
    )  # fmt: skip
    lose(supervisor, owner, Cause.NODE_LOST)
    owner.came = ["node1"]
    until(supervisor, lambda: owner.started == ["node1"] and "node1" not in supervisor.evicted)
    written = read_events(tmp_path / "events.jsonl")
    assert [type(event) for event in written[-2:]] == [NodeReadmitted, AgentStarted]
    played: Played = supervisor.socket  # type: ignore[assignment]
    supervisor.take(msgspec.structs.replace(played.ready("node1", 2), life="first"))
    assert "node1" not in supervisor.views
    supervisor.take(msgspec.structs.replace(played.ready("node1", 2), life="second"))
    assert "node1" in supervisor.views


def test_a_node_that_was_judged_does_not_come_back_by_itself(tmp_path: Path) -> None:
    """Promise: only a person readmits what was evicted on evidence."""
    supervisor, owner = owned(tmp_path, Fleet())
    lose(supervisor, owner, Cause.GPU_FAULT)
    owner.came = ["node1"]
    left = [20]

    def done() -> bool:
        left[0] -= 1
        supervisor.returning._look_at_s = 0.0
        return left[0] < 0

    until(supervisor, done)
    assert owner.started == []


def test_what_the_run_refuses_is_not_waited_for(tmp_path: Path) -> None:
    """Promise: a scheduler whose nodes come one by one knows which of them count, and whether the run is to end."""
    supervisor = take_over(tmp_path, Fleet())
    told: list[tuple[int, bool]] = []

    class Slow(Owner):
        def node_names(
            self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
        ) -> tuple[str, ...]:
            names = ("node0", "node1", "node7")
            told.append((usable(names), stopped()))
            return names

        def start(self, node: str) -> str:
            return node

    supervisor.emit(NodeEvicted, node="node1", reason="it is bad")
    _start_agents(supervisor, supervisor.config, Slow(), [])
    supervisor.interrupts = 1
    _start_agents(supervisor, supervisor.config, Slow(), [])
    assert told == [(2, False), (2, True)]
