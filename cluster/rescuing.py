"""Brings a snapshot that only nodes hold into the run directory, where every layout can be loaded from.

Shards in memory serve only the layout that they were made for. When a job goes on with another one, the newest snapshot
may lie in the memory of those that are left, copies of lost nodes' shards among it: they write it before the next
generation is planned. It is then a snapshot like any other, of the layout and generation that made it.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence

import msgspec

from cluster.fleet import AgentView, holdings
from cluster.jobstate import JobState
from cluster.messages import Rescue
from trainer.events import Fact, FactKind

logger = logging.getLogger("everstep.supervisor")


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of which nodes hold every shard. holders: by rank, who has it; whoever made a shard, and has it in its
    memory still, stands for all others, since it may be writing it anyway."""

    generation: int
    step: int
    holders: tuple[tuple[str, ...], ...]

    @property
    def age(self) -> tuple[int, int]:
        """Generation and step: what is greater is newer."""
        return self.generation, self.step

    @property
    def world_size(self) -> int:
        """Number of ranks that made it."""
        return len(self.holders)


def newest_whole(views: Mapping[str, AgentView], rejected: Container[tuple[int, int]] = ()) -> Whole | None:
    """The newest snapshot that nodes together hold, of whatever layout; None if there is none."""
    held: dict[tuple[int, int, int], dict[int, list[tuple[str, str]]]] = {}
    for node, view in views.items():
        for shard in holdings(view):
            if 0 <= shard.rank < shard.world_size:
                age = (shard.generation, shard.step, shard.world_size)
                held.setdefault(age, {}).setdefault(shard.rank, []).append((node, shard.tier))
    whole = [age for age, ranks in held.items() if len(ranks) == age[2] and age[:2] not in rejected]
    if not whole:
        return None
    newest = max(whole)
    holders = tuple(_writers(held[newest][rank]) for rank in range(newest[2]))
    return Whole(generation=newest[0], step=newest[1], holders=holders)


def _writers(holders: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    makers = {node for node, tier in holders if tier == "ram"}
    return tuple(sorted(makers or {node for node, _ in holders}))


def share_out(whole: Whole, number: int = 0) -> dict[str, Rescue]:
    """Who writes which shards: each one once, nobody many more than others. number: see `Rescue`."""
    load: Counter[str] = Counter()
    ranks: dict[str, list[int]] = {}
    for rank, nodes in sorted(enumerate(whole.holders), key=lambda each: (len(each[1]), each[0])):
        writer = min(nodes, key=lambda node: (load[node], node))
        load[writer] += 1
        ranks.setdefault(writer, []).append(rank)
    return {node: Rescue(whole.generation, whole.step, tuple(sorted(mine)), number) for node, mine in ranks.items()}


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
        """A node could not write something; what it was not asked for is another matter."""
        order = self._orders.get(fact.node)
        if order is None or (fact.generation, fact.step) != (order.generation, order.step):
            return
        # Whoever writes rank 0's shard also commits, and says so of no rank.
        if fact.kind is FactKind.SNAPSHOT_FAILED and max(fact.rank, 0) in order.ranks:
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
            self._number, self._until_s, self._problem = number, now_s + self.timeout_s, ""
            return self._begin(world_size, views, state, tell)
        if not self._orders or self._whole is None:
            return False
        if state.newest_age >= self._whole.age:
            self._orders = {}
            return False
        gone = [node for node in self._orders if node not in views]
        if gone:
            logger.warning("%s is gone, which was to write shards of step %d", gone[0], self._whole.step)
            return self._begin(world_size, views, state, tell)
        if not self._problem and now_s > self._until_s:
            self._problem = f"it took more than cluster.leave_timeout_s = {self.timeout_s:g}"
        if self._problem:
            logger.warning("step %d could not be brought to the run directory: %s", self._whole.step, self._problem)
            self._orders = {}
        return not self._problem

    def _begin(
        self, world_size: int, views: Mapping[str, AgentView], state: JobState, tell: Callable[[], None]
    ) -> bool:
        """Ask for what nodes hold now, if anything of it is worth it."""
        self._whole, self._orders, found = None, {}, newest_whole(views, state.refused)
        if found is None or found.world_size == world_size or found.step <= 0 or found.age <= state.newest_age:
            return False
        self._whole, self._orders = found, share_out(found, secrets.randbits(31))
        logger.info("step %d, which only nodes hold, is written to the run directory", found.step)
        tell()
        return True
