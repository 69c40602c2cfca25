"""Copies in peers' memory: a node's death or leave costs no finished step, and a false state is never gone on from."""

from __future__ import annotations

import json
import random
import signal
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from checkpointing import disk
from checkpointing.checksum import checksum
from checkpointing.layout import Manifest, encode_document
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.test_identical import assert_same_run

pytestmark = pytest.mark.chaos

# The disk has only the last state: whatever is brought back comes from memory.
MEMORY_ONLY = ("--checkpoint.persist_interval_steps", "1000", "--cluster.spares", "2")


def steps_computed_twice(job: Job) -> list[int]:
    """Steps that were logged as finished and had to be computed again."""
    return [step for step, times in Counter(record.step for record in job.steps()).items() if times > 1]


def test_the_death_of_any_node_costs_no_finished_step(make_job: MakeJob, dice: random.Random) -> None:
    """Promise: with one copy in a peer's memory each node may die, at any moment, and no finished step is lost."""
    undisturbed = make_job("copies-undisturbed", MEMORY_ONLY).start()
    assert undisturbed.finish() == 0, undisturbed.said()
    job = make_job("copies", MEMORY_ONLY).start()
    for victim, step in (("node1", 3), ("node0", 13)):
        job.wait_for_step(step + dice.randrange(4))
        faults.wait_a_part_of_a_step(job, dice)
        faults.kill_node(job.run_dir, victim)
    assert job.finish() == 0, job.said()
    assert job.causes() == ["node_lost", "node_lost"]
    assert steps_computed_twice(job) == []
    assert "loaded from disk" not in job.said()
    assert_same_run(job, undisturbed)


def test_a_node_that_is_told_to_leave_hands_over(make_job: MakeJob) -> None:
    """Promise: SIGTERM to a node's agent, as before a preemption, costs nothing: all save, and a spare goes on."""
    job = make_job("preempted", ("--checkpoint.peer_copies", "0")).start()
    job.wait_for_step(4)
    faults.agent_process(job.run_dir, "node1").send_signal(signal.SIGTERM)
    job.wait_until(lambda: "preempted" in job.causes(), "the hand-over")
    assert job.finish() == 0, job.said()
    assert (job.causes(), job.actions()) == (["preempted"], ["replace"])
    assert steps_computed_twice(job) == []


@pytest.mark.long
def test_without_a_spare_a_node_that_leaves_ends_the_run_saved(make_job: MakeJob) -> None:
    """Promise: with nobody to take over, the run ends with 75, and goes on from the very step it left at."""
    job = make_job("preempted-alone", ("--cluster.spares", "0", "--training.steps", "10")).start()
    job.wait_for_step(4)
    faults.agent_process(job.run_dir, "node0").send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.said()
    assert job.start().finish() == 0, job.said()
    assert steps_computed_twice(job) == []


def falsify(run_dir: Path, step: int) -> None:
    """Change the weights of a snapshot and make all its checksums right again: only training can tell."""
    manifest = disk.read_manifest(run_dir, step)
    folder = disk.step_dir(run_dir, step)
    shards = []
    for shard in manifest.shards:
        path = folder / shard.file
        data = bytearray(path.read_bytes())
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        for name in names:
            start, end = (shard.data_start_bytes + offset for offset in header[name]["data_offsets"])
            values = np.frombuffer(data, np.float32, (end - start) // 4, start)
            values *= 1.5
        path.write_bytes(data)
        shards.append(
            type(shard)(**{f: getattr(shard, f) for f in shard.__struct_fields__} | {"checksum": checksum(data)})
        )
    whole = {f: getattr(manifest, f) for f in Manifest.__struct_fields__} | {"shards": tuple(shards)}
    disk.write_atomic(folder / "manifest.json", encode_document(Manifest(**whole)))


@pytest.mark.long
def test_a_state_that_is_not_the_runs_own_is_rejected(make_job: MakeJob) -> None:
    """Promise: right checksums and wrong weights show in the first loss, and the older snapshot is taken."""
    overrides = ("--checkpoint.keep_last", "4", "--cluster.spares", "0", "--training.steps", "12")
    job = make_job("canary", overrides).start()
    assert job.finish() == 0, job.said()
    before = job.weights(12), job.losses()
    manifest = job.run_dir / "checkpoints" / "step-12" / "manifest.json"
    manifest.unlink()
    falsify(job.run_dir, 9)
    assert job.start().finish() == 0, job.said()
    assert "snapshot of step 9 distrusted" in job.said()
    assert "state of step 6 loaded from disk" in job.said()
    assert (job.weights(12), job.losses()) == before
