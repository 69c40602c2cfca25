"""What a node's past says about its future: a rate of failures, and the place it gets in a run. Pure.

A node's failures are a Poisson process whose rate is drawn from a gamma distribution around the fleet's: with
failures k in t node-days, shape a and the others' rate r, the rate to expect is (a + k) / (a / r + t). The shape is
small, as few nodes do most of the failing (of 63, three took over half of the evictions in a published run on 504
B200). The others' rate is estimated in the same way around 6.5 failures per 1,000 node-days (RSC-1, Meta), which the
first failures of a young fleet move only a little. A node whose expected rate is several times the others' is a lemon:
such nodes pass their examinations and go on failing, so no repair but a lower rate takes the word from them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.events import Place
from cluster.history import AnyEntry, Drained, Evicted, Examined, Judged, NodeId, Readmitted, Served
from cluster.policy_pricing import BAD, FLEET_FAILURES_PER_NODE_DAY
from cluster.policy_words import duration
from health.verdict import Certainty

MEMORY_DAYS = 90.0
LEMON_FACTOR = 4.0
LEMON_FAILURES = 1.8
_SHAPE = 0.5
_FLEET_SHAPE = 1.0
_DAY_S = 86400.0


@dataclass
class Past:
    """One node's entries, summed up. weights: how sure each failure was, by (run, incident)."""

    node: NodeId
    weights: dict[tuple[str, int], float] = field(default_factory=dict)
    served: list[Served] = field(default_factory=list)
    evictions: list[Evicted] = field(default_factory=list)
    drained: Drained | None = None
    readmitted: Readmitted | None = None
    examined: Examined | None = None
    last_wall_s: float = 0.0

    @property
    def failures(self) -> float:
        """Failures, each weighed by how likely it was the node's."""
        return sum(self.weights.values())

    @property
    def node_days(self) -> float:
        """How long it has been in runs."""
        return sum(each.hours for each in self.served) / 24.0

    def hours_since(self, t_wall_s: float) -> float:
        """Hours in runs after a moment."""
        return sum(max(0.0, min(each.hours, (each.t_wall_s - t_wall_s) / 3600.0)) for each in self.served)


@dataclass(frozen=True)
class Standing:
    """A node's place, and why."""

    node: NodeId
    place: Place
    reason: str
    failures: float
    node_days: float
    failures_per_day: float
    evictions: int
    last_wall_s: float
    readmitted_wall_s: float


def standings(entries: Iterable[AnyEntry], now_wall_s: float, burn_in_hours: float) -> list[Standing]:
    """Every node of the history, the most troublesome first."""
    pasts = list(recall(entries, now_wall_s).values())
    failures, days = sum(past.failures for past in pasts), sum(past.node_days for past in pasts)
    found = []
    for past in pasts:
        others = _rate(
            _FLEET_SHAPE, FLEET_FAILURES_PER_NODE_DAY, failures - past.failures, max(0.0, days - past.node_days)
        )
        found.append(_standing(past, others, burn_in_hours))
    return sorted(found, key=lambda each: (-each.failures_per_day, each.node.label))


def recall(entries: Iterable[AnyEntry], now_wall_s: float) -> Mapping[tuple[str, str], Past]:
    """The nodes' pasts by (host, name). What is older than MEMORY_DAYS is forgotten, but for what a person said.

    A node all of whose known hardware was exchanged is another node, and begins anew.
    """
    oldest_s = now_wall_s - MEMORY_DAYS * _DAY_S
    pasts: dict[tuple[str, str], Past] = {}
    for entry in entries:
        if entry.t_wall_s < oldest_s and not isinstance(entry, Drained | Readmitted):
            continue
        for node in entry.nodes if isinstance(entry, Served) else (entry.node,):
            _add(_past(pasts, node), entry)
    return pasts


