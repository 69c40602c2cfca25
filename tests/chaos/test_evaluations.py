"""The promise: evaluations run beside training on every due snapshot, outlive a supervisor, and stop nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.evaluations import Result, read_result
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from trainer.events import FactKind

pytestmark = [pytest.mark.chaos, pytest.mark.long]

STEPS = 12
# Reads the exported model's header; fails for the last step. Waits for `go`, so that the test knows when it runs.
EVALUATE = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["EVERSTEP_MODEL"])
pathlib.Path(sys.argv[1], "running").touch()
while not pathlib.Path(sys.argv[1], "go").exists(): time.sleep(0.02)
with (folder / "model.safetensors").open("rb") as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
print(len(header) - 1, "tensors")
sys.exit(os.environ["EVERSTEP_STEP"] == "12")
"""


def results(job: Job) -> dict[str, Result | None]:
    """What each evaluation left, by its folder."""
    return {path.name: read_result(path) for path in sorted((job.run_dir / "evaluations").glob("step-*"))}


def evaluating(job: Job) -> int:
    """How many processes are, or wait to be, at an evaluation."""
    return sum("cluster.evaluate" in process.cmdline() for process in job.processes())


def test_evaluations_outlive_a_supervisor_and_their_failures_stop_nothing(make_job: MakeJob, tmp_path: Path) -> None:
    """The supervisor is killed while the first evaluation runs; the next one waits for its end and tells of it."""
    command = f"--evaluation.command={json.dumps([sys.executable, '-c', EVALUATE, str(tmp_path)])}"
    job = make_job(
        "judged",
        ("--training.steps", str(STEPS), "--evaluation.interval_steps=6", command, "--evaluation.ema=true",
         "--ema.decay=0.9", "--optimizer.name=muon", "--checkpoint.keep_last=2"),
    ).start()  # fmt: skip
    job.wait_until((tmp_path / "running").exists, "the first evaluation")
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    job.start()
    job.wait_until(lambda: evaluating(job) > 1, "the next supervisor's evaluation, which waits")
    (tmp_path / "go").touch()
    assert job.finish() == 0, job.said()

    found = results(job)
    assert list(found) == ["step-12-g1", "step-6-g1"]
    first, last = found["step-6-g1"], found["step-12-g1"]
    assert first is not None
    assert last is not None
    assert (first.ok, first.detail) == (True, "21 tensors")
    assert not last.ok
    assert "ended with 1: 21 tensors" in last.detail
    kinds = {event.fact.step: event.fact.kind for event in job.events() if hasattr(event, "fact")
             and event.fact.kind in (FactKind.EVALUATED, FactKind.EVALUATION_FAILED)}  # fmt: skip
    assert kinds == {6: FactKind.EVALUATED, 12: FactKind.EVALUATION_FAILED}
    assert sorted(job.losses()) == list(range(1, STEPS + 1))
