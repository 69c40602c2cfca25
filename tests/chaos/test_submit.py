"""Promise: a job that is submitted goes on without a terminal, and `status` and `cancel` find it by its run's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.backend import read_submission
from tests.chaos.conftest import MakeJob

pytestmark = pytest.mark.chaos


def told(home: Path, *words: str) -> tuple[int, str]:
    """What a command says, and its exit code."""
    command = [sys.executable, "-m", "cluster.cli", *words]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_submitted_job_is_cancelled_and_goes_on_when_submitted_again(make_job: MakeJob, home: Path) -> None:
    """It saves before it leaves; nobody can submit it twice at the same time; a dry run takes no machine."""
    job = make_job("submitted", ("--training.steps", "500", "--parallelism.tp", "1", "--cluster.ranks_per_node", "1"))
    words = ("submit", *job.arguments[1:], "--spares", "0")
    code, said = told(home, *words, "--dry-run")
    assert code == 0
    assert "cluster.cli run" in said
    assert "--cluster.spares 0" in said
    assert not job.run_dir.exists()

    assert told(home, *words)[0] == 0
    job.wait_for_step(3)
    code, said = told(home, *words)
    assert (code, "already submitted as local" in said) == (2, True), said
    code, said = told(home, "status", "submitted")
    assert (code, "local " in said, "running (process" in said) == (0, True, True), said

    assert told(home, "cancel", "submitted")[0] == 0
    job.wait_until(lambda: not job.processes(), "an end")
    left_at = max(record.step for record in job.steps())
    assert (job.run_dir / "checkpoints" / f"step-{left_at}" / "manifest.json").exists()

    submission = read_submission(job.run_dir)
    code, said = told(home, *words, "--training.steps", str(left_at + 3))
    assert code == 0, said
    assert read_submission(job.run_dir) != submission
    job.wait_until((job.run_dir / "checkpoints" / f"step-{left_at + 3}").exists, "the last snapshot")
    job.wait_until(lambda: not job.processes(), "an end")
    steps = [record.step for record in job.steps()]
    assert steps == list(range(1, left_at + 4))


def test_what_cannot_be_submitted_says_why(home: Path) -> None:
    """A typo in the profile, in the configuration and in an option: each is named, and nothing was made."""
    (home / "site.toml").write_text("[slurm]\npartitoin = 'x'\n")
    for words, why in (
        (("submit", "job.toml", "--profile", "site.toml"), "slurm.partitoin"),
        (("submit", "job.toml", "--training.stpes", "3"), "training.stpes"),
        (("submit", "nowhere.toml"), "no such file or preset"),
        (("submit", "job.toml", "--run.name", "../x"), "run.name"),
        (("cancel", "never-was"), "no run 'never-was'"),
    ):
        code, said = told(home, *words)
        assert (code, why in said) == (2, True), said
