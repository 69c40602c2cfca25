"""Nodes that come back while a job runs are used again, unless something is held against them.

The supervisor, where there is one, is the real one; its two borders are played as in `test_takeover`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster import events
from cluster.history import Drained, Evicted, HistoryFile, NodeId, Readmitted
from cluster.jobstate import JobState
from cluster.messages import AgentReport
from cluster.remembering import identify
from cluster.returning import Returning
from cluster.state import apply, replay
from configs.load import load_job
from health.verdict import Certainty
from tests.unit.test_resizing import LOST
from tests.unit.test_takeover import Played, at, take_over


class Machines:
    """A scheduler that starts agents, or does not."""

    def __init__(self) -> None:
        self.there: tuple[str, ...] = ()
        self.started: list[str] = []
        self.broken = False

    def start(self, node: str) -> str:
        if self.broken:
            raise OSError("no such node")
        self.started.append(node)
        return f"handle of {node}"

    def appeared(self) -> Sequence[str]:
        return self.there


class Fleet:
    """What `Returning` needs of the supervisor: two nodes and a spare, of which node1 was lost and node2 proven bad."""

    def __init__(self, folder: Path) -> None:
        self.config = load_job("demo", ["--cluster.burn_in_hours", "0"])
        self.handles = {node: node for node in ("node0", "node1", "node2")}
        self.scheduler = Machines()
        self.told: list[events.AnyEvent] = []
        self.noticing: Any = type("Noticing", (), {"expected_since": {}, "expect": lambda *_: None})()
        self.history = HistoryFile(folder / "nodes.jsonl")
        self.state = JobState()
        for node in self.handles:
            self.hear(at(events.NodeReady, node=node, host="h", pid=7, life="first"))
        for incident, (node, cause) in enumerate((("node1", "node_lost"), ("node2", "gpu_fault")), 1):
            what: Mapping[str, Any] = {"node": node, "rank": -1, "cause": cause, "severity": "node", "step": 1,
                                       "fingerprint": "f", "evidence": []}  # fmt: skip
            verdict = msgspec.convert(what, events.Verdict)
            self.hear(at(events.VerdictGiven, generation=1, verdict=verdict, t_failed_wall_s=1.0, incident=incident))
            self.hear(at(events.ActionTaken, incident=incident, action="evict", reason="r", node=node))
            self.hear(at(events.NodeEvicted, node=node, reason="r"))

    @property
    def evicted(self) -> frozenset[str]:
        return frozenset(self.state.evicted)

    def hear(self, event: events.AnyEvent) -> None:
        self.told.append(event)
        self.state = apply(self.state, event)

    def emit(self, kind: Callable[..., Any], **fields: object) -> Any:
        self.hear(at(kind, **fields))

    def looked(self, returning: Returning) -> list[str]:
        """Nodes that were started by one look."""
        before = len(self.scheduler.started)
        returning._look_at_s = 0.0
        deadline_s = time.monotonic() + 5.0
        returning.look(time.monotonic())
        while returning._asked is not None:
            assert time.monotonic() < deadline_s
            returning._look_at_s = float("inf")
            returning.look(time.monotonic())
        return self.scheduler.started[before:]


def alive(node: str, life: str) -> AgentReport:
    return msgspec.structs.replace(Played(lambda _: []).ready(node, 1), pid=7, life=life)


def person(kind: type, node: str, t_wall_s: float) -> Any:
    return kind(t_wall_s=t_wall_s, node=identify(node), reason="mended", who="a person")


def test_a_node_that_a_person_readmits_is_started_again_once(tmp_path: Path) -> None:
    """Promise: only what a person said after the eviction counts, and the agent of before is nobody's any more."""
    fleet = Fleet(tmp_path)
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    assert fleet.looked(returning) == []
    fleet.history.append([person(Readmitted, "node1", 0.5)])
    assert fleet.looked(returning) == []
    fleet.history.append([person(Readmitted, "node1", 2.0), person(Readmitted, "node2", 2.0)])
    assert fleet.looked(returning) == ["node1", "node2"]
    assert fleet.looked(returning) == []
    assert fleet.evicted == frozenset()
    assert fleet.handles["node1"] == "handle of node1"
    assert [type(event).__name__ for event in fleet.told[-4:]] == ["NodeReadmitted", "AgentStarted"] * 2
    for node, life, former in (("node1", "first", True), ("node1", "second", False), ("node0", "first", False)):
        assert returning.is_former(alive(node, life)) == former
    returning.close(5.0)


