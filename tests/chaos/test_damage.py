"""Snapshots that are damaged on disk: each noticed, said in one line, and trained through from the last good one."""

from __future__ import annotations

import shutil

import pytest

from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from trainer.ledger import check_exactly_once, committed_samples

pytestmark = pytest.mark.chaos

SMALL = ("--checkpoint.persist_interval_steps", "2", "--checkpoint.keep_last", "10", "--cluster.spares", "0")


@pytest.mark.long
def test_the_newest_whole_snapshot_is_used(make_job: MakeJob) -> None:
    """Promise: a flipped byte, a missing shard, a truncated manifest and a torn write are each refused by name."""
    job = make_job("damaged", SMALL).start("--training.steps", "10")
    assert job.finish() == 0, job.said()
    undisturbed = job.weights(10)
    checkpoints = job.run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step-8", checkpoints / "step-12")  # torn: no manifest came
    (checkpoints / "step-12" / "manifest.json").unlink()
    faults.flip_byte(next((checkpoints / "step-10").glob("*rank00002.safetensors")), 100_000)
    next((checkpoints / "step-8").glob("*rank00001.safetensors")).unlink()
    manifest = checkpoints / "step-6" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    job.start("--training.steps", "11")
    assert job.finish() == 0, job.said()
    said = job.said()
    for step, what in ((10, "rank00002.safetensors"), (8, "rank00001.safetensors"), (6, "manifest")):
        line = next(line for line in said.splitlines() if f"snapshot of step {step} rejected" in line)
        assert what in line
    assert "state of step 4 loaded from disk" in said
    assert job.weights(10) == undisturbed
    assert "Traceback" not in said


def test_a_full_disk_costs_snapshots_but_no_step(make_job: MakeJob) -> None:
    """Promise: when no snapshot can be written, training goes on, says so, and saves again when there is room."""
    overrides = ("--checkpoint.persist_interval_steps", "2", "--cluster.spares", "0", "--training.steps", "16")
    job = make_job("full-disk", overrides)
    disk = faults.SmallDisk(job.run_dir, size_bytes=96 << 20)
    with disk:
        job.start()
        job.wait_for_step(3)
        disk.fill()
        job.wait_until(lambda: "snapshot not saved" in job.said(), "the failure")
        disk.free()
        assert job.finish() == 0, job.said()
        assert "No space left" in job.said()
        assert (job.run_dir / "checkpoints" / "step-16" / "manifest.json").exists()
        assert sorted(job.losses()) == list(range(1, 17))
        check_exactly_once(committed_samples(job.run_dir), 16, 8)
