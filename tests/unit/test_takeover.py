"""A supervisor that takes over: whatever happened while nobody watched is noticed, and nobody is waited for in vain.

The supervisor is the real one; the scheduler and the socket, its two borders, are played.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from cluster import events
from cluster.journal import Journal, read_events
from cluster.messages import AgentReport, AgentStatus, NumberedVerdict, Order, Readiness, Wish, WorkerExit
from cluster.run import _adopt
from cluster.rundir import RunDir
from cluster.state import replay
from cluster.supervisor import Supervisor
from configs.load import load_job
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit.stories import verdict
from trainer.events import Fact, FactKind

BRIEF = ("--health.heartbeat_interval_s", "0.05", "--health.heartbeat_timeout_s", "0.3", "--health.hang_floor_s", "5")
Answer = Callable[["Played"], list[AgentReport]]


class Machines:
    """A scheduler of which some agents are gone."""

    def __init__(self, gone: set[str]) -> None:
        self.gone = gone
        self.blamed: list[str] = []

    def start(self, node: str) -> str:
        raise AssertionError("a take-over starts nobody")

    def alive(self, handle: str) -> bool:
        return handle not in self.gone

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        self.gone.add(handle)

    def report_bad(self, node: str, reason: str) -> None:
        self.blamed.append(reason)

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> tuple[str, ...]:
        return ()

    def appeared(self) -> tuple[str, ...]:
        return ()

    def verdicts(self, step: int, nodes: Collection[str]) -> tuple[()]:
        return ()

    def last_words(self, node: str) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        """Nothing is held."""


class Played:
    """The socket: agents answer what they were last told."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.orders: dict[str, Order] = {}
        self.seq = 0
        self.dismissed: list[str] = []

    def receive(self, timeout_s: float) -> Iterator[AgentReport]:
        self.seq += 1
        yield from self.answer(self)

    def send(self, node: str, order: Order) -> None:
        self.orders[node] = order

    def dismiss(self, node: str, order: Order) -> None:
        self.dismissed.append(node)

    def target(self, node: str, at_least: int) -> int:
        return max(at_least, self.orders[node].target_generation if node in self.orders else 0)

    def ready(self, node: str, at_least: int, exits: tuple[WorkerExit, ...] = ()) -> AgentReport:
        ready = Readiness(self.target(node, at_least), "127.0.0.1", 1, ())
        return self._report(node, AgentStatus.READY, 1 if node != "node2" else 0, ready, exits)

    def finished(self, node: str) -> AgentReport:
        return self._report(node, AgentStatus.FINISHED, 1, None, ())

    def _report(
        self, node: str, status: AgentStatus, generation: int, ready: Readiness | None, exits: tuple[WorkerExit, ...]
    ) -> AgentReport:
        return AgentReport(
            node=node,
            host="127.0.0.1",
            pid=1,
            seq=self.seq,
            status=status,
            generation=generation,
            finished_step=60,
            readiness=ready,
            beats=(),
            exits=exits,
            facts=(),
        )


class Deaf:
    """Nobody watches."""

    def open(self) -> None: ...

    def on_event(self, event: events.AnyEvent) -> None: ...

    def on_tick(self) -> None: ...


def at(kind: Callable[..., events.AnyEvent], **fields: object) -> events.AnyEvent:
    return kind(t_wall_s=1.0, t_mono_s=1.0, **fields)


def take_over(
    folder: Path, answer: Answer, gone: tuple[str, ...] = (), later: tuple[events.AnyEvent, ...] = ()
) -> Supervisor:
    """A supervisor after the death of one that had planned generation 1 on node0 and node1, node2 to spare."""
    journal = Journal(folder / "events.jsonl")
    journal.append(at(events.RunStarted, run="x", attempt=1, supervisor_pid=1, target_steps=60))
    for node in ("node0", "node1", "node2"):
        journal.append(at(events.AgentStarted, node=node, handle=node))
        journal.append(at(events.NodeReady, node=node, host="h", pid=1))
    plan = {"store_host": "127.0.0.1", "store_port": 1, "ram_step": -1, "reason": "start"}
    journal.append(at(events.GenerationPlanned, generation=1, nodes=("node0", "node1"), ranks_per_node=2, **plan))
    for event in later:
        journal.append(event)
    state = replay(read_events(journal.path))
    handles = {name: node.handle for name, node in state.nodes.items() if name not in state.evicted}
    supervisor = Supervisor(
        load_job("demo", BRIEF), RunDir(folder), Machines(set(gone)), Played(answer), journal, state, handles, Deaf()
    )  # type: ignore[arg-type]
    _adopt(supervisor, state, RunDir(folder))
    return supervisor


