"""The promise of all tiers together: whatever strikes snapshots and whenever, none that is not right is ever loaded,
no good one disappears, and the run ends as it would have undisturbed.

EVERSTEP_FAULTS says how many faults (`make chaos-checkpoint`: 200), EVERSTEP_CHAOS_SEED repeats the dice.
"""

from __future__ import annotations

import os
import random

import pytest

from checkpointing import disk
from cluster.rundir import RunDir
from tests.chaos.besieged import Besieger, Disks
from tests.chaos.bucket import BesiegedBucket
from tests.chaos.conftest import MakeJob
from tests.chaos.siege import Reference, Siege, row_of, told
from tests.chaos.storage import FailingDisk, Volume
from tests.faultproxy import FaultProxy
from tests.s3server import S3Server

pytestmark = pytest.mark.chaos

SAMPLE = 20
STEPS = 60
LAST_STEPS = 8
RUN_BYTES = 192 << 20
NODES_BYTES = 512 << 20
ALL_STATES_BYTES = 1 << 30
COMMON = ("--training.steps", str(STEPS), "--health.max_restarts", "1000")
UNDISTURBED = (
    *COMMON, "--cluster.nodes", "1", "--cluster.ranks_per_node", "4", "--cluster.spares", "0",
    "--checkpoint.peer_copies", "0", "--checkpoint.persist_interval_steps", "3", "--checkpoint.keep_every_steps", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> FailingDisk:
    """The library that makes calls fail."""
    return FailingDisk(tmp_path_factory.mktemp("failing-disk"))


def undisturbed(make_job: MakeJob) -> Reference:
    """What the run is without any fault, on one node: the same ranks, the same sums."""
    job = make_job("unbesieged", UNDISTURBED)
    with Volume(job.run_dir / "checkpoints", ALL_STATES_BYTES):
        assert job.start().finish() == 0, job.said()
        states = {step: job.weights(step) for step in disk.committed_steps(job.run_dir)}
    rows = {record.step: row_of(record) for record in job.steps()}
    return Reference(rows, states, job.samples())


def besiege(
    number: int, wanted: int, make_job: MakeJob, tools: FailingDisk, s3: S3Server, dice: random.Random, right: Reference
) -> int:  # fmt: skip
    """One job, and as many of the wanted faults as its steps allow; returns how many they were."""
    name = f"besieged-{number}"
    job = make_job(name)
    disks_dir = job.home / "disks" / name
    persist = dice.choice([2, 3])
    overrides = (
        *COMMON, "--cluster.spares", "2", "--checkpoint.persist_interval_steps", str(persist),
        "--checkpoint.node_dir", str(disks_dir), "--checkpoint.node_interval_steps", str(dice.choice([1, 2])),
    )  # fmt: skip
    job.environment = tools.environment()
    faults = 0
    with (
        FaultProxy(s3.port, dice.randrange(1 << 30)) as proxy,
        Volume(job.run_dir / "checkpoints", RUN_BYTES) as run,
        Volume(disks_dir, NODES_BYTES) as node,
        told(job),
    ):
        disks = Disks(run, node, RunDir(job.run_dir.absolute()).node_root(str(disks_dir)), tools)
        bucket = BesiegedBucket(s3, proxy, name, dice)
        job.arguments += [*overrides, *bucket.settings(2 * persist)]
        siege = Siege(job.start(), dice, right, bucket)
        besieger = Besieger(siege, disks)
        siege.wait(lambda: siege.mark().step >= 2, "the second step")
        while faults < wanted and not siege.done and siege.mark().step < STEPS - LAST_STEPS:
            besieger.fault()
            faults += 1
        siege.wait(lambda: siege.done, "the end")
        siege.check_end(STEPS)
    return faults


def test_no_fault_costs_more_than_time(
    make_job: MakeJob, failing_disk: FailingDisk, s3: S3Server, dice: random.Random
) -> None:
    """Promise: kills at any instant, damage in any tier, disks that are full, broken or read-only, one after another:
    every step that is logged is the undisturbed run's to the last bit, a good snapshot always stays, and so does the
    end: its weights, its losses, its samples."""
    wanted = int(os.environ.get("EVERSTEP_FAULTS", SAMPLE))
    right = undisturbed(make_job)
    done = number = 0
    while done < wanted:
        faults = besiege(number, wanted - done, make_job, failing_disk, s3, dice, right)
        assert faults > 0, "a job ended before anything struck it"
        done += faults
        number += 1
