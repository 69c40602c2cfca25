"""The promise that nothing of a run stays on the machine, in its smallest print."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.rundir import RunDir
from tests.chaos import faults
from tests.chaos.conftest import MakeJob

pytestmark = pytest.mark.chaos


@pytest.mark.long
def test_a_node_killed_while_its_workers_start_leaves_no_semaphores(make_job: MakeJob) -> None:
    """Promise: names that only live until every worker has begun are removed also if that never came."""
    job = make_job("semaphores", ("--training.steps", "4")).start()
    names = f"sem.{RunDir(job.run_dir.absolute()).semaphore_prefix('node1')}*"
    job.wait_until(lambda: any(Path("/dev/shm").glob(names)), "semaphores")
    faults.kill_node(job.run_dir, "node1")
    assert any(Path("/dev/shm").glob(names)), "the kill was too late to prove anything"
    assert job.finish() == 0, job.said()
    assert job.leftovers() == []