def turn_until(supervisor: Supervisor, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Turn the supervisor's loop until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, (
            f"it waits: plan {supervisor.generations.plan}, incident {supervisor.deciding.incident}"
        )
        assert supervisor.exit_code is None, supervisor.stop_reason
        for report in supervisor.socket.receive(0.0):
            supervisor.take(report)
        now = time.monotonic()
        supervisor.watch(now)
        supervisor.deciding.act(now)
        supervisor.try_plan()
        time.sleep(0.01)


def planned(supervisor: Supervisor, *nodes: str) -> Callable[[], bool]:
    return lambda: (
        supervisor.generations.plan is not None
        and supervisor.generations.plan.generation > 1
        and supervisor.generations.plan.nodes == nodes
    )


PEER_LOST = WorkerExit(
    rank=0, generation=1, exit_code=1, signal_number=None, error=None, log_tail=("Connection closed by peer",),
    oom_kill=False, t_wall_s=1.0,
)  # fmt: skip
REPLACED = (
    at(events.ActionTaken, incident=1, action="replace", reason="r", node="node1", spare="node2"),
    at(events.NodeEvicted, node="node1", reason="r"),
)
RESTARTED = (at(events.ActionTaken, incident=1, action="restart", reason="r", node="node1"),)


def test_a_node_that_died_meanwhile_is_replaced(tmp_path: Path) -> None:
    supervisor = take_over(tmp_path, lambda s: [s.ready("node0", 1, (PEER_LOST,)), s.ready("node2", 1)], ("node1",))
    turn_until(supervisor, planned(supervisor, "node0", "node2"))


def test_a_node_that_is_silent_since_is_replaced(tmp_path: Path) -> None:
    """Its process exists, so only its missing heartbeat tells; it never spoke to this supervisor."""
    supervisor = take_over(tmp_path, lambda s: [s.ready("node0", 1), s.ready("node2", 1)])
    turn_until(supervisor, planned(supervisor, "node0", "node2"))


def test_a_dead_spare_takes_nobodys_place(tmp_path: Path) -> None:
    """Promise: it is an incident of its own, for people and for the memory of nodes, and disturbs nobody."""
    supervisor = take_over(tmp_path, lambda s: [s.ready("node0", 1), s.ready("node1", 1)], ("node2",))
    turn_until(supervisor, lambda: "node2" in supervisor.state.evicted)
    assert supervisor.generations.members == ("node0", "node1")
    (incident,) = supervisor.state.incidents
    assert (incident.verdict.cause, incident.verdict.node, incident.action) == (Cause.NODE_LOST, "node2", "evict")
    assert (supervisor.state.restarts_used, supervisor.generations.number) == (0, 1)


def test_a_replacement_that_was_decided_is_carried_out(tmp_path: Path) -> None:
    """The journal ends between the action and the plan: the evicted node is not waited for."""
    answer: Answer = lambda s: [s.ready("node0", 2), s.ready("node2", 2)]  # noqa: E731
    supervisor = take_over(tmp_path, answer, ("node1",), REPLACED)
    turn_until(supervisor, planned(supervisor, "node0", "node2"))


def test_a_restart_that_was_decided_is_carried_out(tmp_path: Path) -> None:
    answer: Answer = lambda s: [s.ready(node, 2) for node in ("node0", "node1", "node2")]  # noqa: E731
    supervisor = take_over(tmp_path, answer, (), RESTARTED)
    turn_until(supervisor, planned(supervisor, "node0", "node1"))
    assert len(supervisor.state.incidents) == 0


def test_agents_that_heard_of_a_newer_generation_are_caught_up_with(tmp_path: Path) -> None:
    answer: Answer = lambda s: [s.ready(node, 5) for node in ("node0", "node1", "node2")]  # noqa: E731
    supervisor = take_over(tmp_path, answer, (), RESTARTED)
    turn_until(supervisor, planned(supervisor, "node0", "node1"))
    assert supervisor.generations.number == 5
    assert supervisor.state.evicted == ()


def test_an_old_generation_does_not_time_out_for_being_old(tmp_path: Path) -> None:
    """An open incident is no reason to look for nodes that are missing."""
    supervisor = take_over(tmp_path, lambda s: [s.ready(n, 1, (PEER_LOST,)) for n in ("node0", "node1", "node2")])
    supervisor.gathering_since_s = float("-inf")
    for report in supervisor.socket.receive(0.0):
        supervisor.take(report)
    assert supervisor.deciding.incident is not None
    supervisor.watch(time.monotonic())
    assert {verdict.cause.value for verdict in supervisor.deciding.incident.verdicts} == {"peer_lost"}


