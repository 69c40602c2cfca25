"""The promise: a run in FP8 or FP4 that is broken goes on as it would have, scales and rounding by chance included."""

from __future__ import annotations

import signal

import pytest

from cluster.events import ActionTaken, WorkersReported
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from trainer.events import FactKind
from trainer.exits import ExitCode

pytestmark = pytest.mark.chaos

STEPS = 8
ALL_LAYERS = ("--precision.keep_first_layers", "0", "--precision.keep_last_layers", "0")
SMALL = (
    "--training.steps", str(STEPS), "--parallelism.tp", "1", "--cluster.nodes", "1", "--cluster.spares", "0",
    "--health.hang_floor_s", "30", *ALL_LAYERS,
)  # fmt: skip


def assert_same_run(disturbed: Job, undisturbed: Job, steps: int = STEPS) -> None:
    """Weights, optimizer state, scales, losses and samples are equal to the last bit."""
    assert disturbed.weights(steps) == undisturbed.weights(steps)
    assert disturbed.losses() == undisturbed.losses()
    assert disturbed.samples() == undisturbed.samples()


def told(job: Job) -> list[str]:
    """What the workers said they compute in."""
    facts = [event.fact for event in job.events() if isinstance(event, WorkersReported)]
    return [fact.detail for fact in facts if fact.kind is FactKind.PRECISION]


def kill_it(job: Job) -> None:
    """A worker killed: the run goes on from memory."""
    job.start()
    job.wait_for_step(2)
    faults.kill_worker(job.run_dir, "node0", 1)


def stop_it(job: Job) -> None:
    """The run asked to leave, and started again: it goes on from the run directory."""
    job.wait_for_step(5)
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.said()
    job.start()


@pytest.mark.parametrize(
    ("recipe", "stopped"),
    [
        ("fp8_delayed", False),
        *(pytest.param(each, True, marks=pytest.mark.long) for each in ("fp8_delayed", "nvfp4", "mxfp8")),
    ],
)
def test_a_run_in_low_precision_is_broken_and_resumed_bit_for_bit(
    recipe: str, stopped: bool, make_job: MakeJob
) -> None:
    """Promise: killed, and stopped, a run in a recipe ends with the bytes of an undisturbed one; what it computed in is
    in the journal and in every row of its metrics."""
    options = (*SMALL, "--precision.recipe", recipe)
    undisturbed = make_job(f"{recipe}-undisturbed-{stopped}", options).start()
    disturbed = make_job(f"{recipe}-disturbed-{stopped}", options)
    assert undisturbed.finish() == 0, undisturbed.said()
    kill_it(disturbed)
    if stopped:
        stop_it(disturbed)
    assert disturbed.finish() == 0, disturbed.said()
    assert disturbed.actions() == ["restart"]
    assert_same_run(disturbed, undisturbed)
    assert told(disturbed) == [f"10 matrices in {recipe} (emulated), the rest in fp32"] * (3 if stopped else 2)
    assert {(record.recipe, record.converted) for record in disturbed.steps()} == {(recipe, 10)}


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["fp8_delayed", "nvfp4"])
def test_a_lost_node_changes_nothing_of_a_run_in_low_precision(recipe: str, make_job: MakeJob) -> None:
    """Promise: over FSDP2 and tp on two nodes, one of which is lost, the same."""
    options = ("--precision.recipe", recipe, *ALL_LAYERS)
    undisturbed = make_job(f"{recipe}-whole", options).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    disturbed = make_job(f"{recipe}-lost", options).start()
    disturbed.wait_for_step(9)
    faults.kill_node(disturbed.run_dir, "node1")
    assert disturbed.finish() == 0, disturbed.said()
    assert disturbed.actions() == ["replace"]
    assert_same_run(disturbed, undisturbed, 24)


@pytest.mark.long
def test_scales_of_past_steps_go_along_to_another_layout(make_job: MakeJob) -> None:
    """Promise: a run in delayed scaling goes on over tp after FSDP2, as near as the order of sums allows."""
    options = (*SMALL, "--precision.recipe", "fp8_delayed")
    whole = make_job("delayed-whole", options).start()
    assert whole.finish() == 0, whole.said()
    moved = make_job("delayed-moved", options).start()
    moved.wait_for_step(5)
    assert moved.process is not None
    moved.process.send_signal(signal.SIGTERM)
    assert moved.finish() == 75, moved.said()
    moved.start("--parallelism.tp", "2", "--parallelism.dp_shard", "1")
    assert moved.finish() == 0, moved.said()
    for step, loss in whole.losses().items():
        assert moved.losses()[step] == pytest.approx(loss, rel=1e-3)


@pytest.mark.long
def test_a_run_that_fp8_does_not_suit_leaves_it_before_it_stops(make_job: MakeJob) -> None:
    """Promise: where going back does not help, the same steps are computed without the recipe, and the journal, the
    console and the metrics say so. Here nothing helps, and the run stops after that."""
    options = (
        *SMALL, "--training.steps", "40", "--precision.recipe", "fp8_delayed", "--optimizer.lr", "3.0",
        "--optimizer.warmup_steps", "40", "--numbers.warmup_steps", "4", "--numbers.window_steps", "8",
        "--numbers.max_stretch_steps", "4", "--numbers.max_rollbacks", "1", "--numbers.back_steps", "3",
        "--numbers.spike_z", "5", "--health.heartbeat_timeout_s", "30", "--cluster.lease_timeout_s", "120",
    )  # fmt: skip
    job = make_job("leaves-fp8", options).start()
    assert job.finish() == ExitCode.DO_NOT_RESTART, job.said()
    backs = [event.back for event in job.events() if isinstance(event, ActionTaken) and event.back is not None]
    assert [back.recipe for back in backs] == ["", "auto"]
    assert told(job)[-1] == "everything in fp32"
    assert "without fp8_delayed, all in the precision of the rest" in job.said()
    left = {record.recipe for record in job.steps() if record.generation == 3}
    assert left == {"fp32"}