def _past(pasts: dict[tuple[str, str], Past], node: NodeId) -> Past:
    key = (node.host, node.name)
    past = pasts.get(key)
    if past is None or (node.hardware and past.node.hardware and not set(node.hardware) & set(past.node.hardware)):
        past = pasts[key] = Past(node)
    elif node.hardware:
        past.node = node
    return past


def _add(past: Past, entry: AnyEntry) -> None:
    past.last_wall_s = max(past.last_wall_s, entry.t_wall_s)
    match entry:
        case Judged() | Evicted():
            key = (entry.run, entry.incident)
            past.weights[key] = max(past.weights.get(key, 0.0), BAD[entry.certainty])
            if isinstance(entry, Evicted):
                past.evictions.append(entry)
        case Served():
            past.served.append(entry)
        case Examined():
            past.examined = entry
        case Drained():
            past.drained = entry
        case Readmitted():
            past.readmitted = entry


def _standing(past: Past, others_per_day: float, burn_in_hours: float) -> Standing:
    rate = _rate(_SHAPE, others_per_day, past.failures, past.node_days)
    place, reason = _place(past, burn_in_hours)
    if place is Place.MEMBER and past.failures >= LEMON_FAILURES and rate >= LEMON_FACTOR * others_per_day:
        place, reason = Place.SPARE, f"fails {rate / others_per_day:.0f} times as often as other nodes"
    return Standing(
        node=past.node,
        place=place,
        reason=reason,
        failures=past.failures,
        node_days=past.node_days,
        failures_per_day=rate,
        evictions=len(past.evictions),
        last_wall_s=past.last_wall_s,
        readmitted_wall_s=past.readmitted.t_wall_s if past.readmitted else 0.0,
    )


def _place(past: Past, burn_in_hours: float) -> tuple[Place, str]:
    """The place by what was done with the node last: what came after a repair or a passed examination counts."""
    readmitted_s = past.readmitted.t_wall_s if past.readmitted else 0.0
    passed_s = past.examined.t_wall_s if past.examined and past.examined.passed else 0.0
    if past.drained and past.drained.t_wall_s > readmitted_s:
        return Place.OUT, f"drained by {past.drained.who} on {_date(past.drained.t_wall_s)}: {past.drained.reason}"
    if past.examined and not past.examined.passed and past.examined.t_wall_s > readmitted_s:
        return Place.OUT, f"failed its examination on {_date(past.examined.t_wall_s)}: {past.examined.reason}"
    evictions = [each for each in past.evictions if each.t_wall_s > max(readmitted_s, passed_s)]
    proofs = [each for each in evictions if each.certainty is Certainty.PROOF and not each.gone]
    if proofs:
        return Place.OUT, f"{_eviction(proofs[-1])}; `everstep readmit` takes it back once it is repaired"
    if evictions:
        return _burning_in(past, evictions[-1].t_wall_s, burn_in_hours, _eviction(evictions[-1]))
    if past.readmitted and readmitted_s > passed_s:
        why = f"readmitted on {_date(readmitted_s)}: {past.readmitted.reason}"
        return _burning_in(past, readmitted_s, burn_in_hours, why)
    return Place.MEMBER, "nothing is held against it"


def _burning_in(past: Past, since_s: float, burn_in_hours: float, why: str) -> tuple[Place, str]:
    hours = past.hours_since(since_s)
    if hours >= burn_in_hours:
        return Place.MEMBER, f"{why}; has served {hours:.1f} h since"
    return Place.SPARE, f"{why}; a spare until it has served {burn_in_hours:g} h ({duration(hours * 3600.0)} so far)"


def _eviction(entry: Evicted) -> str:
    return (
        f"evicted in run {entry.run} on {_date(entry.t_wall_s)} (incident {entry.incident}): {entry.reason.rstrip('.')}"
    )


def _rate(shape: float, prior_per_day: float, failures: float, days: float) -> float:
    return (shape + failures) / (shape / prior_per_day + days)


def _date(t_wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(t_wall_s))
