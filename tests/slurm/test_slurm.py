"""Promises on a real SLURM: submit a job and forget it, whatever happens to its nodes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import psutil
import pytest

from cluster.events import RunStarted
from cluster.keys import JobKeys
from cluster.rundir import RunDir
from tests.slurm.conftest import QUOTED, STEPS, MakeSlurmJob, SlurmJob, unscheduled
from tests.slurm.lab import Lab

pytestmark = pytest.mark.slurm

LONGER = 60


def test_a_node_that_loses_power_is_replaced(
    make_job: MakeSlurmJob, lab: Lab, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a spare takes the ranks, SLURM is told why, and the weights are the undisturbed run's."""
    monkeypatch.setenv("WANDB_API_KEY", "a credential")
    job = make_job("power", 2).submit()
    job.wait_for_step(5)
    check_environments(job)
    host, *others = (lab.run("scontrol", "show", "hostnames", job.slurm()["NodeList"])).split()
    assert host == job.slurm()["BatchHost"]
    job.lose(others[0])
    assert job.ended() == "COMPLETED", job.said()
    assert job.causes() == ["node_lost"]
    assert lab.states()[others[0]].startswith("down")
    assert lab.reason(others[0]).startswith("everstep: node_lost: no heartbeat")
    assert "everstep: node_lost" in job.everstep("nodes", "--cluster", "slurm")
    assert job.weights(STEPS) == undisturbed


def check_environments(job: SlurmJob) -> None:
    """What the profile names arrives as it was written; credentials reach the agents, and nobody else; a key of the job
    is in no command line and no script."""
    agents, watchdogs = processes(job, "cluster.agent_main"), processes(job, "cluster.slurm_watch")
    assert (len(agents), len(watchdogs)) == (3, 1)
    assert {agent.environ()["EVERSTEP_TEST"] for agent in agents} == {QUOTED}
    assert {agent.environ()["WANDB_API_KEY"] for agent in agents} == {"a credential"}
    assert "WANDB_API_KEY" not in watchdogs[0].environ()
    keys = msgspec.json.decode((job.run_dir / "secrets" / "job.json").read_bytes(), type=JobKeys)
    secret = (keys.server.secret, keys.client.secret, "a credential")
    shown = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    shown += [job.lab.run("scontrol", "write", "batch_script", job.job_id, "-"), job.said()]
    assert not [text for text in shown if any(key in text for key in secret)]


def processes(job: SlurmJob, module: str) -> list[psutil.Process]:
    """The job's processes that run a module of ours; srun, which has the same words, is none of them."""
    found = psutil.process_iter(["cmdline", "name"])
    return [
        process
        for process in found
        if module in (process.info["cmdline"] or ())
        and str(job.run_dir) in process.info["cmdline"]
        and process.info["name"] not in ("srun", "slurmstepd")
    ]


@pytest.mark.long
def test_the_whole_job_is_requeued(make_job: MakeSlurmJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: `scontrol requeue` costs no more than what was not on disk yet, and no node is blamed. Before that,
    the death of the supervisor alone costs nothing: the script starts another, which takes over its steps."""
    job = make_job("requeued", 1).submit()
    job.wait_for_step(1)
    endpoint = RunDir(job.run_dir).read_endpoint()
    assert endpoint is not None
    os.kill(endpoint.pid, signal.SIGKILL)
    job.wait_until(lambda: "took over" in job.said(), "the take-over")
    job.wait_until(lambda: snapshots(job) != [], "a snapshot")
    lab.run("scontrol", "requeue", job.job_id)
    assert job.ended() == "COMPLETED", job.said()
    assert job.slurm()["Restarts"] == "1"
    assert began(job) == 2
    assert job.causes() == []
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_a_preempted_job_saves_and_comes_back_and_a_cancelled_one_does_not(make_job: MakeSlurmJob, lab: Lab) -> None:
    """Promise: in the grace time of a preemption the state is saved; the job is back when its nodes are, from there.
    `everstep cancel` saves too, and takes the job out of the queue for good."""
    job = make_job("preempted", 1, "--checkpoint.persist_interval_steps", "1000", "--training.steps", "1000").submit()
    job.wait_for_step(3)
    lab.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    job.wait_until(lambda: job.slurm()["JobState"] == "PENDING", "the requeue")
    assert "everstep run preempted: goes on from its newest snapshot" in lab.run("scontrol", "show", "job", job.job_id)
    (saved,) = snapshots(job)
    assert saved == job.steps()[-1].step
    job.wait_for_step(saved + 1)
    assert [record.step for record in job.steps()] == list(range(1, len(job.steps()) + 1))
    assert "running on node" in job.everstep("status", job.name)
    job.everstep("cancel", job.name)
    assert job.ended() == "CANCELLED", job.said()
    assert snapshots(job)[-1] == job.steps()[-1].step


@pytest.mark.long
def test_the_batch_host_dies(make_job: MakeSlurmJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: when the supervisor's own node is gone, which SLURM does not mend, the watchdog requeues the job."""
    job = make_job("headless", 2).submit()
    job.wait_until(lambda: snapshots(job) != [], "a snapshot")
    host = job.slurm()["BatchHost"]
    job.lose(host)
    job.wait_until(lambda: began(job) == 2, "the second attempt")
    assert lab.reason(host).startswith("everstep: batch host lost: it does not answer")
    assert job.ended() == "COMPLETED", job.said()
    assert host not in job.slurm()["NodeList"]
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_a_chain_of_jobs_goes_on_until_the_run_is_done(make_job: MakeSlurmJob, lab: Lab, home: Path) -> None:
    """Promise: what one job has no time for, the next one finishes, and the rest of the chain goes."""
    # So long that the first job is still at it when it is told that its time is up.
    longer = ("--training.steps", str(LONGER))
    undisturbed = unscheduled(home, "undisturbed-longer", *longer).weights(LONGER)
    job = make_job("chain", 1, *longer, profile='time_limit = "10"\nchain = 3').submit()
    job.wait_for_step(5)
    first = f"{job.job_id}_1"
    minutes = int(lab.job(first)["RunTime"].split(":")[1])
    lab.run("scontrol", "update", f"jobid={first}", f"TimeLimit={minutes + 2}")
    # What SLURM sends by itself when the time is nearly up; it looks only twice a minute. This scancel of 22.05 says
    # that the job is over already (229), though it runs and gets the signal: what follows shows that it did.
    lab.run("scancel", "--signal=TERM", "--batch", first, may_end_with=(0, 229))
    job.wait_until(lambda: began(job) == 2, "the second job")
    job.wait_until(lambda: "everstep: done" in job.said(), "the end")
    job.wait_until(lambda: not lab.run("squeue", "-h", "-j", job.job_id), "the end of the chain")
    rows = lab.run("squeue", "-h", "-t", "all", "-j", job.job_id, "-o", "%K %T").split("\n")
    # SLURM need not start them in their order.
    first_state, *others = [row.partition(" ")[2] for row in sorted(filter(None, rows))]
    assert (first_state, sorted(others)) == ("FAILED", ["CANCELLED", "COMPLETED"]), rows
    assert began(job) == 2
    assert lab.job(first)["Restarts"] == "0"
    assert job.weights(LONGER) == undisturbed


def snapshots(job: SlurmJob) -> list[int]:
    """Steps of the snapshots that are whole on disk."""
    found = (job.run_dir / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def began(job: SlurmJob) -> int:
    """How often the run began anew."""
    return sum(isinstance(event, RunStarted) for event in job.events())
