"""What `everstep submit` and its companions need of a site: the same seven calls on all three kinds of cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from cluster.rundir import GARBLED, write_atomically
from configs.profile import ClusterProfile
from configs.schema import JobConfig

ClusterKind = Literal["local", "slurm", "kubernetes"]
JobState = Literal["pending", "running", "done", "failed", "cancelled", "unknown"]

_FILE = "submission.json"


class JobRequest(msgspec.Struct, frozen=True):
    """A job to submit. config is what config_path and overrides resolve to, checked; working_dir is where they hold."""

    config_path: str
    overrides: tuple[str, ...]
    config: JobConfig
    profile: ClusterProfile
    run_dir: Path
    working_dir: Path


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was submitted for a run, and where: kept in the run's folder. job_id is the cluster's own name for it.

    runs: where its nodes keep runs, if that is not where this file is.
    """

    run: str
    cluster: ClusterKind
    job_id: str
    t_wall_s: float
    namespace: str = ""
    context: str = ""
    runs: str = ""


class JobStatus(msgspec.Struct, frozen=True):
    """How the owner of the machines sees a job; detail is a line for people, its reason included."""

    state: JobState
    detail: str
    nodes: tuple[str, ...] = ()


class NodeStatus(msgspec.Struct, frozen=True):
    """How the owner of the machines sees one of them. ours: the reason it is out of work was given by everstep."""

    name: str
    state: str
    reason: str
    ours: bool


class Backend(Protocol):
    """A kind of cluster. Every call raises OSError if the cluster cannot be reached or refuses, with its own words."""

    def render(self, request: JobRequest) -> str:
        """Exactly what `submit` would hand over, as text."""

    def submit(self, request: JobRequest) -> str:
        """Submit; returns the job's name on the cluster."""

    def status(self, job_id: str) -> JobStatus:
        """How the job stands; `unknown` if the cluster has forgotten it."""

    def cancel(self, job_id: str) -> None:
        """Have the job save and leave, and not come back. One that is over already is no error."""

    def drain(self, node: str, reason: str) -> None:
        """Give a node no more work. ValueError if there is no such node."""

    def readmit(self, node: str) -> None:
        """Let a node work again. ValueError if there is no such node."""

    def nodes(self) -> Sequence[NodeStatus]:
        """All nodes that the cluster would show us."""


def open_backend(kind: ClusterKind, profile: ClusterProfile) -> Backend:
    """The backend of that kind; what only it needs is imported now."""
    match kind:
        case "slurm":
            from cluster.slurm_backend import SlurmBackend

            return SlurmBackend(profile)
        case "kubernetes":
            from cluster.kube_backend import KubeBackend

            return KubeBackend(profile)
        case "local":
            from cluster.local_backend import LocalBackend

            return LocalBackend()


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Keep what was submitted, so that any machine that sees the run's folder can ask after it."""
    write_atomically(run_dir / _FILE, msgspec.json.encode(submission))


def read_submission(run_dir: Path) -> Submission | None:
    """What was submitted for the run last, or None if it was started by hand.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return msgspec.json.decode((run_dir / _FILE).read_bytes(), type=Submission)
    except FileNotFoundError:
        return None
    except GARBLED as error:
        raise ValueError(f"{run_dir / _FILE} is damaged ({error}); remove it and submit the run again") from error
