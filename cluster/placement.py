"""Who keeps copies of whose snapshots, remembered until the fleet changes: an order is made many times a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.fleet import AgentView, natural_order, place_copies
from cluster.messages import Gather, Sources


class Placement:
    """Turns node names into addresses for orders."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self._known: dict[str, tuple[str, str]] = {}
        self._members: tuple[str, ...] = ()
        self._placed: Mapping[str, tuple[str, ...]] = {}

    def update(self, members: Sequence[str], views: Mapping[str, AgentView]) -> None:
        """Take in who is there now; cheap when nothing has changed."""
        known = {
            node: (view.report.peer_address, view.report.domain or node)
            for node, view in views.items()
            if view.report.peer_address and not view.report.notice
        }
        if known == self._known and tuple(members) == self._members:
            return
        self._known, self._members = known, tuple(members)
        ring = [*(node for node in members if node in known), *sorted(known.keys() - set(members), key=natural_order)]
        self._placed = place_copies(members, ring, {node: known[node][1] for node in ring}, self.copies)

    def copy_to(self, node: str) -> tuple[str, ...]:
        """Addresses of those who keep copies of this node's snapshots."""
        return tuple(self._known[holder][0] for holder in self._placed.get(node, ()))

    def keep_for(self, node: str, ranks_per_node: int) -> tuple[int, ...]:
        """Ranks whose copies a node keeps."""
        kept = [place for place, member in enumerate(self._members) if node in self._placed.get(member, ())]
        return tuple(place * ranks_per_node + local for place in kept for local in range(ranks_per_node))

    def sources(self, gather: Sequence[Gather], node: str, ranks: range) -> tuple[Sources, ...]:
        """What a node's ranks lack, with the addresses of those who have it; the node's own are left out."""
        return tuple(
            Sources(each.rank, tuple(self._known[n][0] for n in each.nodes if n != node and n in self._known))
            for each in gather
            if each.rank in ranks
        )
