"""Promise: the supervisor has the network measured round by round, believes only what it asked for, and always ends."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.agent import AgentState
from cluster.fleet import AgentView
from cluster.fleet_doctor import Answered, FleetDoctor, Wanted
from cluster.matrix import PATIENCE_S, Matrix, NetworkReport
from cluster.messages import AgentReport, AgentStatus, Measured, Order, Wish
from cluster.rundir import RunDir
from configs.schema import HealthConfig
from health.examination import Machine, Version
from health.network import Way
from health.verdict import Cause, Severity, Verdict


def report(node: str, measured: Measured | None = None, machine: Machine | None = None) -> AgentReport:
    return AgentReport(
        node=node, host="h", pid=1, seq=1, status=AgentStatus.READY, generation=0, finished_step=0, readiness=None,
        beats=(), exits=(), facts=(), peer_address=f"{node}:1", measured=measured, machine=machine,
    )  # fmt: skip


def answers(
    matrix: Matrix | FleetDoctor, nodes: list[str], bad: set[str], silent: set[str], dice: random.Random
) -> None:
    """Every node that is not silent does what its order says, in any order, some of them twice."""
    for node in dice.sample(nodes, len(nodes)):
        wanted = matrix.order_for(node)
        if wanted is None or node in silent:
            continue
        ways = tuple(
            Way(source=peer.node, target=node, problem="refused")
            if {peer.node, node} & bad
            else Way(source=peer.node, target=node, latency_s=1e-3, mb_per_s=900.0)
            for peer in wanted.peers
        )
        for _ in range(dice.randint(1, 2)):
            matrix.take(report(node, Measured(wanted.number, ways)))


def run(matrix: Matrix, nodes: list[str], bad: set[str], silent: set[str], seed: int) -> NetworkReport:
    dice, now_s = random.Random(seed), 100.0
    assert matrix.begin({node: f"{node}:1" for node in nodes}, 0.1, "a test", now_s, 1e9)
    for _ in range(100):
        answers(matrix, nodes, bad, silent, dice)
        now_s += PATIENCE_S + 1.0 if silent else 0.5
        _, done = matrix.tick(now_s, 1e9, step=4)
        if done is not None:
            assert not matrix.running
            return done
    raise AssertionError("it did not end")


@given(st.integers(2, 20), st.integers(0, 99), st.booleans())
def test_the_rounds_find_the_bad_node_and_end(count: int, seed: int, silent: bool) -> None:
    """A node that reaches nobody is found; one that does not even answer drops out without a word against it."""
    nodes = [f"n{i:02d}" for i in range(count)]
    dice = random.Random(seed)
    dumb = {dice.choice(nodes)} if silent else set()
    bad = {dice.choice([node for node in nodes if node not in dumb])} if count > 5 else set()
    done = run(Matrix(), nodes, bad, dumb, seed)
    assert set(done.silent) == dumb
    assert {each.node for each in done.verdicts if each.node} == bad
    assert all(each.step == 4 for each in done.verdicts)


def test_only_what_was_asked_for_is_believed() -> None:
    """Old numbers, strangers, and a node that speaks for others change nothing."""
    matrix = Matrix()
    assert matrix.begin({"a": "a:1", "b": "b:1", "c": ""}, 0.1, "a test", 0.0, 1.0)
    assert not matrix.begin({"a": "a:1", "b": "b:1"}, 0.1, "another", 0.0, 1.0)
    wanted = matrix.order_for("a")
    assert wanted is not None
    assert matrix.order_for("c") is None
    bad = (Way(source="b", target="a", problem="refused"),)
    matrix.take(report("a", Measured(wanted.number - 1, bad)))
    matrix.take(report("c", Measured(wanted.number, bad)))
    assert matrix.tick(1.0, 1.0, 0) == (False, None)
    matrix.take(report("a", Measured(wanted.number, (Way(source="c", target="b", problem="x"),))))
    matrix.take(report("b", Measured(wanted.number, (Way(source="a", target="a", mb_per_s=5.0),))))
    _, done = matrix.tick(1.0, 1.0, 0)
    assert done is not None
    assert done.ways == (Way(source="a", target="b", mb_per_s=5.0),)
    assert done.findings.well


def a_run(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    return run_dir


def test_a_wish_in_the_run_directory_is_answered_there(tmp_path: Path) -> None:
    """`everstep doctor --fleet` asks by a file; an old wish is not answered again by the next supervisor."""
    run_dir = a_run(tmp_path)
    run_dir.network_wish.write_bytes(msgspec.json.encode(Wanted(id="old")))
    doctor = FleetDoctor(run_dir, HealthConfig())
    views = {node: AgentView(report(node), 0.0) for node in ("a", "b", "gone")}
    assert doctor.tick(views, {"gone"}, 1.0, 1e9, 3) == (False, ())
    run_dir.network_wish.write_bytes(msgspec.json.encode(Wanted(id="new", for_s=1e9)))
    assert doctor.tick(views, {"gone"}, 2.0, 1e9, 3) == (True, ())
    wanted = doctor.order_for("a")
    assert wanted is not None
    assert wanted.for_s == 10.0
    assert doctor.order_for("gone") is None
    answers(doctor, ["a", "b"], {"a"}, set(), random.Random(1))
    changed, (verdict,) = doctor.tick(views, {"gone"}, 3.0, 1e9, 3)
    assert changed
    assert (verdict.cause, verdict.severity, verdict.node) == (Cause.LINK_FAULT, Severity.NOTICE, "")
    kept = msgspec.json.decode(run_dir.network.read_bytes(), type=Answered)
    assert (kept.id, kept.report.findings.links) == ("new", (("a", "b"),))
    assert doctor.tick(views, set(), 9.0, 1e9, 3) == (False, ())


def test_a_slow_network_is_examined(tmp_path: Path) -> None:
    """A verdict that names the network has it measured; another one does not."""
    doctor = FleetDoctor(a_run(tmp_path), HealthConfig())
    views = {node: AgentView(report(node), 0.0) for node in ("a", "b")}
    for cause, begins in ((Cause.WORKER_CRASH, False), (Cause.SLOW_NETWORK, True)):
        doctor.suspect(Verdict(node="", rank=-1, cause=cause, severity=Severity.NOTICE, step=1, fingerprint="x"))
        assert doctor.tick(views, set(), 1.0, 1e9, 3) == (begins, ())


def test_misfits_are_said_once(tmp_path: Path) -> None:
    """A node with another torch is accused before ranks are handed out, and not a second time."""
    doctor = FleetDoctor(a_run(tmp_path), HealthConfig())
    machines = [Machine(versions=(Version("torch", text),)) for text in ("2.13", "2.12", "2.13")]
    views = {f"n{i}": AgentView(report(f"n{i}", machine=machine), 0.0) for i, machine in enumerate(machines)}
    (verdict,) = doctor.misfits(views)
    assert (verdict.node, verdict.cause) == ("n1", Cause.PREFLIGHT_FAILED)
    assert "torch is 2.12 on n1, 2.13 on most nodes" in verdict.evidence
    assert doctor.misfits(views) == []
    assert FleetDoctor(a_run(tmp_path), HealthConfig(preflight=False)).misfits(views) == []


def test_an_agent_learns_how_far_its_clock_is_off() -> None:
    """The times in reports and orders are all that it takes; orders without them say nothing."""
    state = AgentState("n1", "h", tuple)
    plain = Order(ack_seq=0, wish=Wish.RUN, target_generation=0, plan=None)
    state.take_order(plain)
    assert state.clock.offset is None
    sent_s = state.report().sent_wall_s
    state.take_order(msgspec.structs.replace(plain, heard_wall_s=sent_s, sent_wall_s=sent_s + 30.0))
    offset = state.clock.offset
    assert offset is not None
    assert abs(offset.seconds - 30.0) <= offset.error_s + 1e-6
