"""From what pairs of nodes measured of the way between them: which node, which link, or which border is bad. Pure.

Pairs are measured in rounds of disjoint pairs, so that no two measurements share a node's port. The first log2(n)
rounds pair each node with the one whose number differs in one bit; the rounds after them give each node that came out
badly a few more partners. A node that is bad with most of its sound partners is the node's fault; a bad
pair of sound nodes is the link's; where nothing crosses between groups that are well within themselves, it is the
border's, a switch or a route.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import msgspec

from health.verdict import Cause, Certainty, Severity, Verdict

SLOW_PART = 0.4
SOUND_PARTNERS = 3
_MEDIAN_OF = 3

Pair = tuple[str, str]


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """What `target` measured when it fetched from `source`. problem: why nothing came, "" if it did.

    mb_per_s: -1 where only reachability was asked. latency_s: to connect and be answered once.
    """

    source: str
    target: str
    problem: str = ""
    latency_s: float = -1.0
    mb_per_s: float = -1.0


class BadPair(msgspec.Struct, frozen=True):
    """Two nodes with a bad way between them, and what was seen."""

    pair: Pair
    words: str


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """nodes: bad with most of their partners. links: bad pairs of nodes that are sound otherwise.

    groups: sets of nodes between which nothing crosses, the largest first; () if all is one. bad: all bad pairs.
    """

    nodes: tuple[str, ...] = ()
    links: tuple[Pair, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    bad: tuple[BadPair, ...] = ()

    @property
    def well(self) -> bool:
        """Nothing is bad."""
        return not self.bad

    def words(self, pair: Pair) -> str:
        """What was seen between two nodes, "" if they are well."""
        return next((each.words for each in self.bad if each.pair == pair), "")


def first_rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Rounds of disjoint pairs, at most ceil(log2 n), in which every node is measured, most of them in each round."""
    rounds = []
    bit = 1
    while bit < len(nodes):
        pairs = [(nodes[i], nodes[i ^ bit]) for i in range(len(nodes)) if i < i ^ bit < len(nodes)]
        rounds.append(pairs)
        bit *= 2
    return rounds


def next_round(nodes: Sequence[str], ways: Iterable[Way]) -> list[Pair]:
    """What to measure next to tell nodes from links and borders; [] when nothing more is to be learnt.

    Whoever is suspected by what is known (a node that seems bad, the ends of a link that seems bad, all where groups
    seem apart) is measured with SOUND_PARTNERS that are not, or with all of them where there are fewer.
    """
    ways = list(ways)
    by_pair, found = _by_pair(ways), find_bad(ways)
    group = {node: i for i, members in enumerate(found.groups) for node in members}
    suspects = [*found.nodes, *dict.fromkeys(node for pair in found.links for node in pair), *sorted(group)]
    wanted = {**dict.fromkeys(suspects, SOUND_PARTNERS), **dict.fromkeys(set(nodes) - set(suspects), 1)}
    bad = frozenset(found.nodes)
    met: Counter[str] = Counter()
    for one, other in by_pair:
        if not group or group.get(one) != group.get(other):
            met.update({one: other not in bad, other: one not in bad})
    # Those that may still be a partner in this round, in their order.
    free = dict.fromkeys(node for node in nodes if node not in bad)
    taken: set[str] = set()
    chosen: list[Pair] = []
    for suspect in sorted(nodes, key=lambda node: -wanted[node]):
        if met[suspect] >= wanted[suspect] or suspect in taken:
            continue
        fitting = (node for node in free if not group or group.get(node) != group.get(suspect))
        partner = next((node for node in fitting if node != suspect and _pair(suspect, node) not in by_pair), None)
        if partner is not None:
            taken |= {suspect, partner}
            free.pop(suspect, None)
            free.pop(partner)
            chosen.append(_pair(suspect, partner))
    return chosen


def bad_pairs(ways: Iterable[Way]) -> dict[Pair, str]:
    """Pairs with a way on which nothing came, or much less than is usual, and what was seen."""
    ways = list(ways)
    usual = _usual(ways)
    bad: dict[Pair, str] = {}
    for way in ways:
        pair = _pair(way.source, way.target)
        if way.problem:
            bad[pair] = f"{way.target} cannot fetch from {way.source}: {way.problem}"
        elif 0 <= way.mb_per_s < SLOW_PART * usual and pair not in bad:
            words = f"{way.mb_per_s:,.1f} MB/s, {usual:,.1f} MB/s is usual"
            bad[pair] = f"{way.target} fetches slowly from {way.source}: {words}"
    return bad


