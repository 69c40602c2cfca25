"""From standing still to a verdict: evidence first, patience where it asks for some, and an end to patience."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.collecting import Collector
from cluster.fleet import AgentView
from cluster.hangs import Hang, HangWatch
from cluster.messages import AgentReport, AgentStatus, Evidence, Order, Wish
from configs.check import check_job
from configs.schema import DataConfig, HealthConfig, JobConfig, ModelConfig, RunConfig, TrainingConfig
from configs.timeouts import check_timeouts, derive, last_hang_bound_s
from health.hang_evidence import ProcessFacts, facts_name, flight_name
from health.verdict import Cause, Severity, Verdict
from health.watchdog import Standing
from trainer.events import Phase

NODES = {0: "node0", 1: "node1"}


def job(**health: float) -> JobConfig:
    return JobConfig(
        run=RunConfig(name="x"),
        model=ModelConfig(family="llama3", flavor="debugmodel"),
        data=DataConfig(sets=(), tokenizer=""),
        training=TrainingConfig(steps=2, seq_len=8, global_batch_size=2),
        health=HealthConfig(**health),  # type: ignore[arg-type]
    )


TIMEOUTS = derive(job())


def standing(still_s: float, since_s: float = 0.0) -> Standing:
    verdict = Verdict(
        node="", rank=-1, cause=Cause.HANG, severity=Severity.WORKERS, step=4, fingerprint="hang", evidence=("still",)
    )
    return Standing(verdict, "no rank advanced", since_s, still_s, 3.0, 15.0, dict.fromkeys(NODES, Phase.VOTE))


def view(node: str, evidence: Evidence | None) -> AgentView:
    report = AgentReport(
        node=node, host="", pid=1, seq=1, status=AgentStatus.RUNNING, generation=1, finished_step=0, readiness=None,
        beats=(), exits=(), facts=(), evidence=evidence,
    )  # fmt: skip
    return AgentView(report, 0.0)


def process(rank: int, state: str) -> dict[str, bytes]:
    facts = ProcessFacts(rank=rank, pid=1, state=state, cpu_s=0.0, looked_s=0.2, stack_from="", record_moved=False)
    return {facts_name(rank): msgspec.json.encode(facts)}


def watch_until(
    watch: HangWatch, states: Mapping[int, str], until_s: float, answers: bool = True
) -> tuple[float, Hang] | None:
    """Ranks that stand still in these states; agents answer at once, or never."""
    tenth = 32
    while tenth <= until_s * 10:
        still_s = tenth / 10
        number = watch.collect
        views = {
            node: view(node, Evidence(number, process(rank, states[rank])) if answers and number else None)
            for rank, node in NODES.items()
        }
        found = watch.consider(standing(still_s), views, still_s)
        if found is not None:
            return still_s, found
        tenth += 1
    return None


def test_a_stopped_rank_needs_one_look() -> None:
    """Promise: proof is acted on at once, with all that was collected."""
    watch = HangWatch(TIMEOUTS, NODES)
    found = watch_until(watch, {0: "S", 1: "T"}, 20.0)
    assert found is not None
    at_s, hang = found
    assert at_s < 3.5
    assert (hang.verdict.rank, hang.verdict.node) == (1, "node1")
    assert sorted(hang.files) == [facts_name(0), facts_name(1)]
    assert watch.collect == 0


def test_patience_has_an_end_even_without_any_answer() -> None:
    """Promise: no agent is waited for beyond its time, and ranks that never move are called hung at the last bound."""
    for answers in (True, False):
        found = watch_until(HangWatch(TIMEOUTS, NODES), {0: "S", 1: "S"}, 30.0, answers)
        assert found is not None
        assert 15.0 <= found[0] <= 15.0 + TIMEOUTS.answer_s + 0.2
        assert "although" in found[1].verdict.evidence[-1]


def test_an_advance_takes_the_request_back() -> None:
    """Promise: whoever moves while evidence is collected ends the suspicion; what comes in later is not looked at."""
    watch = HangWatch(TIMEOUTS, NODES)
    assert watch.consider(standing(3.2), {}, 3.2) is None
    first = watch.collect
    assert first > 0
    late = {node: view(node, Evidence(first, process(rank, "T"))) for rank, node in NODES.items()}
    assert watch.consider(None, late, 3.3) is None
    assert watch.collect == 0
    assert watch.consider(standing(3.1, since_s=9.0), late, 12.1) is None
    assert watch.consider(standing(3.2, since_s=9.0), {}, 12.2) is None


def test_an_agent_that_is_silent_for_a_moment_costs_no_evidence() -> None:
    """Promise: what was asked for is not forgotten because ranks could not be looked at in between."""
    watch = HangWatch(TIMEOUTS, NODES)
    assert watch.consider(standing(3.2), {}, 3.2) is None
    asked = watch.collect
    assert watch.consider(None, {}, 4.9, hushed=True) is None
    assert watch.collect == asked > 0
    answers = {node: view(node, Evidence(asked, process(rank, "ST"[rank]))) for rank, node in NODES.items()}
    found = watch.consider(standing(5.2), answers, 5.2)
    assert found is not None
    assert found.verdict.node == "node1"


@given(
    st.floats(0.01, 60), st.floats(0.1, 300), st.floats(1, 20), st.floats(0.1, 600), st.floats(1, 20),
    st.floats(1, 7200),
)  # fmt: skip
def test_time_outs_that_pass_the_check_are_in_order(
    interval_s: float, timeout_s: float, factor: float, floor_s: float, patience: float, startup_s: float
) -> None:
    """Promise: whatever the keys, torch never loses its patience before the supervisor has seen, asked and judged."""
    config = job(
        heartbeat_interval_s=interval_s, heartbeat_timeout_s=timeout_s, hang_factor=factor, hang_floor_s=floor_s,
        hang_patience=patience, startup_timeout_s=startup_s,
    )  # fmt: skip
    problems = check_timeouts(config)
    times = derive(config)
    if problems:
        assert all(each.key in str(each) and "must be" in each.message for each in problems)
        return
    assert times.heartbeat_s < times.hushed_s <= times.lost_s < times.settle_s
    assert times.heartbeat_s < times.hang_floor_s <= times.hang_last_s <= times.rendezvous_s <= times.store_s
    slowest_step_s = startup_s
    first_s = max(floor_s, factor * slowest_step_s)
    assert last_hang_bound_s(config.health, first_s) + times.heartbeat_s + times.answer_s < times.collective_s


def test_the_default_time_outs_notice_within_the_aim() -> None:
    """Promise: with the defaults a hang is noticed within max(5 s, 3 steps) of it, for steps of any length."""
    health = HealthConfig()
    assert not [each for each in check_job(job()) if each.key.startswith(("health.", "cluster."))]
    for step_s in (0.01, 0.5, 1.0, 1.6, 2.0, 5.0, 60.0, 280.0):
        bound_s = max(health.hang_floor_s, health.hang_factor * step_s)
        # The last advance is seen a heartbeat late at worst, standing still another one; two looks take half a second.
        assert bound_s + 2 * health.heartbeat_interval_s + 0.5 <= max(5.0, 3 * step_s)


def test_an_agent_answers_each_number_once(tmp_path: Path) -> None:
    """Promise: orders come many times a second; evidence is collected once for each number, and dropped after it."""
    shown: list[Evidence] = []
    told = threading.Event()

    def show(evidence: Evidence) -> None:
        shown.append(evidence)
        told.set()

    collector = Collector(tmp_path, tuple, show, 0.5)
    order = Order(ack_seq=0, wish=Wish.RUN, target_generation=1, plan=None, collect=7)
    for _ in range(3):
        collector.obey(order)
    assert told.wait(10)
    collector.obey(msgspec.structs.replace(order, collect=0))
    assert shown == [Evidence(7, {}), Evidence(0, {})]
    assert flight_name(3) == "rank-3.flight.json"
