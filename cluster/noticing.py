"""What the supervisor notices by itself, beside what agents tell it: silence, absence, and workers that stand still.

Judging is `health`'s; this file keeps what it needs to know since when, and says when the failure was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster import suspicions
from cluster.fleet import AgentView, ready_members
from cluster.hangs import HangWatch
from cluster.messages import AgentReport, Plan
from cluster.scheduler import Scheduler
from configs.schema import JobConfig
from configs.shrinking import effective
from configs.timeouts import derive
from health.straggler import Stragglers, peer_groups
from health.verdict import Verdict
from health.watchdog import Attention, Progress, lost_nodes

ASKED_AT_ONCE = 1024
"""Of how many agents the scheduler is asked each time whether they are alive."""
JUDGED_AT_ONCE = 1024
"""How many ranks' step times are judged each time: the supervisor has others to listen to meanwhile."""


@dataclass(frozen=True)
class Suspicion:
    """A verdict, when what it is about happened (wall clock), and the evidence for the incident's folder.

    generation: what it is about; 0: the one that is wanted now.
    """

    verdict: Verdict
    failed_wall_s: float
    files: Mapping[str, bytes] = field(default_factory=dict)
    generation: int = 0


class Noticing:
    """The supervisor's eyes. Monotonic seconds, all of its own clock; `views` is the supervisor's own mapping."""

    def __init__(
        self, config: JobConfig, scheduler: Scheduler, views: Mapping[str, AgentView], now_s: float
    ) -> None:  # fmt: skip
        self.config = config
        self.scheduler = scheduler
        self.views = views
        self.expected_since: dict[str, float] = {}
        self._unheard: set[str] = set()
        # In the order of hearing, so that whoever is silent is found at the front.
        self._heard: dict[str, float] = {}
        self._looked_at = 0
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
        self._unheard = set(nodes)
        self.expected_since = dict.fromkeys(nodes, now_s)
        # They look for their new supervisor only when they have not heard of the old one for a while.
        looks_after_s = derive(self.config).unheard_s - self.config.health.heartbeat_timeout_s
        self._heard = dict.fromkeys(nodes, now_s + looks_after_s)

    def follow(self, plan: Plan, now_s: float) -> None:
        """From now on, this generation's progress is watched."""
        world_size = len(plan.nodes) * plan.ranks_per_node
        ranks = {rank: plan.nodes[rank // plan.ranks_per_node] for rank in range(world_size)}
        self.progress = Progress(plan.generation, ranks, self.config.health, now_s)
        groups = peer_groups(effective(self.config, plan.layout))
        self.stragglers = Stragglers(ranks, groups, self.config.health)
        self.hangs = HangWatch(derive(self.config), ranks)

    @property
    def waits_for_adopted(self) -> bool:
        """Whether a node that was taken over has neither spoken yet nor been given up."""
        return bool(self._unheard)

    def hear(self, node: str, now_s: float) -> None:
        """An agent spoke."""
        self._heard.pop(node, None)
        self._heard[node] = now_s
        self._unheard.discard(node)

    def forget(self, node: str) -> None:
        """A node was evicted: it owes nothing any more."""
        self._heard.pop(node, None)
        self._unheard.discard(node)

    def hear_workers(self, report: AgentReport, before: AgentReport | None, now_s: float) -> None:
        """What a member of the current generation says of its workers; before: what it said last.

        Steps take longer than heartbeats in a large fleet: most of it was said before, and to compare is quick.
        """
        if before is None or before.generation != report.generation:
            self.progress.feed(now_s, report.node, report.beats)
        else:
            self.progress.feed(now_s, report.node, report.beats if report.beats != before.beats else ())
            if report.times == before.times:
                return
        for each in report.times:
            self.stragglers.feed(each.rank, each.steps)

    def look(self, now_s: float) -> None:
        """The supervisor looks now; whoever was silent while it did not is not to blame."""
        self.watching_since_s = self.attention.tick(now_s)

    def silent(self, handles: Mapping[str, str], evicted: Collection[str], now_s: float) -> list[Suspicion]:
        """Nodes whose agent is gone, or has not been heard of for too long.

        A node that is still starting owes no heartbeat; one that was taken over does.
        """
        gone = [
            node for node in self._next_few(handles) if node not in evicted and not self.scheduler.alive(handles[node])
        ]
        verdicts = [self._agent_gone(node) for node in gone]
        step = self.progress.newest_step
        timeout_s = self.config.health.heartbeat_timeout_s
        overdue = {}
        if now_s - self.watching_since_s > timeout_s:
            for node, heard_s in self._heard.items():
                if now_s - heard_s <= timeout_s:
                    break
                if node in handles and node not in gone:
                    overdue[node] = heard_s
        verdicts += lost_nodes(now_s, overdue, self.config.health, step, self.watching_since_s)
        return [Suspicion(each, time.time() - (now_s - self._heard_at(each.node))) for each in verdicts]

    def _next_few(self, handles: Mapping[str, str]) -> Sequence[str]:
        """All nodes, or the next ones of a fleet so large that asking for all of them would take too long."""
        names = list(handles)
        if len(names) <= ASKED_AT_ONCE:
            return names
        start = self._looked_at % len(names)
        self._looked_at = start + ASKED_AT_ONCE
        return [*names[start : start + ASKED_AT_ONCE], *names[: max(0, start + ASKED_AT_ONCE - len(names))]]

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
        standing, hushed = self.progress.standing(now_s), bool(self.progress.hushed(now_s))
        hang = self.hangs.consider(standing, self.views, now_s, hushed)
        if hang is None:
            return []
        return [Suspicion(hang.verdict, time.time() - (now_s - self.progress.last_advance_s), hang.files)]

    def slow(self, may_replace: Callable[[], bool]) -> list[Suspicion]:
        """What became slow in the steps told of since the last call. may_replace: whether there is a spare."""
        if not self.stragglers.due:
            return []
        return [Suspicion(verdict, time.time()) for verdict in self.stragglers.judge(may_replace(), JUDGED_AT_ONCE)]

    def _agent_gone(self, node: str) -> Verdict:
        words = self.scheduler.last_words(node) if node not in self.views else ()
        return suspicions.agent_gone(node, self.progress.newest_step, words)

    def _heard_at(self, node: str) -> float:
        return self._heard[node] if node in self._heard else self.expected_since[node]
