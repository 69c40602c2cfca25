"""The promise: bad numbers are answered by the ladder, and what the run becomes is what it would have been without."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.events import ActionTaken, WorkersReported
from configs.load import load_job
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.spoil import spoiled_copy
from trainer.events import FactKind
from trainer.ledger import check_exactly_once, committed_samples

pytestmark = pytest.mark.chaos

STEPS, FIRST, COUNT = 16, 8, 3
SMALL = (
    "--training.steps", str(STEPS), "--parallelism.tp", "1", "--cluster.nodes", "1", "--cluster.spares", "0",
    "--numbers.warmup_steps", "4", "--numbers.window_steps", "8",
)  # fmt: skip
RARE = 511


@pytest.fixture(scope="session")
def bad_set(home: Path, corpus: Path) -> str:
    """`--data.sets` of a corpus whose batches FIRST .. FIRST + COUNT - 1 are bad."""
    config = load_job(str(home / "job.toml"), ["--run.name", "any"])
    prefix = spoiled_copy(corpus, home / "spoiled", config, FIRST, COUNT, RARE)
    return f'[{{path = "{prefix}"}}]'


def without(first: int, count: int) -> tuple[str, str]:
    """The option that leaves batches out from the start."""
    return "--data.leave_out", f"[{{first = {first}, count = {count}}}]"


def facts(job: Job, kind: FactKind) -> list[WorkersReported]:
    """The journal's facts of a kind."""
    return [event for event in job.events() if isinstance(event, WorkersReported) and event.fact.kind is kind]


def rollbacks(job: Job) -> list[ActionTaken]:
    """The journal's rollbacks."""
    return [event for event in job.events() if isinstance(event, ActionTaken) and event.back is not None]


def assert_as_without(disturbed: Job, without_it: Job, left_out: tuple[tuple[int, int], ...]) -> None:
    """Weights, optimizer state, losses and samples are those of a run over the data without the stretch."""
    assert disturbed.weights(STEPS) == without_it.weights(STEPS)
    assert disturbed.losses() == without_it.losses()
    assert disturbed.samples() == without_it.samples()
    for job in (disturbed, without_it):
        samples = committed_samples(job.run_dir)
        check_exactly_once(samples, STEPS, 8, left_out)
        passed = {(step, lines[0].passed) for step, lines in samples.items() if lines[0].passed}
        assert passed == {(first, (((first - 1) * 8, count * 8),)) for first, count in left_out}


def test_a_bad_stretch_of_data_leaves_no_trace(make_job: MakeJob, bad_set: str) -> None:
    """Promise: updates on bad data are left out; after three the run goes back, leaves the stretch out, and ends with
    the weights, losses and samples of an undisturbed run over the data without that stretch, bit for bit."""
    disturbed = make_job("stretch", (*SMALL, "--data.sets", bad_set)).start()
    assert disturbed.finish() == 0, disturbed.said()
    (back,) = rollbacks(disturbed)
    assert back.back is not None
    assert (back.back.step, back.back.to_step, back.back.left_out) == (FIRST, FIRST - 1, ((FIRST, COUNT),))
    assert [event.fact.step for event in facts(disturbed, FactKind.UPDATE_SKIPPED)] == [8, 9, 10]
    assert disturbed.causes() == ["spike", "spike"]
    assert disturbed.actions() == ["nothing", "rollback"]
    without_it = make_job("no-stretch", (*SMALL, "--data.sets", bad_set, *without(FIRST, COUNT))).start()
    assert without_it.finish() == 0, without_it.said()
    assert without_it.actions() == []
    assert_as_without(disturbed, without_it, ((FIRST, COUNT),))
