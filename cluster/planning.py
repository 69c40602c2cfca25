"""From what the fleet reported to a plan: who is which rank, and from which snapshot all go on. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.events import GenerationPlanned
from cluster.fleet import AgentView, common_snapshot, gatherings
from cluster.jobstate import JobState
from cluster.messages import Assignment, Gather, Plan
from configs.shrinking import Layout


def make_plan(
    generation: int,
    members: Sequence[str],
    ranks_per_node: int,
    views: Mapping[str, AgentView],
    state: JobState,
    layout: Layout | None = None,
) -> tuple[Plan, tuple[Gather, ...]]:
    """The plan, and what its nodes must fetch first. All members must have said that they are ready.

    layout: the mesh over the members, None for the configuration's own.

    A snapshot that lies in the nodes' memory or on their disks is taken unless the run directory has a newer one: a
    later step of an earlier generation is not newer, the job has gone on from before it.
    """
    first = views[members[0]].report.readiness
    assert first is not None
    snapshot = common_snapshot(len(members) * ranks_per_node, views, state.refused)
    if snapshot < state.newest_age:
        snapshot = (-1, -1)
    plan = Plan(
        generation=generation,
        nodes=tuple(members),
        ranks_per_node=ranks_per_node,
        store_host=first.store_host,
        store_port=first.store_port,
        ram_step=snapshot[1],
        ram_generation=snapshot[0],
        layout=layout,
    )
    return plan, gatherings(members, ranks_per_node, views, snapshot) if snapshot[1] >= 0 else ()


def assignment(plan: Plan, place: int) -> Assignment:
    """The plan for the node at this place in it; -1: for one that has none."""
    return Assignment(
        generation=plan.generation,
        place=place,
        nodes=len(plan.nodes),
        ranks_per_node=plan.ranks_per_node,
        store_host=plan.store_host,
        store_port=plan.store_port,
        ram_step=plan.ram_step,
        ram_generation=plan.ram_generation,
        layout=plan.layout,
    )


def plan_event(
    plan: Plan, gather: tuple[Gather, ...], reason: str, t_wall_s: float, t_mono_s: float
) -> GenerationPlanned:
    """The plan as the journal has it."""
    return GenerationPlanned(
        t_wall_s=t_wall_s,
        t_mono_s=t_mono_s,
        generation=plan.generation,
        nodes=plan.nodes,
        ranks_per_node=plan.ranks_per_node,
        store_host=plan.store_host,
        store_port=plan.store_port,
        ram_step=plan.ram_step,
        ram_generation=plan.ram_generation,
        gather=gather,
        reason=reason,
        layout=plan.layout,
    )


def planned(event: GenerationPlanned) -> Plan:
    """The plan that the journal tells of."""
    return Plan(
        generation=event.generation,
        nodes=event.nodes,
        ranks_per_node=event.ranks_per_node,
        store_host=event.store_host,
        store_port=event.store_port,
        ram_step=event.ram_step,
        ram_generation=event.ram_generation,
        layout=event.layout,
    )
