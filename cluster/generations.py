"""Who holds which ranks: the generation that is wanted, and the plan that all follow once everybody is ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.fleet import AgentView, all_finished, ready_members
from cluster.jobstate import JobState
from cluster.messages import AgentReport, Gather, Plan
from cluster.placement import Placement
from cluster.planning import make_plan
from configs.schema import JobConfig


class Generations:
    """The newest generation, from the wish for it to its end. `views` is the supervisor's own mapping.

    members: the nodes that hold ranks, or shall, by rank. number: of the generation that is wanted; agents with an
    older one stop their workers. plan, gather: None and nothing until all members are ready for it. begun_s: when it
    was asked for, monotonic.
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
        self._ready_since_s = float("inf")

    def begin(self, members: Sequence[str], reason: str, now_s: float) -> None:
        """Want a new generation, of these nodes."""
        self.members = tuple(members)
        self.number += 1
        self.plan = None
        self.reason = reason
        self.begun_s = now_s
        self._ready_since_s = float("inf")

    def resume(self, plan: Plan, gather: Sequence[Gather], members: Sequence[str]) -> None:
        """Take up what a dead supervisor planned last; members: who holds the ranks since its last decision."""
        self.members = tuple(members)
        self.number = plan.generation
        self.gather = tuple(gather)

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
        return bool(self.members) and len(ready_members(self.members, self.views, self.number)) == len(self.members)

    def waits_for_spares(self, now_s: float) -> bool:
        """Whether a node without ranks, which may keep the only copy of a shard, still looks through its memory.

        What it said for an earlier generation is old. It is not waited for any longer than for a heartbeat.
        """
        self._ready_since_s = min(self._ready_since_s, now_s)
        said = [view.report.readiness for node, view in self.views.items() if node not in self.members]
        looking = any(readiness is not None and readiness.ready_for < self.number for readiness in said)
        return looking and now_s - self._ready_since_s <= self.config.health.heartbeat_timeout_s

    def make(self, state: JobState) -> Plan:
        """The plan for members that are all ready; what they have to fetch is in `gather`."""
        ranks_per_node = self.config.cluster.ranks_per_node
        plan, self.gather = make_plan(self.number, self.members, ranks_per_node, self.views, state)
        return plan

    def runs(self, report: AgentReport) -> bool:
        """Whether a report is about workers of the plan."""
        return self.plan is not None and report.node in self.members and report.generation == self.plan.generation

    def finished_after(self) -> int | None:
        """The step after which all members ended this generation well; None if they did not."""
        if self.plan is None or not all_finished(self.members, self.views, self.plan.generation):
            return None
        return max(self.views[node].report.finished_step for node in self.members)

    def anybody_failed(self) -> bool:
        """Whether a worker of the plan ended badly."""
        reports = [self.views[node].report for node in self.members if node in self.views]
        return any(report.exits for report in reports if self.runs(report))
