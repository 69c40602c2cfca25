"""Who holds which ranks: the generation that is wanted, and the plan that all follow once everybody is ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.fleet import AgentView, all_finished, ready_members
from cluster.jobstate import JobState
from cluster.messages import AgentReport, Assignment, Gather, Plan, Sources
from cluster.placement import Placement
from cluster.planning import assignment, make_plan
from configs.schema import JobConfig
from configs.shrinking import Layout, largest_layout


class Generations:
    """The newest generation, from the wish for it to its end. `views` is the supervisor's own mapping.

    members: the nodes that hold ranks, or shall, by rank. number: of the generation that is wanted; agents with an
    older one stop their workers. plan, gather: None and nothing until all members are ready for it. begun_s: when it
    was asked for, monotonic.

    A report costs the same in a fleet of any size: what all of them amount to is kept up with each (`hear`, `forget`).
    """

    def __init__(self, config: JobConfig, views: Mapping[str, AgentView], number: int) -> None:
        self.config = config
        self.views = views
        self.number = number
        self.members: tuple[str, ...] = ()
        self.plan: Plan | None = None
        self.gather: tuple[Gather, ...] = ()
        self.placement = Placement(config.checkpoint.peer_copies)
        self.reason = "start"
        self.begun_s = 0.0
        self._places: dict[str, int] = {}
        self._ready: set[str] = set()
        self._ready_since_s = float("inf")
        self._nodes_before = 0
        self._assigned: dict[str, Assignment] = {}
        self._unassigned: Assignment | None = None
        self._gathers: dict[str, list[Gather]] = {}

    def begin(self, members: Sequence[str], reason: str, now_s: float) -> None:
        """Want a new generation, of these nodes."""
        self._set_members(members)
        self.number += 1
        self.plan = None
        self.reason = reason
        self.begun_s = now_s
        self._ready_since_s = float("inf")
        self._ready = set(ready_members(self.members, self.views, self.number))

    def resume(self, plan: Plan, gather: Sequence[Gather], members: Sequence[str]) -> None:
        """Take up what a dead supervisor planned last; members: who holds the ranks since its last decision."""
        self._set_members(members)
        self.number = plan.generation
        self.gather = tuple(gather)
        self._nodes_before = len(plan.nodes)

    def follow(self, plan: Plan) -> None:
        """This is the plan now."""
        self.plan = plan
        self._nodes_before = len(plan.nodes)
        self._assigned = {node: assignment(plan, place) for place, node in enumerate(plan.nodes)}
        self._unassigned = assignment(plan, -1)
        self._gathers = {}
        for each in self.gather:
            self._gathers.setdefault(plan.nodes[each.rank // plan.ranks_per_node], []).append(each)

    def assignment_of(self, node: str) -> Assignment | None:
        """The plan as this node gets it; None while there is none."""
        return None if self.plan is None else self._assigned.get(node, self._unassigned)

    def sources_of(self, node: str) -> tuple[Sources, ...]:
        """What this node must fetch for the plan, and from where."""
        if self.plan is None or node not in self._gathers:
            return ()
        return self.placement.sources(self._gathers[node], node)

    def holds(self, node: str) -> bool:
        """Whether the node holds ranks, or shall."""
        return node in self._places

    def hear(self, report: AgentReport) -> None:
        """An agent's newest report, of which `views` knows already."""
        self.placement.see(report)
        if report.node in self._places:
            if report.readiness is not None and report.readiness.ready_for == self.number:
                self._ready.add(report.node)
            else:
                self._ready.discard(report.node)

    def forget(self, node: str) -> None:
        """A node was evicted."""
        self.placement.forget(node)
        self._ready.discard(node)

    def falls_behind(self, report: AgentReport) -> bool:
        """Whether an agent knows a newer generation than the journal of a supervisor that died; it is then the last."""
        heard_of = report.readiness.ready_for if report.readiness else 0
        if not self.members or max(heard_of, report.generation) <= self.number:
            return False
        self.number = max(heard_of - 1, report.generation)
        return True

    @property
    def all_ready(self) -> bool:
        """Whether there are members, and all could start their workers."""
        return bool(self.members) and len(self._ready) == len(self._places)

    def waits_for_spares(self, now_s: float) -> bool:
        """Whether a node without ranks, which may keep the only copy of a shard, still looks through its memory.

        What it said for an earlier generation is old; one that had ranks in it says nothing before its workers have
        ended. It is not waited for any longer than for a heartbeat, unless the size changes: then what it holds may be
        the newest snapshot's, and looking through all that a node with ranks keeps takes longer.
        """
        self._ready_since_s = min(self._ready_since_s, now_s)
        without = [view.report for node, view in self.views.items() if node not in self._places]
        if not any(_looks(report, self.number) for report in without):
            return False
        bound_s = self.config.health.heartbeat_timeout_s
        if self._nodes_before not in (0, len(self.members)):
            bound_s = max(bound_s, self.config.cluster.leave_timeout_s)
        return now_s - self._ready_since_s <= bound_s

    def make(self, state: JobState) -> Plan:
        """The plan for members that are all ready; what they have to fetch is in `gather`."""
        ranks_per_node, layout = self.config.cluster.ranks_per_node, self.layout
        plan, self.gather = make_plan(self.number, self.members, ranks_per_node, self.views, state, layout)
        return plan

    @property
    def layout(self) -> Layout | None:
        """The mesh over the members; None: the configuration's own."""
        if len(self.members) == self.config.cluster.nodes:
            return None
        layout = largest_layout(self.config, len(self.members))
        assert layout is not None
        assert layout.nodes == len(self.members)
        return layout

    @property
    def world_size(self) -> int:
        """Number of ranks of the members."""
        return len(self.members) * self.config.cluster.ranks_per_node

    def runs(self, report: AgentReport) -> bool:
        """Whether a report is about workers of the plan."""
        return self.plan is not None and report.generation == self.plan.generation and report.node in self._places

    def finished_after(self) -> int | None:
        """The step after which all members ended this generation well; None if they did not."""
        if self.plan is None or not all_finished(self.members, self.views, self.plan.generation):
            return None
        return max(self.views[node].report.finished_step for node in self.members)

    def anybody_failed(self) -> bool:
        """Whether a worker of the plan ended badly."""
        reports = [self.views[node].report for node in self.members if node in self.views]
        return any(report.exits for report in reports if self.runs(report))

    def _set_members(self, members: Sequence[str]) -> None:
        self.members = tuple(members)
        self._places = {node: place for place, node in enumerate(self.members)}
        self._ready = set()


def _looks(report: AgentReport, number: int) -> bool:
    """Whether a node without ranks in generation `number` has yet to say what it holds now."""
    if report.readiness is not None:
        return report.readiness.ready_for < number
    return 0 < report.generation < number
