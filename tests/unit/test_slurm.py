"""Promises of the parts that speak SLURM, as far as they need none: parsing, names, steps, the watchdog's judgement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import slurm_steps
from cluster.rundir import RunDir
from cluster.slurm_backend import SlurmBackend
from cluster.slurm_commands import SlurmCommands, SlurmError, checked_job, checked_node, one_line
from cluster.slurm_scheduler import SlurmScheduler
from cluster.slurm_watch import Sight, why_gone
from configs.load import load_job
from configs.profile import ClusterProfile
from configs.schema import ClusterConfig

CLUSTER = ClusterConfig(lease_timeout_s=10.0, supervisor_lost_timeout_s=600.0)
WELL = Sight(unrenewed_s=0.5, unreachable_s=0.0, known_down=False)


def answering(tmp_path: Path, **programs: str) -> SlurmCommands:
    """SLURM's commands, of which these say these things."""
    for name, code in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
    return SlurmCommands({"PATH": f"{tmp_path}:/usr/bin:/bin", "SQUEUE_FORMAT": "%j"}, timeout_s=2.0)


@pytest.mark.parametrize(
    ("seen", "gone"),
    [
        (WELL, False),
        (dataclasses.replace(WELL, unreachable_s=99.0), False),
        (dataclasses.replace(WELL, known_down=True), False),
        (dataclasses.replace(WELL, unrenewed_s=99.0), False),
        (dataclasses.replace(WELL, unrenewed_s=99.0, known_down=True), True),
        (dataclasses.replace(WELL, unrenewed_s=99.0, unreachable_s=6.0), True),
        (dataclasses.replace(WELL, unrenewed_s=601.0), True),
    ],
)
def test_a_job_is_requeued_only_when_two_things_say_so(seen: Sight, gone: bool) -> None:
    """A supervisor on its way back, and a watchdog that is cut off, cost no training."""
    assert bool(why_gone(seen, CLUSTER)) is gone


@given(st.text())
def test_names_of_nodes_and_jobs_are_names(text: str) -> None:
    """Nothing that SLURM or a shell would read as more than one name is one."""
    for check in (checked_node, checked_job):
        try:
            assert check(text) == text
        except ValueError:
            continue
        assert not set(text) & set(" ,[]=%$`'\"\\;|&\n\t*()")
        assert not text.startswith("-")


@given(st.text())
def test_a_reason_is_one_short_line(text: str) -> None:
    """Evidence of several lines, or very long, does not become another field of SLURM's."""
    said = one_line(text)
    assert len(said) <= 200
    assert not any(ord(letter) < 32 for letter in said)


def test_what_is_given_to_srun_is_words(tmp_path: Path) -> None:
    """A run directory with anything in its name is an argument of the agent's shell, never a part of its code."""
    run_dir = RunDir(tmp_path / "a; rm -rf $HOME `id` 'x'")
    command = slurm_steps.agent_command(run_dir, "/dev/shm", "node1", slurm_steps.new_step_name("node1"))
    code = command[command.index("-c") + 1]
    assert "rm -rf $HOME" not in code
    assert command[-2:] == [str(run_dir.path), "node1"]
    with pytest.raises(ValueError, match="use letters, digits"):
        slurm_steps.agent_command(run_dir, "/dev/shm", "node[1-9]", "x")


def test_step_names_are_never_used_twice() -> None:
    """A requeued job counts its steps from 0 again: a handle of the attempt before must not fit a new one."""
    names = {slurm_steps.new_step_name("node1") for _ in range(1000)}
    assert len(names) == 1000
    name = names.pop()
    assert slurm_steps.split_handle(slurm_steps.handle_of("12", name)) == ("12", name)


def test_the_watchdog_gets_no_credentials() -> None:
    """Keys never appear in the environment of steps that have no use for them."""
    environ = {"PATH": "/bin", "SLURM_JOB_ID": "1", "WANDB_API_KEY": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    assert slurm_steps.bare_environment(environ) == {"PATH": "/bin", "SLURM_JOB_ID": "1"}


def test_what_squeue_says_is_parsed(tmp_path: Path) -> None:
    """Names and reasons with the separator in them, arrays, and jobs that are forgotten."""
    rows = "5_1|FAILED|node1|NonZeroExitCode\\n5_2|RUNNING|node[1-3]|None\\n5_[3-8%1]|PENDING||Job|Array, TaskLimit"
    slurm = answering(
        tmp_path,
        squeue=f"case \"$*\" in *-s*) printf '5.0|a|b\\n';; *) printf '{rows.replace('%', '%%')}\\n';; esac",
        scontrol="printf 'node1\\nnode2\\nnode3\\n'",
    )
    assert [(job.id, job.state) for job in slurm.jobs("5")][2] == ("5_[3-8%1]", "PENDING")
    assert slurm.jobs("5")[2].reason == "Job|Array, TaskLimit"
    assert [(step.id, step.name) for step in slurm.steps("5")] == [("5.0", "a|b")]
    status = SlurmBackend(ClusterProfile(), slurm).status("5")
    assert (status.state, status.detail, status.nodes) == (
        "running",
        "running on node[1-3]",
        ("node1", "node2", "node3"),
    )
    forgotten = answering(tmp_path, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert SlurmBackend(ClusterProfile(), forgotten).status("5").state == "unknown"
    assert forgotten.steps("5") == []


def test_nodes_are_listed_once_and_ours_are_known(tmp_path: Path) -> None:
    """A node in two partitions is one node; a reason of ours is told from an administrator's."""
    rows = "node1|idle|none\\nnode1|idle|none\\nnode2|down*|everstep: node_lost: x | y\\nnode3|drained|bad fan"
    backend = SlurmBackend(ClusterProfile(), answering(tmp_path, sinfo=f"printf '{rows}\\n'"))
    assert [(node.name, node.state, node.reason, node.ours) for node in backend.nodes()] == [
        ("node1", "idle", "", False),
        ("node2", "down*", "everstep: node_lost: x | y", True),
        ("node3", "drained", "bad fan", False),
    ]


def test_errors_say_whose_they_are(tmp_path: Path) -> None:
    """A refusal has SLURM's words, an unknown node is the user's, and a controller that hangs does not hang us."""
    refused = answering(tmp_path, scontrol="echo 'slurm_update error: Invalid user id' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid user id"):
        refused.update_node("node1", "drain", "x")
    unknown = answering(tmp_path, scontrol="echo 'slurm_update error: Invalid node name specified' >&2; exit 1")
    with pytest.raises(ValueError, match="everstep nodes"):
        unknown.update_node("node1", "drain", "x")
    with pytest.raises(SlurmError, match="did not answer in 2 s"):
        answering(tmp_path, squeue="exec sleep 30").jobs("5")
    with pytest.raises(SlurmError, match="sbatch is not installed here"):
        SlurmCommands({"PATH": str(tmp_path / "empty")}).submit("#!/bin/bash")


def test_outside_of_a_job_one_is_told_so(tmp_path: Path) -> None:
    """`everstep run` with the wrong backend names the command that makes a job."""
    config = load_job("debug_dense", ["--cluster.backend", "slurm"])
    with pytest.raises(ValueError, match="everstep submit --cluster slurm"):
        SlurmScheduler.inside(config, RunDir(tmp_path), {})
