"""Hangs in whole jobs: the rank that keeps the others waiting is named in seconds, and what shows it is kept."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from cluster.events import VerdictGiven
from health.collectives import decode_record
from health.hang_evidence import ProcessFacts, facts_name, flight_name, stack_name
from health.verdict import Cause, Certainty
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.plants import Plant, plant

pytestmark = pytest.mark.chaos

# The aim is max(5 s, 3 steps) from the moment of the hang; the rest is for a machine that does other things, too.
_AIM_S = 5.0
_SLACK_S = 4.0
_QUICK = ("--health.hang_floor_s", "3", "--health.hang_factor", "2", "--cluster.spares", "0")


def hangs(job: Job) -> list[VerdictGiven]:
    """The incidents so far."""
    return [event for event in job.events() if isinstance(event, VerdictGiven) and event.incident]


def limit_s(job: Job) -> float:
    """How long noticing may take."""
    slowest_s = max(record.step_s for record in job.steps()[-8:])
    return max(_AIM_S, 3 * slowest_s) + _SLACK_S


def incident(job: Job, number: int) -> Path:
    """Its folder."""
    return job.run_dir / "incidents" / str(number)


def test_a_stopped_and_a_sleeping_rank_are_named_in_seconds(make_job: MakeJob) -> None:
    """Promise: a hang is noticed within max(5 s, 3 steps), the rank that caused it is named and no other, and every
    rank's stack and flight record are in the incident's folder, taken before anything was killed."""
    job = make_job("hanging", ("--training.steps", "12", *_QUICK))
    plant(job, Plant(rank=1, step=7, deed="sleep before", text="mesh_fsdp 2", generation=2))
    job.start()
    job.wait_for_step(3)
    stopped_s = time.time()
    faults.stop_worker(job.run_dir, "node1", 3)
    assert job.finish() == 0, job.said()
    stopped, asleep = hangs(job)
    verdict = stopped.verdict
    assert (verdict.cause, verdict.node, verdict.rank) == (Cause.HANG, "node1", 3), verdict
    assert verdict.certainty is Certainty.PROOF
    assert "is stopped (process state T)" in verdict.evidence[0]
    assert stopped.t_wall_s - stopped_s < limit_s(job)
    verdict = asleep.verdict
    assert (verdict.cause, verdict.node, verdict.rank, verdict.step) == (Cause.HANG, "node0", 1, 7), verdict
    assert "FSDP (ranks 1, 3)" in verdict.evidence[0]
    assert "stuck.py" in verdict.evidence[1]
    began_s = max(record.t_wall_s for record in job.steps() if record.step == 6)
    assert asleep.t_wall_s - began_s < limit_s(job) + max(record.step_s for record in job.steps())
    assert job.actions() == ["restart", "restart"]
    for number, silent in ((1, 3), (2, -1)):
        folder = incident(job, number)
        for rank in range(4):
            facts = msgspec.json.decode((folder / facts_name(rank)).read_bytes(), type=ProcessFacts)
            assert facts.rank == rank
            assert "Thread" in (folder / stack_name(rank)).read_text() or facts.problem
            if rank != silent:
                assert decode_record((folder / flight_name(rank)).read_bytes()).operations


@pytest.mark.long
def test_a_rank_that_holds_its_interpreter_and_a_bug_are_told_apart(make_job: MakeJob) -> None:
    """Promise: a rank none of whose threads runs is named although it says nothing; ranks that do not run the same
    collectives are called a bug of the program, and no node is blamed for it."""
    job = make_job("mute", ("--training.steps", "10", *_QUICK))
    plant(
        job,
        Plant(rank=2, step=3, deed="hold lock"),
        Plant(rank=1, step=6, deed="leave out", generation=2),
    )
    assert job.start().finish() == 0, job.said()
    mute, bug = (each.verdict for each in hangs(job))
    assert (mute.cause, mute.node, mute.rank) == (Cause.HANG, "node1", 2), mute
    assert "lets none of its threads run" in mute.evidence[0]
    assert bug.cause is Cause.HANG
    assert (bug.node, bug.rank) == ("", -1), bug
    assert "disagree" in bug.evidence[0]


@pytest.mark.long
def test_a_rank_that_is_only_slow_is_left_alone(make_job: MakeJob) -> None:
    """Promise: a rank that computes for longer than the bound, and then comes, ends nothing."""
    job = make_job("slow", ("--training.steps", "10", *_QUICK))
    plant(job, Plant(rank=2, step=5, deed="compute", text="7"))
    assert job.start().finish() == 0, job.said()
    assert hangs(job) == []
