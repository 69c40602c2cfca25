"""The promise: whatever fails, the run ends with the weights, losses and samples of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import signal

import pytest

from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from trainer.ledger import check_exactly_once, committed_samples

STEPS = 24
# The one with experts also has what the others leave off: Muon, z-loss, an average of the weights.
LAYOUTS = {
    "fsdp2-tp2": (),
    "pp2-fsdp2": ("--parallelism.pp", "2", "--parallelism.tp", "1"),
    "moe-ep2": (
        "--model.family", "deepseek_v3", "--model.layers", "2",
        "--parallelism.dp_shard", "4", "--parallelism.tp", "1", "--parallelism.ep", "2",
        "--optimizer.name", "muon", "--optimizer.muon_iterations", "1", "--optimizer.muon_except", '["*.attention.*"]',
        "--training.z_loss", "1e-3", "--ema.decay", "0.9", "--ema.interval_steps", "5",
    ),
}  # fmt: skip

pytestmark = pytest.mark.chaos


def assert_same_run(disturbed: Job, undisturbed: Job) -> None:
    """Weights, optimizer state, losses and samples of two runs are equal to the last bit."""
    assert disturbed.weights(STEPS) == undisturbed.weights(STEPS)
    assert disturbed.losses() == undisturbed.losses()
    assert disturbed.samples() == undisturbed.samples()
    check_exactly_once(committed_samples(disturbed.run_dir), STEPS, 8)


def do_faults(job: Job, dice: random.Random) -> None:
    """A worker killed, a hang, a node lost, and a full stop with resume, each at a step drawn at random."""
    worker, hang, node, stop = (low + dice.randrange(4) for low in (2, 7, 12, 17))
    job.start()
    job.wait_for_step(worker)
    faults.kill_worker(job.run_dir, "node1", 2)
    job.wait_for_step(hang)
    faults.stop_worker(job.run_dir, "node0", dice.randrange(2))
    job.wait_for_step(node)
    faults.kill_node(job.run_dir, "node1")
    job.wait_for_step(stop)
    assert job.process is not None
    job.process.send_signal(dice.choice([signal.SIGINT, signal.SIGTERM]))
    assert job.finish() == 75
    assert job.leftovers() == []
    job.start()


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "moe-ep2" else [pytest.mark.long]) for name in LAYOUTS]
)
def test_every_fault_leaves_the_run_as_it_would_have_been(layout: str, make_job: MakeJob, dice: random.Random) -> None:
    """Promise: a killed worker, a hang, a lost node and a stop change nothing of what the run becomes."""
    undisturbed = make_job(f"{layout}-undisturbed", LAYOUTS[layout]).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    disturbed = make_job(f"{layout}-disturbed", LAYOUTS[layout])
    do_faults(disturbed, dice)
    assert disturbed.finish() == 0, disturbed.said()
    assert disturbed.causes() == ["worker_killed", "hang", "node_lost"]
    assert disturbed.actions() == ["restart", "restart", "replace"]
    assert_same_run(disturbed, undisturbed)
