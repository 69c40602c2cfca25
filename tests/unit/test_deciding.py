"""From reports to decisions: one failure is one incident, whoever tells of it, when, and however often.

The supervisor is the real one; its two borders are played (`tests/unit/test_takeover.py`).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.jobstate import JobState
from cluster.messages import AgentReport, AgentStatus, NumberedVerdict, Wish, WorkerExit
from cluster.supervisor import Supervisor
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit.stories import verdict
from tests.unit.test_takeover import Played, take_over, turn_until

NODES = ("node0", "node1", "node2")


class Fleet:
    """Three agents, of which node2 is a spare, and what each adds to its reports from now on."""

    def __init__(self) -> None:
        self.says: dict[str, dict[str, object]] = {node: {} for node in NODES}

    def __call__(self, played: Played) -> list[AgentReport]:
        return [self._report(played, node) for node in NODES]

    def _report(self, played: Played, node: str) -> AgentReport:
        if node != "node2" and played.target(node, 1) == 1:
            report = msgspec.structs.replace(played.finished(node), status=AgentStatus.RUNNING)
        else:
            report = played.ready(node, 1)
        return msgspec.structs.replace(report, **self.says[node])

    def find(self, node: str, *found: Verdict, generation: int = 1) -> None:
        """The node's probes have found this."""
        numbered = tuple(NumberedVerdict(1 + i, each, 1.0, generation) for i, each in enumerate(found))
        self.says[node]["verdicts"] = numbered


def xid(number: int, gpu: int, node: str = "node0", severity: Severity = Severity.WORKERS) -> Verdict:
    cause = Cause.CUDA_ERROR if severity is Severity.WORKERS else Cause.GPU_FAULT
    return msgspec.structs.replace(
        verdict(cause, node, gpu, 7, severity, fingerprint=f"xid {number}"), device=f"gpu{gpu}"
    )


def proof(node: str, mark: str = "remap failed") -> Verdict:
    return verdict(Cause.GPU_FAULT, node, -1, 7, Severity.NODE, fingerprint=mark, certainty=Certainty.PROOF)


def save_for(supervisor: Supervisor, fleet: Fleet, node: str) -> None:
    """Let a node be told to leave, so that all ranks save."""
    fleet.says[node]["notice"] = "taken away"
    turn_until(supervisor, lambda: supervisor.wish is Wish.SAVE_AND_LEAVE)


def turn(supervisor: Supervisor, times: int = 3) -> JobState:
    """Some turns of the loop, whatever comes of them."""
    left = [times]

    def done() -> bool:
        left[0] -= 1
        return left[0] < 0

    turn_until(supervisor, done)
    return supervisor.state


def test_an_error_that_two_gpus_report_is_one_incident(tmp_path: Path) -> None:
    """Promise: what a probe says late of workers that were ended already is noted, and costs no second restart."""
    fleet = Fleet()
    supervisor = take_over(tmp_path, fleet)
    fleet.find("node0", xid(31, 0))
    turn_until(supervisor, lambda: bool(supervisor.state.incidents))
    fleet.find("node0", xid(31, 0), xid(31, 1))
    state = turn(supervisor)
    assert [each.action for each in state.incidents] == ["restart"]
    assert (state.restarts_used, state.evicted) == (1, ())


def test_what_a_probe_says_late_of_its_node_is_judged_by_its_own_generation(tmp_path: Path) -> None:
    """Promise: a hint that is told twice is never taken for one that came back after a restart."""
    fleet = Fleet()
    supervisor = take_over(tmp_path, fleet)
    first, again = (
        verdict(Cause.GPU_DEGRADED, "node0", 0, step, Severity.NODE, certainty=Certainty.HINT) for step in (7, 9)
    )
    fleet.find("node0", first)
    turn_until(supervisor, lambda: bool(supervisor.state.failures))
    supervisor.next_generation(supervisor.generations.members, "test")
    fleet.find("node0", first, again)
    turn_until(supervisor, lambda: len(supervisor.state.failures) == 2)
    assert [each.generation for each in supervisor.state.failures] == [1, 1]
    assert supervisor.state.evicted == ()


def test_what_is_found_while_all_save_is_judged_when_they_go_on(tmp_path: Path) -> None:
    """Promise: a proof against a second node is not lost because the first one is just leaving."""
    fleet = Fleet()
    supervisor = take_over(tmp_path, fleet)
    save_for(supervisor, fleet, "node0")
    fleet.find("node1", proof("node1"))
    turn(supervisor)
    assert supervisor.state.incidents == ()
    played = supervisor.socket
    assert played.orders["node1"].ack_seq < played.seq, "who takes over must be told of it too"  # type: ignore[attr-defined]
    supervisor.leave_by_s = 0.0
    supervisor.try_finish(1.0)
    turn_until(supervisor, lambda: supervisor.exit_code is not None or len(supervisor.state.incidents) == 2)
    told = [(each.verdict.cause, each.verdict.node, each.action) for each in supervisor.state.incidents]
    assert told[0] == (Cause.PREEMPTED, "node0", "replace")
    assert told[1] == (Cause.GPU_FAULT, "node1", "shrink"), "there is one spare"


def test_what_is_found_while_the_run_ends_is_remembered(tmp_path: Path) -> None:
    """Promise: a proof that comes too late to be acted on is in the journal, and so in the memory of nodes."""
    fleet = Fleet()
    supervisor = take_over(tmp_path, fleet)
    save_for(supervisor, fleet, "node0")
    fleet.find("node1", proof("node1"))
    turn(supervisor)
    supervisor.deciding.leave()
    (incident,) = supervisor.state.incidents
    assert (incident.verdict, incident.action) == (proof("node1"), "nothing")
    assert supervisor.state.evicted == ()


PEERS_LOST = WorkerExit(
    rank=0, generation=1, exit_code=1, signal_number=None, error=None, log_tail=("Connection closed by peer",),
    oom_kill=False, t_wall_s=1.0,
)  # fmt: skip
KILLED = msgspec.structs.replace(PEERS_LOST, rank=2, exit_code=None, signal_number=9, log_tail=())


def test_a_bad_spare_does_not_end_the_search_for_who_was_lost(tmp_path: Path) -> None:
    """Promise: what is said of a spare is settled at once and by itself; ranks that lost a peer wait for the culprit,
    and the bad spare takes nobody's place."""
    fleet = Fleet()
    supervisor = take_over(tmp_path, fleet)
    fleet.says["node0"]["exits"] = (PEERS_LOST,)
    turn_until(supervisor, lambda: supervisor.deciding.incident is not None)
    fleet.find("node2", proof("node2"), generation=0)
    turn_until(supervisor, lambda: supervisor.state.evicted == ("node2",))
    (about_spare,) = supervisor.state.incidents
    assert (about_spare.verdict.node, about_spare.action) == ("node2", "evict")
    assert supervisor.deciding.incident is not None
    fleet.says["node1"]["exits"] = (KILLED,)
    turn_until(supervisor, lambda: len(supervisor.state.incidents) == 2)
    culprit = supervisor.state.incidents[1]
    assert (culprit.verdict.cause, culprit.verdict.rank, culprit.action) == (Cause.WORKER_KILLED, 2, "restart")
