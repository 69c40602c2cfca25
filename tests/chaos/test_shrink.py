"""With no spare left a job goes on with fewer nodes, and grows back: each step has its samples, and none is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from cluster import events
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.test_copies import steps_computed_twice
from tests.chaos.test_layouts import TOLERANCE
from trainer.ledger import check_exactly_once, committed_samples

pytestmark = pytest.mark.chaos

STEPS = 16
BATCH = 8
ALONE = (
    "--cluster.spares", "0", "--cluster.shrink", "true", "--cluster.grow_after_minutes", "0",
    "--cluster.burn_in_hours", "0", "--training.steps", str(STEPS),
    "--health.hang_floor_s", "120",
)  # fmt: skip
FSDP = ("--parallelism.dp_shard", "4", "--parallelism.tp", "1")
LAYOUTS = {"fsdp-tp": (), "fsdp": FSDP, "pp-fsdp": ("--parallelism.pp", "2", "--parallelism.tp", "1")}
NO_COPIES = ("--checkpoint.peer_copies", "0", "--checkpoint.persist_interval_steps", "2")
ONE_NODE = ("--cluster.nodes", "1", "--cluster.ranks_per_node", "4")
# A run with so much before it is worth a restart; it is ended once it has what is compared.
ENDLESS = ("--training.steps", "1000")
MEMORY_ONLY = ("--checkpoint.persist_interval_steps", "1000")


def bring_back(job: Job, node: str, other: str) -> None:
    """A person says that the node is repaired; until its agent is up again, a rank stands still, so that the run does
    not go on without it for long."""
    words = ["readmit", node, "--reason", "repaired", "--history", str(job.run_dir / "nodes.jsonl")]
    held = faults.rank_process(job.run_dir, other, 0)
    held.suspend()
    subprocess.run([sys.executable, "-m", "cluster.cli", *words], cwd=job.home, check=True, capture_output=True)
    job.wait_until(lambda: sum(each == node for each in ready(job)) == 2, "the return")
    held.resume()
    job.wait_until(lambda: "grow" in job.actions(), "the growth")


def ready(job: Job) -> list[str]:
    """Each time a node got ready."""
    return [event.node for event in job.events() if isinstance(event, events.NodeReady)]


def sizes(job: Job) -> dict[int, int]:
    """Ranks that computed each step that counts."""
    newest: dict[int, tuple[int, int]] = {}
    for record in job.steps():
        newest[record.step] = max(newest.get(record.step, (0, 0)), (record.generation, record.ranks))
    return {step: ranks for step, (_, ranks) in newest.items()}


def plans(job: Job) -> list[tuple[str, ...]]:
    """The nodes of each generation."""
    return [event.nodes for event in job.events() if isinstance(event, events.GenerationPlanned)]


def wait_for_size(job: Job, ranks: int) -> None:
    """Wait until the newest step that was logged is one of so many ranks."""
    job.wait_until(lambda: (steps := job.steps()) != [] and steps[-1].ranks == ranks, f"a step of {ranks} ranks")


def assert_same_within_tolerance(job: Job, undisturbed: Job) -> None:
    """The same samples in the same steps, and losses that differ by the order of sums alone."""
    assert undisturbed.finish() == 0, undisturbed.said()
    check_exactly_once(committed_samples(job.run_dir), STEPS, BATCH)
    assert read(job) == read(undisturbed)
    losses, expected = job.losses(), undisturbed.losses()
    for step in range(1, STEPS + 1):
        assert losses[step] == pytest.approx(expected[step], abs=TOLERANCE), f"step {step}"


def read(job: Job) -> dict[int, tuple[int, int]]:
    """The first sample of each step that is compared, and how many there were."""
    samples = committed_samples(job.run_dir)
    return {step: (samples[step][0].first, sum(line.count for line in samples[step])) for step in range(1, STEPS + 1)}


def end_whole(job: Job) -> None:
    """Wait until the last step that is compared was computed by all ranks, and ask the job to leave."""
    job.wait_until(lambda: job.steps()[-1].step >= STEPS and job.steps()[-1].ranks == 4, "the last step")
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.said()


@pytest.fixture
def undisturbed(make_job: MakeJob) -> Callable[[str], Job]:
    """Starts a run of the same ranks, all on one node, to which nothing happens."""
    return lambda layout: make_job(f"whole-{layout}", (*ALONE, *LAYOUTS[layout], *ONE_NODE)).start()


def test_a_lost_node_makes_the_job_smaller_and_its_return_larger_again(
    make_job: MakeJob, undisturbed: Callable[[str], Job]
) -> None:
    """Promise: with copies in memory, shrinking and growing lose no finished step, and each step reads its samples."""
    whole = undisturbed("fsdp-tp")
    job = make_job("shrunk", (*ALONE, *MEMORY_ONLY, *ENDLESS)).start()
    job.wait_for_step(3)
    faults.kill_node(job.run_dir, "node1")
    wait_for_size(job, 2)
    bring_back(job, "node1", "node0")
    end_whole(job)
    assert (job.causes(), job.actions()) == (["node_lost"], ["shrink", "grow"])
    assert plans(job) == [("node0", "node1"), ("node0",), ("node0", "node1")]
    assert steps_computed_twice(job) == []
    ranks = sizes(job)
    assert (ranks[1], ranks[STEPS]) == (4, 4)
    assert 2 in ranks.values()
    assert_same_within_tolerance(job, whole)


@pytest.mark.long
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("victim", ["node0", "node1"])
def test_without_copies_the_newest_snapshot_on_disk_is_gone_on_from(
    layout: str, victim: str, make_job: MakeJob, undisturbed: Callable[[str], Job]
) -> None:
    """Promise: whatever node is lost on whatever layout, the job goes on with the other, and says what that cost."""
    whole = undisturbed(layout)
    job = make_job(f"bare-{layout}-{victim}", (*ALONE, *NO_COPIES, *LAYOUTS[layout])).start()
    job.wait_for_step(6)
    faults.kill_node(job.run_dir, victim)
    assert job.finish() == 0, job.said()
    assert (job.causes(), job.actions()) == (["node_lost"], ["shrink"])
    assert sizes(job)[STEPS] == 2
    assert len(steps_computed_twice(job)) <= 4
    assert "finished steps that are computed again: " in job.said() or steps_computed_twice(job) == []
    assert_same_within_tolerance(job, whole)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["fsdp", "pp-fsdp"])
def test_it_grows_back_on_other_layouts(layout: str, make_job: MakeJob, undisturbed: Callable[[str], Job]) -> None:
    """Promise: as with tensor parallelism, also where the first node is the one that is lost and returns."""
    whole = undisturbed(layout)
    job = make_job(f"back-{layout}", (*ALONE, *MEMORY_ONLY, *LAYOUTS[layout], *ENDLESS)).start()
    job.wait_for_step(3)
    faults.kill_node(job.run_dir, "node0")
    wait_for_size(job, 2)
    bring_back(job, "node0", "node1")
    end_whole(job)
    assert job.actions() == ["shrink", "grow"]
    assert plans(job) == [("node0", "node1"), ("node1",), ("node1", "node0")]
    assert steps_computed_twice(job) == []
    assert_same_within_tolerance(job, whole)


@pytest.mark.long
def test_a_node_that_leaves_without_a_spare_makes_the_job_smaller(
    make_job: MakeJob, undisturbed: Callable[[str], Job]
) -> None:
    """Promise: SIGTERM to a node's agent costs no step: all save, and the others go on without it."""
    whole = undisturbed("fsdp-tp")
    job = make_job("left", (*ALONE, *NO_COPIES)).start()
    job.wait_for_step(4)
    faults.agent_process(job.run_dir, "node0").send_signal(signal.SIGTERM)
    assert job.finish() == 0, job.said()
    assert (job.causes(), job.actions()) == (["preempted"], ["shrink"])
    assert steps_computed_twice(job) == []
    assert_same_within_tolerance(job, whole)


