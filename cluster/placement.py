"""Who keeps copies of whose snapshots, worked out when the fleet changes: an order is made many times a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.fleet import natural_order, place_copies
from cluster.messages import AgentReport, Gather, Sources


class Placement:
    """Turns node names into addresses for orders."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self._known: dict[str, tuple[str, str]] = {}
        self._changed = False
        self._members: tuple[str, ...] = ()
        self._placed: Mapping[str, tuple[str, ...]] = {}
        self._kept: Mapping[str, tuple[int, ...]] = {}

    def see(self, report: AgentReport) -> None:
        """Where a node serves copies now, and what it shares its fate with."""
        if not report.peer_address or report.notice:
            self.forget(report.node)
            return
        found = (report.peer_address, report.domain or report.node)
        if self._known.get(report.node) != found:
            self._known[report.node] = found
            self._changed = True

    def forget(self, node: str) -> None:
        """A node is gone, or will be."""
        if self._known.pop(node, None) is not None:
            self._changed = True

    def update(self, members: Sequence[str]) -> bool:
        """Place copies anew if who is there has changed, or who holds ranks; costs as much as the fleet is large.

        Whether orders may be others now.
        """
        members = tuple(members)
        if not self._changed and members == self._members:
            return False
        self._members, self._changed, known = members, False, self._known
        others = sorted(known.keys() - set(members), key=natural_order)
        ring = [*(node for node in members if node in known), *others]
        self._placed = place_copies(members, ring, {node: known[node][1] for node in ring}, self.copies)
        kept: dict[str, list[int]] = {}
        for place, member in enumerate(members):
            for keeper in self._placed.get(member, ()):
                kept.setdefault(keeper, []).append(place)
        self._kept = {keeper: tuple(places) for keeper, places in kept.items()}
        return self.copies > 0

    def copy_to(self, node: str) -> tuple[str, ...]:
        """Addresses of those who keep copies of this node's snapshots."""
        return tuple(self._known[holder][0] for holder in self._placed.get(node, ()) if holder in self._known)

    def keep_for(self, node: str, ranks_per_node: int) -> tuple[int, ...]:
        """Ranks whose copies a node keeps."""
        kept = self._kept.get(node, ())
        return tuple(place * ranks_per_node + local for place in kept for local in range(ranks_per_node))

    def sources(self, gather: Sequence[Gather], node: str) -> tuple[Sources, ...]:
        """What a node's ranks lack, with the addresses of those who have it; the node's own are left out."""
        return tuple(
            Sources(each.rank, tuple(self._known[n][0] for n in each.nodes if n != node and n in self._known))
            for each in gather
        )
