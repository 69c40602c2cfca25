"""The promise: bad numbers are answered by the ladder, and what the run becomes is what it would have been without."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.events import ActionTaken, WorkersReported
from configs.load import load_job
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.spoil import spoiled_copy
from tests.chaos.test_identical import LAYOUTS
from trainer.events import FactKind
from trainer.exits import ExitCode
from trainer.ledger import LedgerLine, check_exactly_once, committed_samples

pytestmark = pytest.mark.chaos

STEPS, FIRST, COUNT = 16, 8, 3
STRETCH = ((FIRST, COUNT),)
EARLY = (
    "--training.steps", str(STEPS), "--numbers.warmup_steps", "4", "--numbers.window_steps", "8",
    "--numbers.layers_interval_steps", "2", "--health.hang_floor_s", "30",
)  # fmt: skip
SMALL = (*EARLY, "--parallelism.tp", "1", "--cluster.nodes", "1", "--cluster.spares", "0")
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


def skipped_by_rank(job: Job, generation: int) -> set[tuple[int, ...]]:
    """Which steps' updates the data-parallel ranks say they left out; one entry if all say the same."""
    found = set()
    for path in sorted((job.run_dir / "samples").glob("dp-*.jsonl")):
        lines = [msgspec.json.decode(line, type=LedgerLine) for line in path.read_bytes().splitlines()]
        found.add(tuple(line.step for line in lines if line.skipped and line.generation == generation))
    return found


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
    assert skipped_by_rank(disturbed, 1) == {(8, 9, 10)}
    assert [event.fact.step for event in facts(disturbed, FactKind.UPDATE_SKIPPED)] == [8, 9, 10]
    assert disturbed.causes() == ["spike", "spike"]
    assert disturbed.actions() == ["nothing", "rollback"]
    without_it = make_job("no-stretch", (*SMALL, "--data.sets", bad_set, *without(FIRST, COUNT))).start()
    assert without_it.finish() == 0, without_it.said()
    assert without_it.actions() == []
    assert_as_without(disturbed, without_it, STRETCH)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_every_layout_leave_out_the_same(layout: str, make_job: MakeJob, bad_set: str) -> None:
    """Promise: with tensor, pipeline and expert parallelism too, all ranks decide alike, and nothing stays of it."""
    options = (*EARLY, *LAYOUTS[layout], "--data.sets", bad_set)
    disturbed = make_job(f"stretch-{layout}", options).start()
    assert disturbed.finish() == 0, disturbed.said()
    assert skipped_by_rank(disturbed, 1) == {(8, 9, 10)}
    assert [back.back.left_out for back in rollbacks(disturbed) if back.back] == [STRETCH]
    without_it = make_job(f"no-stretch-{layout}", (*options, *without(FIRST, COUNT))).start()
    assert without_it.finish() == 0, without_it.said()
    assert_as_without(disturbed, without_it, STRETCH)


@pytest.mark.long
def test_faults_amid_a_bad_stretch_change_no_decision(make_job: MakeJob, bad_set: str) -> None:
    """Promise: a worker killed between two skipped updates, and the supervisor while the workers wait to go back, do
    not change what is left out, or what the run becomes."""
    disturbed = make_job("stretch-faults", (*SMALL, "--data.sets", bad_set)).start()
    disturbed.wait_until(lambda: len(facts(disturbed, FactKind.UPDATE_SKIPPED)) > 1, "the second skipped update")
    faults.kill_worker(disturbed.run_dir, "node0", 1)
    disturbed.wait_until(lambda: bool(facts(disturbed, FactKind.ROLLBACK_WANTED)), "the wish to go back")
    assert disturbed.process is not None
    disturbed.process.kill()
    disturbed.process.wait()
    disturbed.start()
    assert disturbed.finish() == 0, disturbed.said()
    assert [back.back.left_out for back in rollbacks(disturbed) if back.back] == [STRETCH]
    without_it = make_job("no-stretch-faults", (*SMALL, "--data.sets", bad_set, *without(FIRST, COUNT))).start()
    assert without_it.finish() == 0, without_it.said()
    assert_as_without(disturbed, without_it, STRETCH)


@pytest.mark.long
def test_a_learning_rate_that_is_too_high_stops_the_run_with_the_reason(make_job: MakeJob) -> None:
    """Promise: numbers that leap whatever the data is are not answered for ever: the run goes back further each time,
    then stops, and blames neither the data nor a node."""
    options = (
        *SMALL, "--training.steps", "40", "--optimizer.lr", "3.0", "--optimizer.warmup_steps", "40",
        "--numbers.max_stretch_steps", "4", "--numbers.max_rollbacks", "2", "--numbers.back_steps", "3",
        "--numbers.spike_z", "5",
    )  # fmt: skip
    job = make_job("too-fast", options).start()
    assert job.finish() == ExitCode.DO_NOT_RESTART, job.said()
    assert [action for action in job.actions() if action != "nothing"] == ["rollback", "rollback", "stop"]
    first, second = (back.back for back in rollbacks(job))
    assert first is not None
    assert second is not None
    assert second.step - second.to_step > first.step - first.to_step
    assert "the data is not to blame" in " ".join(job.said().split())
