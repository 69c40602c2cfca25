"""What the supervisor knows of its agents, and pure questions about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.messages import AgentReport, AgentStatus, RamShardInfo


@dataclass(frozen=True)
class AgentView:
    """The newest report of an agent, and when it arrived (this machine's monotonic clock)."""

    report: AgentReport
    heard_at_s: float


def ready_members(members: Sequence[str], views: Mapping[str, AgentView], generation: int) -> list[str]:
    """Members that said they could start this generation."""
    return [
        node
        for node in members
        if node in views
        and (readiness := views[node].report.readiness) is not None
        and readiness.ready_for == generation
    ]


def common_ram_step(members: Sequence[str], views: Mapping[str, AgentView], ranks_per_node: int) -> int:
    """The newest step that every rank finds whole in the memory of the node it will run on; -1 if there is none.

    A rank's snapshot counts only where it was taken under the same number of ranks and, over all ranks, in the same
    generation: two halves of different histories never make one snapshot.
    """
    world_size = len(members) * ranks_per_node
    steps_of_rank: list[set[tuple[int, int]]] = []
    for index, node in enumerate(members):
        readiness = views[node].report.readiness
        held: Sequence[RamShardInfo] = readiness.ram if readiness else ()
        for rank in range(index * ranks_per_node, (index + 1) * ranks_per_node):
            steps_of_rank.append(
                {(s.generation, s.step) for s in held if s.rank == rank and s.world_size == world_size}
            )
    common = set.intersection(*steps_of_rank) if steps_of_rank else set()
    return max(common, default=(0, -1))[1]


def all_finished(members: Sequence[str], views: Mapping[str, AgentView], generation: int) -> bool:
    """Whether all members ended this generation well."""
    return all(
        node in views
        and views[node].report.status is AgentStatus.FINISHED
        and views[node].report.generation == generation
        for node in members
    )


def first_members(available: Sequence[str], wanted: int) -> tuple[str, ...]:
    """Who trains first: by natural order of their names, so that spares are the last ones."""
    return tuple(sorted(available, key=_natural)[:wanted])


def _natural(name: str) -> tuple[str, int]:
    digits = name[len(name.rstrip("0123456789")) :]
    return name[: len(name) - len(digits)], int(digits or 0)