def test_the_agent_of_before_is_told_to_leave(tmp_path: Path) -> None:
    """Promise: by a supervisor that took over since, too. It has its successor's name, in a container its pid as well,
    and is heard no more."""
    first, second = (msgspec.structs.replace(alive("node1", life), pid=1) for life in ("first", "second"))
    ready = at(events.NodeReady, node="node1", host="h", pid=1, life="first")
    later = (ready, LOST[1], LOST[2], at(events.NodeReadmitted, node="node1", reason="r"),
             at(events.AgentStarted, node="node1", handle="again"))  # fmt: skip
    supervisor = take_over(tmp_path, lambda _: [], (), later)
    supervisor.take(first)
    assert supervisor.socket.dismissed == ["node1"]  # type: ignore[attr-defined]
    assert "node1" not in supervisor.views
    supervisor.take(second)
    assert supervisor.views["node1"].report.life == "second"


def test_a_node_that_its_owner_has_again_is_started_if_nothing_is_held_against_it(tmp_path: Path) -> None:
    """Promise: what was evicted as bad waits for a person; a new node fills the place of one that is gone."""
    fleet = Fleet(tmp_path)
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.scheduler.there = ("node0", "node1", "node2", "node7", "node8")
    assert fleet.looked(returning) == ["node1", "node7"], "no more than nodes and spares"
    returning.close(5.0)


def test_a_node_that_the_history_leaves_out_or_that_does_not_start_is_not_used(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.history.append([person(Drained, "node7", 2.0)])
    fleet.scheduler.there = ("node7",)
    assert fleet.looked(returning) == []
    fleet.scheduler.there, fleet.scheduler.broken = ("node8",), True
    assert fleet.looked(returning) == []
    assert "node8" not in fleet.handles
    fleet.scheduler.broken = False
    assert fleet.looked(returning) == [], "it is not asked for again at once"
    returning.close(5.0)


def test_what_was_evicted_as_bad_stays_so_after_a_persons_turn(tmp_path: Path) -> None:
    """Promise: an end that asks for a person clears failures, not what a node was evicted for; readmitting does."""
    fleet = Fleet(tmp_path)
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.hear(at(events.RunStopped, exit_code=1, reason="r", last_step=1))
    fleet.hear(at(events.RunStarted, run="x", attempt=2, supervisor_pid=1, target_steps=60))
    fleet.handles = {"node0": "node0"}
    fleet.scheduler.there = ("node1", "node2")
    assert fleet.looked(returning) == ["node1"]
    fleet.hear(at(events.NodeReadmitted, node="node2", reason="r"))
    assert fleet.state.status("node2") is None
    returning.close(5.0)


def test_when_a_node_was_evicted_is_known_from_the_decision_on(tmp_path: Path) -> None:
    """Promise: a word from before does not bring it back, even if the supervisor died between the two."""
    fleet = Fleet(tmp_path)
    decided = [event for event in fleet.told if not isinstance(event, events.NodeEvicted)]
    fleet.state = replay(decided)
    fleet.history.append([person(Readmitted, "node1", 0.5)])
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    assert fleet.looked(returning) == []
    returning.close(5.0)


def test_an_end_does_not_wait_for_an_agent_that_takes_long(tmp_path: Path) -> None:
    fleet, answered = Fleet(tmp_path), threading.Event()
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.scheduler.there = ("node7",)
    fleet.scheduler.start = lambda node: str(answered.wait(30.0))  # type: ignore[method-assign]
    returning.look(time.monotonic())
    began_s = time.monotonic()
    returning.close(0.1)
    assert time.monotonic() - began_s < 5.0
    assert "node7" not in fleet.handles
    answered.set()


def test_probation_ends_while_the_job_runs(tmp_path: Path) -> None:
    """Promise: a spare that has served its time may hold ranks again without a new run."""
    fleet = Fleet(tmp_path)
    evicted = Evicted(
        t_wall_s=time.time(), run="r", node=NodeId(identify("node0").host, "node0"), incident=1,
        certainty=Certainty.LIKELY, gone=True, reason="r",
    )  # fmt: skip
    fleet.history.append([evicted])
    fleet.hear(at(
        events.NodeRemembered, node="node0", place=events.Place.SPARE, reason="r", failures=1.0, node_days=0.0,
        failures_per_day=1.0,
    ))  # fmt: skip
    assert fleet.state.doubtful == {"node0"}
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.looked(returning)
    assert fleet.state.doubtful == frozenset(), "cluster.burn_in_hours = 0"
    returning.close(5.0)


def test_who_was_started_while_the_run_ended_is_ended_too(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    returning = Returning(fleet, fleet.history.path)  # type: ignore[arg-type]
    fleet.scheduler.there = ("node7",)
    returning.look(time.monotonic())
    returning.close(5.0)
    assert fleet.handles["node7"] == "handle of node7"
