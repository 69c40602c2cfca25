"""What Everstep needs of whoever owns the machines, while a job runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from cluster.rundir import RunDir
from configs.schema import JobConfig
from health.verdict import Verdict


class Scheduler(Protocol):
    """Starts agents and ends nodes. Handles are strings, since they outlive this process in the journal."""

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> Sequence[str]:
        """Nodes that agents may be started on, best first; on a machine that has any number of them, `count`.

        Where nodes come one by one it waits for enough. usable: how many of these the run would take; stopped: whether
        it is to end, so that nothing is waited for.
        """

    def start(self, node: str) -> str:
        """Start the agent of a node; returns a handle for the calls below."""

    def alive(self, handle: str) -> bool:
        """Whether the scheduler knows the agent to be running; False only when it is sure that it is not."""

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """End the agent and all its workers now, and give back what they held.

        for_good: the run has given the node up, and the owner may put another one in its place.
        """

    def appeared(self) -> Sequence[str]:
        """Nodes that may be started and were not there before, or are there again. Never raises, never waits."""

    def verdicts(self, step: int, nodes: Collection[str]) -> Sequence[Verdict]:
        """What the owner of the machines says of these nodes, as far as agents run on them, each thing once while it
        lasts. One of cause `preempted` is a notice that the node will be taken away. Never raises, never waits."""

    def report_bad(self, node: str, reason: str) -> None:
        """Tell whoever owns the node that it is bad, in words for its administrator. Never raises, never waits."""

    def last_words(self, node: str) -> tuple[str, ...]:
        """Last lines that the agent printed: evidence for an agent that never spoke."""

    def close(self) -> None:
        """Give back what the run held, when all its agents are gone."""


def open_scheduler(config: JobConfig, run_dir: RunDir, environ: Mapping[str, str]) -> Scheduler:
    """The scheduler of `cluster.backend`; what only it needs is imported now.

    Raises:
        ValueError: if this process does not run inside such a job.
    """
    match config.cluster.backend:
        case "slurm":
            from cluster.slurm_scheduler import SlurmScheduler

            return SlurmScheduler.inside(config, run_dir, environ)
        case "kubernetes":
            from cluster.kube_scheduler import KubeScheduler

            return KubeScheduler.inside(config, run_dir, environ)
        case "local":
            from cluster.local import LocalScheduler

            return LocalScheduler(run_dir, config.checkpoint.ram_dir)
