"""One Kubernetes of four nodes for the session, and small jobs for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cluster.backend import read_submission
from cluster.cli import main  # noqa: F401  what a job's commands run; a broken import is told here
from tests.chaos.conftest import CONFIG, corpus  # noqa: F401  a fixture
from tests.chaos.jobs import Job
from tests.kubernetes.kubelet import missing_binaries
from tests.kubernetes.lab import Lab
from tests.kubernetes.store import Object

STEPS = 30
NODES = ("gpu-1", "gpu-2", "gpu-3", "gpu-4")
CONTROL = "control-1"
# What neither a shell, YAML nor Kubernetes may take for more than text.
QUOTED = "a 'quoted' \"$HOME\" $(HOME) $$ `id` \\ #word; {{x}} : - &a *a"
_PROFILE = """
python = "{python}"

[environment]
OMP_NUM_THREADS = "1"
EVERSTEP_TEST = '''{quoted}'''

[kubernetes]
image = "registry.example/everstep:1"
kind = "{kind}"
service_account = ""
run_dir = "{runs}"
grace_s = 75
bad_node = "taint"
run_as_user = 0
node_selector = {{ pool = "gpu" }}
supervisor_selector = {{ {selector} }}
domain_label = "rack"

[[kubernetes.mounts]]
path = "{runs}"
host_path = "{runs}"
"""
# Two ranks on one node or on two are the same ranks: the weights are those of one undisturbed run.
_ONE_NODE = ("--cluster.nodes", "1", "--cluster.ranks_per_node", "2", "--cluster.spares", "0")
_TWO_NODES = ("--cluster.nodes", "2", "--cluster.ranks_per_node", "1", "--cluster.spares", "1")
_SMALL = ("--parallelism.dp_shard", "2", "--parallelism.tp", "1", "--training.steps", str(STEPS))


class KubeJob(Job):
    """A run that is submitted; its node history is its own."""

    def __init__(
        self, lab: Lab, home: Path, name: str, overrides: Sequence[str], kind: str = "jobset", on_gpus: bool = False
    ) -> None:
        super().__init__(home, name, "job.toml", (*overrides, "--cluster.interface", "lo"))
        self.lab = lab
        self.profile = home / f"{name}.site.toml"
        selector = "" if on_gpus else 'pool = "control"'
        text = _PROFILE.format(
            python=sys.executable, quoted=QUOTED, kind=kind, runs=home / "runs", selector=selector
        )  # fmt: skip
        self.profile.write_text(text)

    def submit(self) -> KubeJob:
        """`everstep submit`, as a user does it."""
        words = ("--cluster", "kubernetes", "--profile", str(self.profile))
        assert f"submitted {self.name}" in self.everstep("submit", self.arguments[1], *words, *self.arguments[2:])
        return self

    def everstep(self, *words: str) -> str:
        """What a command of ours says where users log in."""
        return run_everstep(self.lab, self.home, *words)

    def said(self) -> str:
        """All that the job's pods printed, and how they stand."""
        return self.lab.said()

    def workload(self) -> Object | None:
        """The JobSet, or the supervisor's Job."""
        submission = read_submission(self.run_dir)
        assert submission is not None
        kind, _, name = submission.job_id.partition("/")
        if kind == "jobset":
            return self.lab.store.find("jobsets.jobset.x-k8s.io", "default", name)
        return self.lab.store.find("jobs.batch", "default", f"{name}-supervisor")

    def state(self) -> str:
        """The condition that ended the workload, "" while it goes on, "gone" if it is no more."""
        found = self.workload()
        if found is None:
            return "gone"
        conditions = found.get("status", {}).get("conditions", ())
        return next((each["type"] for each in conditions if each["status"] == "True"), "")

    def ended(self, timeout_s: float = 120.0) -> str:
        """Wait until the workload has ended; returns how."""
        self.wait_until(lambda: self.state() != "", "the end", timeout_s)
        return self.state()

    def members(self) -> list[str]:
        """Nodes that hold ranks now."""
        planned = [event.nodes for event in self.events() if type(event).__name__ == "GenerationPlanned"]
        return list(planned[-1]) if planned else []


MakeKubeJob = Callable[..., KubeJob]


def run_everstep(lab: Lab, home: Path, *words: str) -> str:
    """What a command of ours says to an administrator of the lab."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words],
        cwd=home,
        env={**os.environ, "KUBECONFIG": str(lab.kubeconfig())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"everstep {' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A Kubernetes of four nodes with GPUs, on two racks, and one without."""
    if missing := missing_binaries():
        pytest.skip(f"JOBS ON KUBERNETES WERE NOT TESTED: {', '.join(missing)} not installed")
    if os.geteuid() != 0:
        pytest.skip("JOBS ON KUBERNETES WERE NOT TESTED: process namespaces need root")
    gpus = {node: {"pool": "gpu", "rack": f"rack-{index // 2 + 1}"} for index, node in enumerate(NODES)}
    with Lab(tmp_path_factory.mktemp("kubernetes"), {**gpus, CONTROL: {"pool": "control"}}) as running:
        yield running


@pytest.fixture(scope="session")
def home(corpus: Path) -> Iterator[Path]:  # noqa: F811
    """Where the session's runs live, with `job.toml` in it. Pods see it under the same path as this machine does, and
    every pod has a folder for temporary files of its own; so it is in none of those."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everstep"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jobs-", dir=cache) as name:
        folder = Path(name)
        (folder / "job.toml").write_text(CONFIG.format(corpus=corpus))
        (folder / "runs").mkdir()
        yield folder


@pytest.fixture(scope="session")
def undisturbed(home: Path) -> dict[str, str]:
    """The weights of the same training without Kubernetes and without a fault."""
    job = Job(home, "undisturbed", "job.toml", (*_SMALL, *_ONE_NODE)).start()
    assert job.finish() == 0, job.said()
    return job.weights(STEPS)


@pytest.fixture
def make_job(lab: Lab, home: Path) -> Iterator[MakeKubeJob]:
    """Makes jobs. After each test the cluster is empty and whole again, and nothing of the jobs is left."""
    made: list[KubeJob] = []

    def make(name: str, nodes: int, *more: str, kind: str = "jobset", on_gpus: bool = False) -> KubeJob:
        layout = _ONE_NODE if nodes == 1 else _TWO_NODES
        made.append(KubeJob(lab, home, name, (*_SMALL, *layout, *more), kind, on_gpus))
        return made[-1]

    yield make
    lab.repair()
    lab.wait_until(
        lambda: not any(job.leftovers() for job in made), f"an end of {[job.leftovers() for job in made]}", 15
    )
