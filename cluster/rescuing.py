"""Brings a snapshot that only nodes hold into the run directory, where every layout can be loaded from.

Shards in memory serve only the layout that they were made for. When a job goes on with another one, the newest snapshot
may lie in the memory of those that are left, copies of lost nodes' shards among it: they write it before the next
generation is planned. It is then a snapshot like any other, of the layout and generation that made it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping

import msgspec

from cluster.fleet import AgentView, holdings
from cluster.jobstate import JobState
from cluster.messages import Rescue
from trainer.events import Fact, FactKind

logger = logging.getLogger("everstep.supervisor")


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of which nodes hold every shard: by rank, who has it."""

    generation: int
    step: int
    holders: tuple[tuple[str, ...], ...]

    @property
    def world_size(self) -> int:
        """Number of ranks that made it."""
        return len(self.holders)


def newest_whole(views: Mapping[str, AgentView], rejected: Container[tuple[int, int]] = ()) -> Whole | None:
    """The newest snapshot that nodes together hold, of whatever layout; None if there is none."""
    held: dict[tuple[int, int, int], dict[int, list[str]]] = {}
    for node, view in views.items():
        for shard in holdings(view):
            if 0 <= shard.rank < shard.world_size:
                age = (shard.generation, shard.step, shard.world_size)
                held.setdefault(age, {}).setdefault(shard.rank, []).append(node)
    whole = [age for age, ranks in held.items() if len(ranks) == age[2] and age[:2] not in rejected]
    if not whole:
        return None
    newest = max(whole)
    holders = tuple(tuple(sorted(set(held[newest][rank]))) for rank in range(newest[2]))
    return Whole(generation=newest[0], step=newest[1], holders=holders)


def share_out(whole: Whole) -> dict[str, Rescue]:
    """Who writes which shards: each one once, nobody many more than others."""
    load: Counter[str] = Counter()
    ranks: dict[str, list[int]] = {}
    for rank, nodes in sorted(enumerate(whole.holders), key=lambda each: (len(each[1]), each[0])):
        writer = min(nodes, key=lambda node: (load[node], node))
        load[writer] += 1
        ranks.setdefault(writer, []).append(rank)
    return {node: Rescue(whole.generation, whole.step, tuple(sorted(mine))) for node, mine in ranks.items()}


class Rescuing:
    """At most one rescue for each generation that is wanted. timeout_s: how long it may take."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._number = 0
        self._whole: Whole | None = None
        self._orders: dict[str, Rescue] = {}
        self._until_s = 0.0
        self._problem = ""

    def order_of(self, node: str) -> Rescue | None:
        """What the node is to write now."""
        return self._orders.get(node)

    def hear(self, fact: Fact) -> None:
        """A node could not write something."""
        about = self._whole is not None and (fact.generation, fact.step) == (self._whole.generation, self._whole.step)
        if fact.kind is FactKind.SNAPSHOT_FAILED and about:
            self._problem = self._problem or fact.detail

    def waits(
        self,
        number: int,
        world_size: int,
        views: Mapping[str, AgentView],
        state: JobState,
        now_s: float,
        tell: Callable[[], None],
    ) -> bool:
        """Whether the plan of generation `number`, which has world_size ranks, must wait for a rescue.

        All members, and the spares that keep copies, must have said what they hold. tell: sends everybody its order.
        """
        if number != self._number:
            self._number, self._whole, self._orders, self._problem = number, None, {}, ""
            found = newest_whole(views, state.refused)
            if found is None or found.world_size == world_size or found.step <= max(state.newest_snapshot, 0):
                return False
            self._whole, self._orders, self._until_s = found, share_out(found), now_s + self.timeout_s
            logger.info("step %d, which only nodes hold, is written to the run directory", found.step)
            tell()
            return True
        if not self._orders or self._whole is None:
            return False
        if state.newest_snapshot >= self._whole.step:
            self._orders = {}
            return False
        if any(node not in views for node in self._orders):
            found = newest_whole(views, state.refused)
            if found is not None and (found.generation, found.step) == (self._whole.generation, self._whole.step):
                self._whole, self._orders = found, share_out(found)
                tell()
        problem = self._problem or self._obstacle(views, now_s)
        if problem:
            logger.warning("step %d could not be brought to the run directory: %s", self._whole.step, problem)
            self._orders = {}
        return not problem

    def _obstacle(self, views: Mapping[str, AgentView], now_s: float) -> str:
        gone = [node for node in self._orders if node not in views]
        if gone:
            return f"{gone[0]} is gone"
        return f"it took more than cluster.leave_timeout_s = {self.timeout_s:g}" if now_s > self._until_s else ""
