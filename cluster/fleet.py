"""What the supervisor knows of its agents, and pure questions about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence

import msgspec

from cluster.messages import AgentReport, AgentStatus, Gather, HeldInfo

_TIERS = ("ram", "peer", "node")


class AgentView(msgspec.Struct, frozen=True, gc=False):
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


def common_snapshot(
    world_size: int, views: Mapping[str, AgentView], rejected: Container[tuple[int, int]] = ()
) -> tuple[int, int]:
    """(generation, step) of the newest snapshot of which some node or other holds every rank's shard; (-1, -1): none.

    Shards count only together with those of the same generation and number of ranks: two halves of different
    histories never make one snapshot.
    """
    holders: dict[tuple[int, int], set[int]] = {}
    for view in views.values():
        for shard in holdings(view):
            if shard.world_size == world_size and 0 <= shard.rank < world_size:
                holders.setdefault((shard.generation, shard.step), set()).add(shard.rank)
    whole = [age for age, ranks in holders.items() if len(ranks) == world_size and age not in rejected]
    return max(whole, default=(-1, -1))


def gatherings(
    members: Sequence[str], ranks_per_node: int, views: Mapping[str, AgentView], snapshot: tuple[int, int]
) -> tuple[Gather, ...]:
    """Every rank whose shard of the snapshot is not in its node's own slots, and who has it: nearest and fastest first.

    Near is the node itself, then memory before disk; which of several peers comes first turns with the rank, so that
    not all ask the same one.
    """
    missing = []
    holders = _holders(views, snapshot)
    for rank in range(len(members) * ranks_per_node):
        home = members[rank // ranks_per_node]
        tiers = holders.get(rank, {})
        if tiers.get(home) == "ram":
            continue
        names = sorted(tiers)
        turned = names[rank % len(names) :] + names[: rank % len(names)] if names else []
        turned.sort(key=lambda node: (node != home, tiers[node] == "node"))
        missing.append(Gather(rank, tuple(turned)))
    return tuple(missing)


def _holders(views: Mapping[str, AgentView], snapshot: tuple[int, int]) -> dict[int, dict[str, str]]:
    """By rank, who has its shard of the snapshot, and in the fastest tier of each."""
    holders: dict[int, dict[str, str]] = {}
    for node, view in views.items():
        for shard in holdings(view):
            if (shard.generation, shard.step) == snapshot:
                of_rank = holders.setdefault(shard.rank, {})
                of_rank[node] = min(of_rank.get(node, shard.tier), shard.tier, key=_TIERS.index)
    return holders


def holdings(view: AgentView) -> Sequence[HeldInfo]:
    """The verified shards that a node said it holds."""
    return view.report.readiness.held if view.report.readiness else ()


def place_copies(
    members: Sequence[str], candidates: Sequence[str], domains: Mapping[str, str], copies: int
) -> dict[str, tuple[str, ...]]:
    """Who keeps the copies of each member's snapshots: `copies` other nodes, or as many as there are.

    Candidates stand on a ring on which every failure domain is spread evenly (a candidate without one is a domain of
    its own); each member takes those that follow it, first of all from domains that have no copy yet. So everybody
    keeps about as much as the next. It depends on its arguments alone.
    """
    ring = _ring(candidates, domains)
    place = {node: index for index, node in enumerate(ring)}
    known = {domains.get(node) for node in ring}
    return {member: _followers(ring, place.get(member, -1), member, domains, copies, known) for member in members}


def _ring(candidates: Sequence[str], domains: Mapping[str, str]) -> list[str]:
    """The candidates, those of one domain at even distances; without domains, in their own order."""
    size = Counter(domains.get(node, "") for node in candidates)
    seen: Counter[str] = Counter()
    keys = {}
    for index, node in enumerate(candidates):
        domain = domains.get(node, "")
        keys[node] = (0.0, index) if not domain else ((seen[domain] + 0.5) / size[domain], index)
        seen[domain] += 1
    return sorted(candidates, key=lambda node: keys[node])


def _followers(
    ring: Sequence[str], at: int, member: str, domains: Mapping[str, str], copies: int, known: Collection[str | None]
) -> tuple[str, ...]:
    """known: all domains of the ring; where none is left that has no copy, the ring is not searched any further."""
    taken, chosen, passed = {domains.get(member)}, list[str](), list[str]()
    for distance in range(1, len(ring) + 1):
        if len(chosen) == copies or (len(chosen) + len(passed) >= copies and taken.issuperset(known)):
            break
        node = ring[(at + distance) % len(ring)]
        domain = domains.get(node)
        if node == member:
            continue
        if domain and domain in taken:
            passed.append(node)
        else:
            taken.add(domain)
            chosen.append(node)
    return (*chosen, *passed[: copies - len(chosen)])


def all_finished(members: Sequence[str], views: Mapping[str, AgentView], generation: int) -> bool:
    """Whether all members ended this generation well."""
    return all(
        node in views
        and views[node].report.status is AgentStatus.FINISHED
        and views[node].report.generation == generation
        for node in members
    )


def first_members(available: Sequence[str], wanted: int, doubtful: Collection[str] = ()) -> tuple[str, ...]:
    """Who trains first: by natural order of their names, so that spares are the last ones; doubtful nodes only where
    there are no others."""
    order = sorted(available, key=lambda name: (name in doubtful, natural_order(name)))
    return tuple(order[:wanted])


def natural_order(name: str) -> tuple[str, int]:
    """Sorts node2 before node10."""
    digits = name[len(name.rstrip("0123456789")) :]
    return name[: len(name) - len(digits)], int(digits or 0)