@pytest.mark.long
def test_a_supervisor_that_dies_while_the_job_grows_leaves_the_growth_to_the_next(
    make_job: MakeJob, undisturbed: Callable[[str], Job]
) -> None:
    """Promise: decisions on size are in the journal before they take effect."""
    whole = undisturbed("fsdp-tp")
    job = make_job("taken-over", (*ALONE, *MEMORY_ONLY, *ENDLESS)).start()
    job.wait_for_step(3)
    faults.kill_node(job.run_dir, "node1")
    wait_for_size(job, 2)
    bring_back(job, "node1", "node0")
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    job.start()
    end_whole(job)
    assert sizes(job)[STEPS] == 4
    assert_same_within_tolerance(job, whole)


@pytest.mark.long
def test_a_job_that_begins_with_too_few_nodes_begins_smaller(
    make_job: MakeJob, undisturbed: Callable[[str], Job]
) -> None:
    """Promise: a node that is lost before training began does not keep the others from it."""
    whole = undisturbed("fsdp-tp")
    job = make_job("few", ALONE)
    job.start()
    job.wait_until((job.run_dir / "logs" / "node1" / "agent.log").exists, "the agents' start")
    faults.kill_node(job.run_dir, "node1")
    assert job.finish() == 0, job.said()
    assert set(sizes(job).values()) == {2}
    assert "only 1 of 2 nodes" in job.said()
    assert_same_within_tolerance(job, whole)
