"""The promise: what makes a real job slow is named, the right rank if it is one, and nobody is hurt for a notice."""

from __future__ import annotations

import signal

import pytest

from cluster.events import VerdictGiven
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.plants import Plant, plant
from trainer.exits import ExitCode

pytestmark = pytest.mark.chaos

SLOW_FROM = 40
# Small enough for many steps in a short time. What is slow is slow beyond all that a machine with more ranks than
# processors adds by itself, which can be as much as a step again.
SMALL = (
    "--training.steps", "1000", "--training.microbatch_size", "2", "--health.hang_floor_s", "30",
    "--checkpoint.persist_interval_steps", "16",
)  # fmt: skip
SLOW_CAUSES = (Cause.STRAGGLER, Cause.SLOW_DATA, Cause.SLOW_NETWORK, Cause.SLOW_JOB)

LAYOUTS = {
    "fsdp": ["--parallelism.dp_shard", "4", "--parallelism.tp", "1"],
    "tp": ["--parallelism.dp_shard", "1", "--parallelism.tp", "4"],
    "pp": ["--parallelism.pp", "2", "--parallelism.tp", "1", "--parallelism.pp_microbatch_size", "2"],
    "ep": ["--model.family", "deepseek_v3", "--parallelism.dp_shard", "4", "--parallelism.tp", "1",
           "--parallelism.ep", "2"],
}  # fmt: skip


def told(job: Job, since: int = SLOW_FROM) -> list[Verdict]:
    """Verdicts about slowness that were given for this step or a later one."""
    given = [event.verdict for event in job.events() if isinstance(event, VerdictGiven)]
    return [each for each in given if each.cause in SLOW_CAUSES and each.step >= since]


def first_told(job: Job, since: int = SLOW_FROM) -> Verdict:
    """Let the job run until something is called slow, which is more steps on a busy machine, then ask it to leave.

    Until then nobody may be blamed, and at no time may anything be done.
    """
    job.wait_until(lambda: bool(told(job, since)), "a verdict about slowness", 500.0)
    assert job.process is not None
    job.process.send_signal(signal.SIGINT)
    assert job.finish() == ExitCode.REQUEUE
    assert set(job.actions()) == {"nothing"}
    return told(job, since)[0]


def test_a_rank_with_a_slow_forward_is_named_and_nothing_is_done_about_a_notice(make_job: MakeJob) -> None:
    """Promise: the rank, its node and the slow part are named in the journal, and training goes on undisturbed."""
    job = make_job("slow-forward", SMALL)
    plant(job, Plant(rank=2, step=SLOW_FROM, deed="slow forward", text="0.6 1000"))
    found = first_told(job.start())
    assert (found.cause, found.node, found.rank) == (Cause.STRAGGLER, "node1", 2), found
    assert (found.severity, found.certainty) == (Severity.NOTICE, Certainty.HINT)
    assert "slow is its forward" in found.evidence[1]
    assert found.slowdown > 0.5


@pytest.mark.long
def test_a_data_source_that_is_slow_for_all_is_no_ranks_fault(make_job: MakeJob) -> None:
    """Promise: where every rank waits for its batches, the data source is named, and no rank."""
    job = make_job("slow-data", SMALL)
    plant(job, *(Plant(rank=rank, step=SLOW_FROM, deed="slow reads", text="1.5 1000") for rank in range(4)))
    found = first_told(job.start())
    assert (found.cause, found.node, found.rank) == (Cause.SLOW_DATA, "", -1), found


@pytest.mark.long
def test_a_data_source_that_is_slow_for_one_rank_is_that_ranks_data(make_job: MakeJob) -> None:
    """Promise: one rank that waits for its batches is a straggler whose slow part is data."""
    job = make_job("slow-data-of-one", [*SMALL, *LAYOUTS["fsdp"]])
    plant(job, Plant(rank=1, step=SLOW_FROM, deed="slow reads", text="1.5 1000"))
    found = first_told(job.start())
    assert (found.cause, found.rank) == (Cause.STRAGGLER, 1), found
    assert "slow is its data" in found.evidence[1]


@pytest.mark.long
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_rank_that_gets_a_fraction_of_its_time_is_named(make_job: MakeJob, layout: str) -> None:
    """Promise: a process that is slowed from outside (stopped most of the time) is named, under FSDP, TP, PP and EP."""
    job = make_job(f"stop-and-go-{layout}", [*SMALL, *LAYOUTS[layout]]).start()
    job.wait_for_step(60)
    with faults.slowed_worker(job.run_dir, "node1", 3, 0.9):
        found = first_told(job, 60)
    assert (found.cause, found.node, found.rank) == (Cause.STRAGGLER, "node1", 3), found


@pytest.mark.long
def test_a_rank_that_stays_slow_costs_its_node_the_place(make_job: MakeJob) -> None:
    """Promise: what is first a notice is, when it stays and a spare is there, a reason to replace the node, once."""
    persisting = ["--health.straggler_persist_steps", "5", "--health.restart_cost_s", "0.1", "--training.steps", "120"]
    job = make_job("slow-for-good", [*SMALL, *persisting])
    plant(job, Plant(rank=2, step=SLOW_FROM, deed="slow forward", text="1 1000"))
    assert job.start().finish(500.0) == ExitCode.DONE
    severities = [(each.rank, each.severity) for each in told(job)]
    assert severities == [(2, Severity.NOTICE), (2, Severity.NODE)], severities
    assert [action for action in job.actions() if action != "nothing"] == ["replace"]
    assert len(job.losses()) == 120