def _usual(ways: Sequence[Way]) -> float:
    """What the median node reaches with its best partner, in MB/s: one bad node has a bad way to each other node, but
    spoils only its own best. 0 where too few nodes were measured to say."""
    best: dict[str, float] = {}
    for way in ways:
        for node in (way.source, way.target):
            best[node] = max(best.get(node, 0.0), 0.0 if way.problem else way.mb_per_s)
    return statistics.median(best.values()) if len(best) >= _MEDIAN_OF else 0.0


def find_bad(ways: Iterable[Way]) -> Findings:
    """The fewest culprits that explain all bad pairs."""
    by_pair = _by_pair(ways)
    bad = bad_pairs(ways)
    told = tuple(BadPair(pair, bad[pair]) for pair in sorted(bad))
    groups = _groups(by_pair, bad)
    if groups:
        return Findings(groups=groups, bad=told)
    nodes: list[str] = []
    while True:
        left = {pair for pair in by_pair if not set(pair) & set(nodes)}
        sick = {pair: words for pair, words in bad.items() if pair in left}
        worst = _worst(left, sick)
        if worst is None:
            return Findings(nodes=tuple(sorted(nodes)), links=tuple(sorted(sick)), bad=told)
        nodes.append(worst)


def judge_network(findings: Findings, ways: Iterable[Way], step: int = -1) -> list[Verdict]:
    """Verdicts with evidence. Only a node that is bad with two others or more is blamed as one; slowness is a hint."""
    ways = list(ways)
    tried = _by_pair(ways)
    verdicts = []
    for node in findings.nodes:
        with_it = {pair for pair in tried if node in pair}
        lines = [each.words for each in findings.bad if node in each.pair]
        headline = f"{node}: the way to {len(lines)} of {len(with_it)} other nodes is bad, others reach each other well"
        certainty = Certainty.PROOF if len(lines) == len(with_it) >= SOUND_PARTNERS else Certainty.LIKELY
        if not any(way.problem and node in (way.source, way.target) for way in ways):
            certainty = Certainty.HINT  # slow may also be whoever else uses the way
        verdicts.append(_verdict(node, "network", "node unreachable", Severity.NODE, certainty, step, headline, lines))
    for pair in findings.links:
        name = "-".join(pair)
        headline = f"the way between {pair[0]} and {pair[1]} is bad, both reach others well or were not asked to"
        lines = [findings.words(pair)]
        verdicts.append(_verdict("", name, "link bad", Severity.NOTICE, Certainty.LIKELY, step, headline, lines))
    if findings.groups:
        names = "; ".join(f"{', '.join(group)}" for group in findings.groups)
        headline = f"nothing crosses between groups of nodes that are well within themselves: {names}"
        lines = [each.words for each in findings.bad]
        verdicts.append(
            _verdict("", "network", "network parted", Severity.NOTICE, Certainty.LIKELY, step, headline, lines)
        )
    return verdicts


def _verdict(
    node: str, device: str, mark: str, severity: Severity, sure: Certainty, step: int, head: str, lines: Sequence[str]
) -> Verdict:
    return Verdict(
        node=node, rank=-1, cause=Cause.LINK_FAULT, severity=severity, step=step, fingerprint=mark,
        evidence=(head, *lines), certainty=sure, device=device,
    )  # fmt: skip


def _worst(pairs: Collection[Pair], bad: Collection[Pair]) -> str | None:
    """The node that is bad with at least two and more than half of its partners; None if there is none."""
    count: dict[str, list[int]] = {}
    for pair in pairs:
        for node in pair:
            seen = count.setdefault(node, [0, 0])
            seen[0] += 1
            seen[1] += pair in bad
    guilty = {node: sick / all_ for node, (all_, sick) in count.items() if sick >= 2 and sick * 2 > all_}
    return max(sorted(guilty), key=lambda node: (guilty[node], count[node][1]), default=None)


def _groups(by_pair: Collection[Pair], bad: Collection[Pair]) -> tuple[tuple[str, ...], ...]:
    """Nodes joined by good pairs, if that leaves several groups of two or more, and none of one."""
    group: dict[str, set[str]] = {node: {node} for pair in by_pair for node in pair}
    for pair in by_pair:
        if pair not in bad and group[pair[0]] is not group[pair[1]]:
            small, large = sorted((group[pair[0]], group[pair[1]]), key=len)
            large |= small
            for node in small:
                group[node] = large
    parts = [tuple(sorted(members)) for members in {id(members): members for members in group.values()}.values()]
    if len(parts) < 2 or min(map(len, parts)) < 2:
        return ()
    return tuple(sorted(parts, key=lambda part: (-len(part), part)))


def _by_pair(ways: Iterable[Way]) -> set[Pair]:
    return {_pair(way.source, way.target) for way in ways}


def _pair(one: str, other: str) -> Pair:
    return (one, other) if one < other else (other, one)
