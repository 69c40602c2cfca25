"""Promise: from measured pairs of nodes the bad node, link or border is found, and nobody else is blamed."""

from __future__ import annotations

import math
import random
import time

from hypothesis import given
from hypothesis import strategies as st

from health.network import Findings, Pair, Way, find_bad, first_rounds, judge_network, next_round
from health.verdict import Certainty, Severity

ROUNDS_AT_MOST = 12


class Wires:
    """A network in which some nodes and links are bad, in one direction or both; measured as agents would."""

    def __init__(
        self, nodes: list[str], bad_nodes: set[str], bad_links: set[frozenset[str]], slow: bool, seed: int = 0
    ) -> None:
        self.nodes = nodes
        self.bad_nodes = bad_nodes
        self.bad_links = bad_links
        self.slow = slow
        self.dice = random.Random(seed)
        self.rounds = 0

    def measure(self, source: str, target: str) -> Way:
        usual = self.dice.uniform(800.0, 1200.0)
        bad = {source, target} & self.bad_nodes or frozenset((source, target)) in self.bad_links
        if bad and not self.slow:
            return Way(source=source, target=target, problem="no answer within 2 s")
        return Way(source=source, target=target, latency_s=1e-4, mb_per_s=usual * (0.1 if bad else 1.0))

    def matrix(self) -> list[Way]:
        """All rounds until nothing more is to be learnt."""
        ways: list[Way] = []
        rounds = first_rounds(self.nodes)
        while rounds and self.rounds < ROUNDS_AT_MOST:
            pairs = rounds.pop(0)
            self.rounds += 1
            assert len({node for pair in pairs for node in pair}) == 2 * len(pairs), "pairs of a round are disjoint"
            ways += [self.measure(*ends) for a, b in pairs for ends in ((a, b), (b, a))]
            if not rounds and (more := next_round(self.nodes, ways)):
                rounds = [more]
        return ways


def names(count: int) -> list[str]:
    return [f"node{i:02d}" for i in range(count)]


@given(st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_a_sound_network_is_left_alone(count: int, seed: int, slow: bool) -> None:
    """No noise of ordinary size makes anybody suspect, and log2(n) rounds are all it takes."""
    wires = Wires(names(count), set(), set(), slow, seed)
    assert find_bad(wires.matrix()) == Findings()
    assert wires.rounds <= math.ceil(math.log2(count))


def test_a_large_network_is_judged_in_no_time() -> None:
    """Promise: the supervisor, which has heartbeats to hear meanwhile, finds out whom to measure next in a moment."""
    nodes = [f"node{i:04d}" for i in range(4096)]
    wires = Wires(nodes, {"node0007"}, set(), False)
    ways = [wires.measure(*pair) for pairs in first_rounds(nodes) for pair in pairs]
    begun_s = time.process_time()
    more = next_round(nodes, ways)
    assert time.process_time() - begun_s < 2.0
    assert more == []
    parted = [way(a, b, 1000.0) for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
    assert len(next_round(nodes, parted)) == 2048


@given(st.data(), st.integers(6, 32), st.booleans(), st.integers(0, 99))
def test_bad_nodes_and_links_are_found_exactly(data: st.DataObject, count: int, slow: bool, seed: int) -> None:
    """Up to a fifth of the nodes bad, and a link between two of the others: exactly these are named. Of five, the bad
    ways may be more than half, and nobody knows what is usual."""
    nodes = names(count)
    bad_nodes = set(data.draw(st.lists(st.sampled_from(nodes), max_size=count // 5, unique=True)))
    sound = [node for node in nodes if node not in bad_nodes]
    link = data.draw(st.sampled_from([None, *[(a, b) for a in sound for b in sound if a < b]]))
    wires = Wires(nodes, bad_nodes, {frozenset(link)} if link else set(), slow, seed)
    ways = wires.matrix()
    measured = {frozenset((way.source, way.target)) for way in ways}
    found = find_bad(ways)
    assert set(found.nodes) == bad_nodes
    assert found.links == ((link,) if link and frozenset(link) in measured else ())
    assert wires.rounds < ROUNDS_AT_MOST


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 99))
def test_a_border_is_told_from_bad_nodes(left: int, right: int, seed: int) -> None:
    """Two groups, each well within itself, and nothing between them: nobody of either is blamed."""
    nodes = names(left + right)
    random.Random(seed).shuffle(nodes)
    parts = {node: i < left for i, node in enumerate(sorted(nodes))}
    across = {frozenset((a, b)) for a in nodes for b in nodes if parts[a] != parts[b]}
    found = find_bad([Wires(nodes, set(), across, False).measure(a, b) for a in nodes for b in nodes if a != b])
    assert found.nodes == found.links == ()
    assert {frozenset(group) for group in found.groups} == {
        frozenset(node for node in nodes if parts[node] is side) for side in (True, False)
    }


def test_one_direction_is_enough() -> None:
    """A cable that loses what goes one way is as bad as one that loses both, and the words say which way."""
    ways = [way(a, b, 1000.0) for a in "abcd" for b in "abcd" if a != b and (a, b) != ("a", "b")]
    found = find_bad([*ways, way("a", "b", 20.0)])
    assert found.links == (("a", "b"),)
    assert "b fetches slowly from a: 20.0 MB/s" in found.words(("a", "b"))


def test_what_is_blamed_has_words_and_weight() -> None:
    """A node is evicted on proof; a single link, which has two ends, is only noted."""
    wires = Wires(names(8), {"node03"}, set(), False)
    ways = wires.matrix()
    (verdict,) = judge_network(find_bad(ways), ways, step=7)
    assert (verdict.node, verdict.severity, verdict.certainty, verdict.step) == (
        "node03", Severity.NODE, Certainty.PROOF, 7,
    )  # fmt: skip
    assert "cannot fetch from" in verdict.evidence[1]
    assert [line for line in verdict.evidence[1:] if "node03" not in line] == []
    pair: Pair = ("a", "b")
    only = [Way(source="a", target="b", problem="refused"), Way(source="b", target="a", problem="refused")]
    (verdict,) = judge_network(find_bad(only), only)
    assert (verdict.node, verdict.severity, verdict.device) == ("", Severity.NOTICE, "-".join(pair))


def way(source: str, target: str, mb_per_s: float) -> Way:
    return Way(source=source, target=target, latency_s=1e-4, mb_per_s=mb_per_s)
