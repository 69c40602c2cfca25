"""The promise: a run that is measured on held-out text is the same run, and keeps its best snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing import disk
from checkpointing.keep import kept_info
from tests.chaos import faults
from tests.chaos.conftest import MakeJob

pytestmark = [pytest.mark.chaos, pytest.mark.long]

STEPS = 14
EXPERTS = (
    "--model.family", "deepseek_v3", "--model.layers", "2", "--training.steps", str(STEPS), "--cluster.spares", "0",
    "--cluster.nodes", "1", "--parallelism.tp", "1", "--parallelism.ep", "2",
)  # fmt: skip


def test_measuring_changes_nothing_and_the_best_stays(make_job: MakeJob, corpus: Path) -> None:
    """A worker is killed on the way: weights, losses and samples are those of a run without validation; every step
    that is due has a loss in metrics.jsonl and in its snapshot; the lowest of them is among those that stay."""
    plain = make_job("not-measured", EXPERTS).start()
    validation = f'--validation.sets=[{{path = "{corpus}/corpus"}}]'
    measures = (validation, "--validation.interval_steps=3", "--validation.batches=2", "--checkpoint.keep_best=1")
    measured = make_job("measured", (*EXPERTS, *measures))
    assert plain.finish() == 0, plain.said()
    measured.start()
    measured.wait_for_step(8)
    faults.kill_worker(measured.run_dir, "node0", 1)
    assert measured.finish() == 0, measured.said()
    assert measured.weights(STEPS) == plain.weights(STEPS)
    assert measured.losses() == plain.losses()
    assert measured.samples() == plain.samples()

    found = {record.step: record.validation_loss for record in measured.steps() if record.validation_loss is not None}
    assert sorted(found) == [3, 6, 9, 12, STEPS]
    assert "val_loss: " in measured.said()
    kept = disk.committed_steps(measured.run_dir)
    infos = {step: kept_info(disk.read_manifest(measured.run_dir, step)) for step in kept}
    assert {step: info.validation_loss for step, info in infos.items()} == {step: found[step] for step in kept}
    assert min(found, key=found.__getitem__) in kept
