"""A real cut of a node's network: its ranks go on elsewhere, it stops by itself, writes nothing more, and stays out."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from checkpointing.disk import committed_steps, read_manifest
from cluster.events import GenerationPlanned, NodeEvicted, RunStopped
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.spaces import INTERFACE, Spaces

pytestmark = [pytest.mark.chaos, pytest.mark.long]

NODES = ("node0", "node1", "node2")
STEPS = 120
LEASE_S = 6.0
HEARTBEAT_S = 4.0
SLACK_S = 8.0
"""A few seconds for a machine that does much else."""


@pytest.fixture
def spaces() -> Iterator[Spaces]:
    try:
        with Spaces(("sup", *NODES)) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"LOUD: network namespaces cannot be had here ({error})")


def apart(make_job: MakeJob, spaces: Spaces, folder: Path, name: str, *overrides: str) -> Job:
    """A job whose supervisor and nodes meet only over the bridge."""
    lease = ("--cluster.lease_timeout_s", str(LEASE_S), "--cluster.interface", INTERFACE)
    job = make_job(name, (*overrides, *lease))
    job.launcher, job.module = spaces.enter("sup"), "tests.chaos.partition_run"
    (folder / "cut").mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    job.environment = {
        "EVERSTEP_TEST_SPACES": spaces.prefix, "EVERSTEP_TEST_CUT": str(folder / "cut"), "PYTHONPATH": root
    }  # fmt: skip
    return job


def processes_of(job: Job, node: str) -> list[psutil.Process]:
    """The node's agent and all that it started."""
    return [process for log in (job.run_dir / "logs" / node).glob("*.log") for process in _living(log)]


def workers_of(job: Job, node: str) -> list[psutil.Process]:
    """The node's ranks that live."""
    return [process for log in (0, 1) for process in _living(job.run_dir / "logs" / node / f"{log}.log")]


def _living(log: Path) -> list[psutil.Process]:
    found = faults.processes_writing(log.resolve())
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def cut(job: Job, spaces: Spaces, folder: Path, node: str) -> float:
    """Cut a node off, for the owner of the machines too; returns when."""
    (folder / "cut" / node).touch()
    spaces.cut(node)
    return time.monotonic()


def heal(spaces: Spaces, folder: Path, node: str) -> None:
    spaces.heal(node)
    (folder / "cut" / node).unlink()


def evicted(job: Job) -> list[str]:
    return [event.node for event in job.events() if isinstance(event, NodeEvicted)]


def second_plan(job: Job) -> GenerationPlanned | None:
    return next((e for e in job.events() if isinstance(e, GenerationPlanned) and e.generation == 2), None)


def stood_still(job: Job, node: str, since_wall_s: float) -> bool:
    """Whether nothing that only this node writes has been touched since then."""
    return all(path.stat().st_mtime <= since_wall_s for path in (job.run_dir / "logs" / node).glob("*"))


def test_the_cut_off_side_stops_by_itself_and_commits_nothing(
    make_job: MakeJob, spaces: Spaces, tmp_path: Path
) -> None:
    """Promise: a node that can go on training alone, and reaches the run directory, stops within the lease's time-out;
    from the moment its ranks are given away it commits nothing; healed, nothing of it comes back; weights are those of
    the undisturbed run."""
    alone = ("--cluster.nodes", "1", "--parallelism.tp", "1", "--training.steps", str(STEPS))
    alone += ("--checkpoint.persist_interval_steps", "3", "--checkpoint.keep_last", "1000")
    alone += ("--checkpoint.peer_copies", "0")
    straight = make_job("whole", alone).start()
    job = apart(make_job, spaces, tmp_path, "cut-alone", *alone)
    assert straight.finish(400) == 0, straight.said()

    job.start()
    job.wait_for_step(5)
    began_s = cut(job, spaces, tmp_path, "node0")
    job.wait_until(lambda: second_plan(job) is not None, "the spare's plan")
    assert evicted(job) == ["node0"]
    job.wait_until(lambda: not workers_of(job, "node0"), "the cut-off side's end", 60)
    took_s = time.monotonic() - began_s
    assert LEASE_S < took_s < LEASE_S + HEARTBEAT_S + SLACK_S, "by itself, and in time"
    job.wait_until(lambda: not processes_of(job, "node0"), "its agent's end", 60)
    ended_wall_s = time.time()
    plan = second_plan(job)
    assert plan is not None
    assert plan.nodes == ("node1",)
    heal(spaces, tmp_path, "node0")
    assert job.finish(400) == 0, job.said()

    assert stood_still(job, "node0", ended_wall_s)
    assert evicted(job) == ["node0"]
    assert "cut off" in (job.run_dir / "logs" / "node0" / "agent.log").read_text()
    late = [
        (step, manifest.generation)
        for step in committed_steps(job.run_dir)
        if (manifest := read_manifest(job.run_dir, step)).generation == 1 and manifest.t_wall_s > plan.t_wall_s
    ]
    assert late == [], "snapshots of a history that was given up"
    trained_on = [row.step for row in job.steps() if row.generation == 1 and row.t_wall_s > plan.t_wall_s]
    assert len(trained_on) > 3, "otherwise this shows nothing"
    assert job.weights(STEPS) == straight.weights(STEPS)
    assert job.losses() == straight.losses()


def test_a_node_that_comes_back_in_time_is_refused(make_job: MakeJob, spaces: Spaces, tmp_path: Path) -> None:
    """Promise: healed before its lease is over, the node that lost its ranks is told to leave, and training goes on
    where it was moved; weights are those of the undisturbed run."""
    two = ("--parallelism.tp", "1", "--cluster.ranks_per_node", "1", "--training.steps", "60")
    straight = make_job("whole-2", two).start()
    job = apart(make_job, spaces, tmp_path, "cut-briefly", *two, "--cluster.lease_timeout_s", "60")
    assert straight.finish(400) == 0, straight.said()

    job.start()
    job.wait_for_step(5)
    cut(job, spaces, tmp_path, "node0")
    job.wait_until(lambda: second_plan(job) is not None, "the spare's plan")
    assert processes_of(job, "node0"), "nobody has ended it yet"
    heal(spaces, tmp_path, "node0")
    job.wait_until(lambda: not processes_of(job, "node0"), "its leaving", 60)
    assert job.finish(400) == 0, job.said()
    assert evicted(job) == ["node0"]
    plans = [event.nodes for event in job.events() if isinstance(event, GenerationPlanned)]
    assert plans == [("node0", "node1"), ("node2", "node1")]
    assert job.weights(60) == straight.weights(60)
    stopped = [event for event in job.events() if isinstance(event, RunStopped)]
    assert [event.exit_code for event in stopped] == [0]
