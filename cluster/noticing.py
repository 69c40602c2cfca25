"""What the supervisor notices by itself, beside what agents tell it: silence, absence, and workers that stand still.

Judging is `health`'s; this file keeps what it needs to know since when, and says when the failure was.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster import suspicions
from cluster.fleet import AgentView, ready_members
from cluster.hangs import HangWatch
from cluster.messages import AgentReport, Plan
from cluster.scheduler import Scheduler
from configs.schema import JobConfig
from configs.timeouts import derive
from health.straggler import Stragglers, peer_groups
from health.verdict import Severity, Verdict
from health.watchdog import Attention, Progress, lost_nodes


@dataclass(frozen=True)
class Suspicion:
    """A verdict, when what it is about happened (wall clock), and the evidence for the incident's folder."""

    verdict: Verdict
    failed_wall_s: float
    files: Mapping[str, bytes] = field(default_factory=dict)


class OpenIncident:
    """Suspicions that arrived together, not yet acted on."""

    def __init__(self, opened_at_s: float, failed_wall_s: float) -> None:
        self.opened_at_s = opened_at_s
        self.failed_wall_s = failed_wall_s
        self.verdicts: list[Verdict] = []
        self.files: dict[str, bytes] = {}

    def add(self, suspicion: Suspicion) -> None:
        """Take in one more."""
        self.verdicts.append(suspicion.verdict)
        self.failed_wall_s = min(self.failed_wall_s, suspicion.failed_wall_s)
        self.files.update(suspicion.files)

    @property
    def about_nodes(self) -> bool:
        """Whether a whole node is accused already."""
        return any(verdict.severity is Severity.NODE for verdict in self.verdicts)


class Noticing:
    """The supervisor's eyes. Monotonic seconds, all of its own clock; `views` is the supervisor's own mapping."""

    def __init__(
        self, config: JobConfig, scheduler: Scheduler, views: Mapping[str, AgentView], now_s: float
    ) -> None:  # fmt: skip
        self.config = config
        self.scheduler = scheduler
        self.views = views
        self.expected_since: dict[str, float] = {}
        self.adopted: frozenset[str] = frozenset()
        self.attention = Attention(now_s, config.health.heartbeat_timeout_s / 2)
        self.watching_since_s = now_s
        self.progress = Progress(0, {}, config.health, now_s)
        self.stragglers = Stragglers({}, {}, config.health)
        self.hangs = HangWatch(derive(config), {})

    @property
    def collect(self) -> int:
        """The number of the evidence that all agents of the plan are asked for, 0 for none."""
        return self.hangs.collect

    def expect(self, nodes: Iterable[str], now_s: float) -> None:
        """These agents were started, and owe a first word."""
        for node in nodes:
            self.expected_since.setdefault(node, now_s)

    def adopt(self, nodes: Collection[str], now_s: float) -> None:
        """These agents were at work for an earlier supervisor: they owe heartbeats at once."""
        self.adopted = frozenset(nodes)
        self.expected_since = dict.fromkeys(nodes, now_s)

    def follow(self, plan: Plan, now_s: float) -> None:
        """From now on, this generation's progress is watched."""
        world_size = len(plan.nodes) * plan.ranks_per_node
        ranks = {rank: plan.nodes[rank // plan.ranks_per_node] for rank in range(world_size)}
        self.progress = Progress(plan.generation, ranks, self.config.health, now_s)
        self.stragglers = Stragglers(ranks, peer_groups(self.config), self.config.health)
        self.hangs = HangWatch(derive(self.config), ranks)

    def hear(self, report: AgentReport, now_s: float) -> None:
        """What a member of the current generation says of its workers."""
        self.progress.feed(now_s, report.node, report.beats)
        for each in report.times:
            self.stragglers.feed(each.rank, each.steps)

    def look(self, now_s: float) -> None:
        """The supervisor looks now; whoever was silent while it did not is not to blame."""
        self.watching_since_s = self.attention.tick(now_s)

    def silent(self, handles: Mapping[str, str], evicted: Collection[str], now_s: float) -> list[Suspicion]:
        """Nodes whose agent is gone, or has not been heard of for too long."""
        present = {node: handle for node, handle in handles.items() if node not in evicted}
        gone = [node for node, handle in present.items() if not self.scheduler.alive(handle)]
        verdicts = [self._agent_gone(node) for node in gone]
        # A node that is still starting owes no heartbeat; one that was taken over does.
        owing = [node for node in present if node not in gone and (node in self.views or node in self.adopted)]
        heard = {node: self._heard_at(node) for node in owing}
        step = self.progress.newest_step
        verdicts += lost_nodes(now_s, heard, self.config.health, step, self.watching_since_s)
        return [Suspicion(each, time.time() - (now_s - self._heard_at(each.node))) for each in verdicts]

    def missing(self, members: Sequence[str], generation: int, since_s: float, now_s: float) -> list[Suspicion]:
        """Members that did not get ready for the generation in time; since_s: when they were asked to."""
        timeout_s = self.config.health.startup_timeout_s
        if not members or now_s - since_s <= timeout_s:
            return []
        missing = sorted(set(members) - set(ready_members(members, self.views, generation)))
        step = self.progress.newest_step
        return [Suspicion(suspicions.startup_timeout(node, step, timeout_s), time.time()) for node in missing]

    def standing_still(self, now_s: float) -> list[Suspicion]:
        """A hang, if the workers of the current generation make no progress and the evidence says so too."""
        hang = self.hangs.consider(self.progress.standing(now_s), self.views, now_s)
        if hang is None:
            return []
        return [Suspicion(hang.verdict, time.time() - (now_s - self.progress.last_advance_s), hang.files)]

    def slow(self, may_replace: bool) -> list[Suspicion]:
        """What became slow in the steps that were told of since the last call. may_replace: there is a spare."""
        return [Suspicion(verdict, time.time()) for verdict in self.stragglers.judge(may_replace)]

    def _agent_gone(self, node: str) -> Verdict:
        words = self.scheduler.last_words(node) if node not in self.views else ()
        return suspicions.agent_gone(node, self.progress.newest_step, words)

    def _heard_at(self, node: str) -> float:
        view = self.views.get(node)
        return view.heard_at_s if view else self.expected_since[node]
