"""Promises of answers: whoever asks something is answered at once, and nobody is left without one for long."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.answering import Answering
from cluster.messages import AgentReport, AgentStatus, Evidence, Measured, NumberedFact, Readiness, WorkerExit
from configs.load import load_job
from configs.timeouts import ANSWERED_INTERVALS, derive
from trainer.events import Fact, FactKind

GENERATION = 3
TRAINS = AgentReport(
    node="node0", host="127.0.0.1", pid=1, seq=7, status=AgentStatus.RUNNING, generation=GENERATION, finished_step=0,
    readiness=None, beats=(), exits=(), facts=(),
)  # fmt: skip
FACT = Fact(kind=FactKind.STOPPING, node="node0", rank=0, generation=GENERATION, step=1, t_wall_s=0.0, detail="")
EXIT = WorkerExit(
    rank=0, generation=GENERATION, exit_code=1, signal_number=None, error=None, log_tail=(), oom_kill=False, t_wall_s=0
)


@pytest.mark.parametrize(
    "said",
    [
        {"status": AgentStatus.READY, "readiness": Readiness(GENERATION, "127.0.0.1", 1, ())},
        {"status": AgentStatus.FINISHED},
        {"generation": GENERATION - 1},
        {"facts": (NumberedFact(1, FACT),)},
        {"exits": (EXIT,)},
        {"notice": "maintenance"},
        {"evidence": Evidence(1, {})},
        {"measured": Measured(1, ())},
    ],
    ids="+".join,
)
def test_whoever_asks_something_is_answered_at_once(said: dict[str, object]) -> None:
    """Promise: no news waits for its acknowledgement, and nobody without work for its orders."""
    answering = Answering(1.0)
    answering.answered("node0", 10.0)
    assert not answering.owed(TRAINS, GENERATION, 10.0)
    assert answering.owed(msgspec.structs.replace(TRAINS, **said), GENERATION, 10.0)


@given(interval_s=st.floats(0.05, 5.0), lateness=st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=60))
def test_a_healthy_agent_never_looks_for_another_supervisor(interval_s: float, lateness: Sequence[float]) -> None:
    """Promise: with heartbeats as early or late as machines make them, an agent hears its supervisor before it looks
    for another."""
    config = load_job("demo")
    health = msgspec.structs.replace(
        config.health, heartbeat_interval_s=interval_s, heartbeat_timeout_s=2.1 * interval_s
    )
    unheard_s = derive(msgspec.structs.replace(config, health=health)).unheard_s
    answering, answered = Answering(interval_s), [0.0]
    answering.answered("node0", 0.0)
    for beat, late in enumerate(lateness, 1):
        now_s = (beat + late) * interval_s
        if answering.owed(TRAINS, GENERATION, now_s):
            answering.answered("node0", now_s)
            answered.append(now_s)
    assert len(answered) > len(lateness) // (ANSWERED_INTERVALS + 1)
    assert all(later - earlier < unheard_s for earlier, later in itertools.pairwise(answered))


def test_a_healthy_agent_is_not_answered_every_time() -> None:
    """Promise: of heartbeats that come evenly and say nothing new, every second is answered."""
    answering, answers = Answering(0.5), 0
    for beat in range(100):
        if answering.owed(TRAINS, GENERATION, beat * 0.5):
            answering.answered("node0", beat * 0.5)
            answers += 1
    assert answers == 50