def test_a_node_that_was_given_up_and_comes_back_is_told_to_leave(tmp_path: Path) -> None:
    """Promise: a healed partition brings nobody back with an old generation, whoever is the supervisor by then."""
    old: Answer = lambda s: [s.finished("node1"), s.ready("node0", 2), s.ready("node2", 2)]  # noqa: E731
    supervisor = take_over(tmp_path, old, (), REPLACED)
    turn_until(supervisor, planned(supervisor, "node0", "node2"))
    order = supervisor.socket.orders["node1"]  # type: ignore[attr-defined]
    assert order.wish is Wish.SHUT_DOWN
    assert "node1" not in supervisor.views
    assert supervisor.state.incidents == ()

    supervisor.handles["node1"] = "node1"  # one that evicted it itself
    supervisor.socket.orders.clear()  # type: ignore[attr-defined]
    turn_until(supervisor, lambda: "node1" in supervisor.socket.orders)  # type: ignore[attr-defined]
    assert supervisor.socket.orders["node1"].wish is Wish.SHUT_DOWN  # type: ignore[attr-defined]
    assert "node1" not in supervisor.views


def faulty(certainty: Certainty) -> Verdict:
    cause = Cause.GPU_DEGRADED if certainty is Certainty.HINT else Cause.GPU_FAULT
    return verdict(cause, "node1", -1, 7, Severity.NODE, certainty=certainty)


def given(certainty: Certainty) -> events.AnyEvent:
    return at(events.VerdictGiven, generation=1, verdict=faulty(certainty), t_failed_wall_s=1.0, incident=1)


def test_a_verdict_on_which_nothing_was_decided_is_decided_on(tmp_path: Path) -> None:
    """Promise: a supervisor that dies between its verdict and its action leaves both to the next one."""
    answer: Answer = lambda s: [s.ready(node, 1) for node in ("node0", "node1", "node2")]  # noqa: E731
    supervisor = take_over(tmp_path, answer, (), (given(Certainty.PROOF),))
    turn_until(supervisor, planned(supervisor, "node0", "node2"))
    (incident,) = supervisor.state.incidents
    assert (incident.action, supervisor.state.evicted) == ("replace", ("node1",))
    assert (tmp_path / "incidents" / "1" / "verdict.json").exists()


def test_corruption_that_was_only_written_down_is_judged(tmp_path: Path) -> None:
    """Promise: a fact that accuses a node is not lost with the supervisor that read it."""
    fact = Fact(
        kind=FactKind.CORRUPTION_FOUND, node="node1", rank=2, generation=1, step=7, t_wall_s=1.0, detail="sums differ",
        blamed=2,
    )  # fmt: skip
    answer: Answer = lambda s: [s.ready(node, 1) for node in ("node0", "node1", "node2")]  # noqa: E731
    supervisor = take_over(tmp_path, answer, (), (at(events.WorkersReported, fact=fact),))
    turn_until(supervisor, planned(supervisor, "node0", "node2"))
    assert [each.verdict.cause for each in supervisor.state.incidents] == [Cause.SILENT_CORRUPTION]


def test_what_was_judged_and_is_told_again_is_not_judged_again(tmp_path: Path) -> None:
    """Promise: an agent that never heard that its verdict had arrived accuses nobody twice by telling it once more."""
    answer: Answer = lambda s: [s.ready(node, 1) for node in ("node0", "node2")]  # noqa: E731
    nothing = at(events.ActionTaken, incident=1, action="nothing", reason="r", node="node1")
    supervisor = take_over(tmp_path, answer, (), (given(Certainty.HINT), nothing))
    told = NumberedVerdict(1, faulty(Certainty.HINT), 1.0, 1)
    report = msgspec.structs.replace(supervisor.socket.ready("node1", 1), verdicts=(told,))  # type: ignore[attr-defined]
    supervisor.take(report)
    supervisor.deciding.act(time.monotonic())
    assert len(supervisor.state.failures) == 1
    again = msgspec.structs.replace(report, verdicts=(told, msgspec.structs.replace(told, number=2)))
    supervisor.take(again)
    supervisor.deciding.act(time.monotonic())
    assert len(supervisor.state.failures) == 2, "a later one is another one"
