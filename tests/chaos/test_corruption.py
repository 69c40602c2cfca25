"""Silent data corruption in whole jobs: found, blamed on the rank it struck, and without a trace in the weights."""

from __future__ import annotations

import random

import pytest

from cluster.events import ActionTaken, VerdictGiven
from health.verdict import Cause, Certainty
from tests.chaos.conftest import MakeJob
from tests.chaos.flips import flip_state
from tests.chaos.jobs import Job
from tests.chaos.plants import Plant, plant

pytestmark = pytest.mark.chaos

STEPS = 10
COMMON = ("--training.steps", str(STEPS), "--health.preflight", "false")
REPLAYED = ("--integrity.replay_interval_steps", "4")
CHECKED = ("--integrity.interval_steps", "1")


def blamed(job: Job) -> list[tuple[str, int]]:
    """Nodes and ranks against which there is proof of corruption."""
    return [
        (event.verdict.node, event.verdict.rank)
        for event in job.events()
        if isinstance(event, VerdictGiven)
        and (event.verdict.cause, event.verdict.certainty) == (Cause.SILENT_CORRUPTION, Certainty.PROOF)
    ]


def replaced(job: Job) -> list[str]:
    """Nodes that a spare took over from."""
    return [event.node for event in job.events() if isinstance(event, ActionTaken) and event.action == "replace"]


def test_a_flipped_gradient_bit_leaves_no_trace_but_a_new_node(make_job: MakeJob) -> None:
    """Promise: a bit that flips in one rank's gradient is found by the replay, the rank's node is replaced, and the
    weights are those of an undisturbed run, to the last bit."""
    undisturbed = make_job("unflipped", (*COMMON, "--cluster.spares", "0", "--integrity.interval_steps", "0")).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    job = make_job("flipped-gradient", (*COMMON, *REPLAYED))
    plant(job, Plant(rank=2, step=4, deed="flip gradient", text="31"))
    assert job.start().finish() == 0, job.said()
    assert blamed(job) == [("node1", 2)]
    assert replaced(job) == ["node1"]
    assert job.weights(STEPS) == undisturbed.weights(STEPS)
    assert job.losses() == undisturbed.losses()


@pytest.mark.long
def test_without_a_spare_a_flip_that_was_put_right_stops_nothing(make_job: MakeJob) -> None:
    """Promise: the step is computed again, the node is accused, and the job ends as if nothing had been."""
    alone = (*COMMON, "--cluster.spares", "0")
    undisturbed = make_job("unflipped", (*alone, "--integrity.interval_steps", "0")).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    job = make_job("flipped-alone", (*alone, *REPLAYED))
    plant(job, Plant(rank=2, step=4, deed="flip gradient", text="30"))
    assert job.start().finish() == 0, job.said()
    assert blamed(job) == [("node1", 2)]
    assert job.actions() == ["nothing"]
    assert job.weights(STEPS) == undisturbed.weights(STEPS)


@pytest.mark.long
@pytest.mark.parametrize("what", ["model.layers", "optimizer.exp_avg_sq"])
def test_a_flipped_bit_in_memory_leaves_no_trace_but_a_new_node(
    what: str, make_job: MakeJob, dice: random.Random
) -> None:
    """Promise: a bit that flips in the memory that holds a rank's weights or optimizer state is found before the next
    update, the snapshot that may have it is not used, the node is replaced, and the weights end as they would have."""
    undisturbed = make_job("unflipped", (*COMMON, "--cluster.spares", "0")).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    job = make_job(f"flipped-{what}", (*COMMON, *CHECKED)).start()
    job.wait_for_step(3)
    rank = dice.randrange(4)
    step = flip_state(job, rank, what, dice)
    assert job.finish() == 0, job.said()
    assert blamed(job) == [(f"node{rank // 2}", rank)]
    assert f"snapshot of step {step - 1} distrusted" in job.said()
    assert replaced(job) == [f"node{rank // 2}"]
    assert job.weights(STEPS) == undisturbed.weights(STEPS)
    assert job.losses() == undisturbed.losses()


@pytest.mark.long
def test_a_learning_rate_that_blows_up_is_no_nodes_fault(make_job: MakeJob) -> None:
    """Promise: losses that are not finite, because of the configuration, are replayed, come out the same everywhere,
    and cost no node its place."""
    job = make_job("blown-up", (*COMMON, *CHECKED, "--optimizer.lr", "1e30"))
    job.start().finish()
    assert blamed(job) == []
    assert replaced(job) == []
    assert "silent_corruption" not in job.causes()
    assert "not finite" in job.said()
    assert "the same result again, and on other devices" in job.said()
