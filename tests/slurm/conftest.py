"""One SLURM of four nodes for the session, and small jobs for it. Says so and skips where SLURM is not installed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cluster.backend import read_submission
from configs.tomltext import toml_value
from tests.chaos.conftest import CONFIG, corpus  # noqa: F401  a fixture
from tests.chaos.jobs import Job
from tests.slurm.lab import Lab, missing_binaries

STEPS = 30
# What neither a shell nor sbatch may take for more than text.
QUOTED = "a 'quoted' \"$HOME\" `id` \\ #word;"
_PROFILE = """
[environment]
OMP_NUM_THREADS = "1"
EVERSTEP_TEST = {quoted}

[slurm]
partition = "main"
constraint = "h100"
gres = "gpu:1"
grace_s = 30
bad_node = "down"
{more}
"""
# Two ranks on one node or on two are the same ranks: the weights are those of one undisturbed run.
_ONE_NODE = ("--cluster.nodes", "1", "--cluster.ranks_per_node", "2", "--cluster.spares", "0")
_TWO_NODES = ("--cluster.nodes", "2", "--cluster.ranks_per_node", "1", "--cluster.spares", "1")
_SMALL = ("--parallelism.dp_shard", "2", "--parallelism.tp", "1", "--training.steps", str(STEPS))


class SlurmJob(Job):
    """A run that is submitted, in the lab's own network; its node history is its own."""

    def __init__(self, lab: Lab, home: Path, name: str, overrides: Sequence[str], profile: str = "") -> None:
        super().__init__(home, name, "job.toml", overrides)
        self.lab = lab
        self.profile = home / f"{name}.site.toml"
        self.profile.write_text(_PROFILE.format(more=profile, quoted=toml_value(QUOTED)))

    @property
    def job_id(self) -> str:
        """SLURM's number for it."""
        submission = read_submission(self.run_dir)
        assert submission is not None
        return submission.job_id

    def submit(self) -> SlurmJob:
        """`everstep submit`, as a user does it."""
        words = ("--cluster", "slurm", "--profile", str(self.profile))
        assert f"submitted {self.name}" in self.everstep("submit", self.arguments[1], *words, *self.arguments[2:])
        return self

    def everstep(self, *words: str) -> str:
        """What a command of ours says where users log in."""
        return self.lab.run(sys.executable, "-m", "cluster.cli", *words, cwd=self.home)

    def said(self) -> str:
        """All that the job printed: scripts, supervisor and srun."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.run_dir.glob("slurm-*")))

    def slurm(self) -> dict[str, str]:
        """SLURM's own view of the job."""
        return self.lab.job(self.job_id)

    def ended(self, timeout_s: float = 120.0) -> str:
        """Wait until SLURM is done with the job; returns its last state."""
        self.wait_until(
            lambda: self.slurm()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end", timeout_s
        )
        return self.slurm()["JobState"]

    def lose(self, node: str) -> None:
        """The node loses power, and with it its memory."""
        self.lab.power_off(node)
        for folder in Path("/dev/shm").glob(f"everstep-*/{node}"):
            shutil.rmtree(folder)


MakeSlurmJob = Callable[..., SlurmJob]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running SLURM of four nodes."""
    missing = missing_binaries()
    if missing:
        pytest.skip(f"SLURM WAS NOT TESTED: {', '.join(missing)} not installed; `make slurm-packages` installs them")
    if os.geteuid() != 0:
        pytest.skip("SLURM WAS NOT TESTED: network namespaces need root")
    with Lab(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:  # noqa: F811
    """Where the session's runs live, with `job.toml` in it."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "job.toml").write_text(CONFIG.format(corpus=corpus))
    return folder


@pytest.fixture(scope="session")
def undisturbed(home: Path) -> dict[str, str]:
    """The weights of the same training without SLURM and without a fault."""
    return unscheduled(home, "undisturbed").weights(STEPS)


def unscheduled(home: Path, name: str, *more: str) -> Job:
    """The same training without SLURM, to its end."""
    job = Job(home, name, "job.toml", (*_SMALL, *_ONE_NODE, *more)).start()
    assert job.finish() == 0, job.said()
    return job


@pytest.fixture
def make_job(lab: Lab, home: Path) -> Iterator[MakeSlurmJob]:
    """Makes jobs. After each test the cluster is idle and whole again, and nothing of the jobs is left."""
    made: list[SlurmJob] = []

    def make(name: str, nodes: int, *more: str, profile: str = "") -> SlurmJob:
        layout = _ONE_NODE if nodes == 1 else _TWO_NODES
        made.append(SlurmJob(lab, home, name, (*_SMALL, *layout, *more), profile))
        return made[-1]

    yield make
    lab.repair()
    # A fork server ends when it sees that its agent has.
    lab.wait_until(
        lambda: not any(job.leftovers() for job in made), f"an end of {[job.leftovers() for job in made]}", 15
    )
