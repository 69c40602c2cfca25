"""ETTR: productive time over wall time, in which every second has a cause."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from cluster.events import ActionTaken, AnyEvent, GenerationPlanned, RunStarted, VerdictGiven
from cluster.jobstate import RESTARTING_ACTIONS
from cluster.timeline import TimeCause, Timeline, cut
from health.verdict import Severity
from trainer.events import StepRecord


class IncidentCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one incident cost. noticing_s: last sign of life to verdict. deciding_s: verdict to plan. restarting_s:
    plan to the first step's beginning. lost_steps: finished steps computed again; lost_s: their time and that of the
    step in flight."""

    incident: int
    noticing_s: float
    deciding_s: float
    restarting_s: float
    lost_steps: int
    lost_s: float

    @property
    def recovery_s(self) -> float:
        """Verdict to the first step of the next generation."""
        return self.deciding_s + self.restarting_s


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Where the wall time went.

    wall_s = productive_s + the sum of badput_s. ettr = productive_s / (wall_s - badput_s[stopped]); None before any
    time has passed. badput_s has every cause but `productive`, zeros included.

    productive_share: the part of the nodes asked for that held ranks, its mean over the productive time; 1 for a run
    that never was smaller. What machines really did of what was asked is ettr * productive_share.
    """

    wall_s: float
    productive_s: float
    ettr: float | None
    badput_s: dict[TimeCause, float]
    restarts: int
    lost_steps: int
    incidents: tuple[IncidentCost, ...]
    productive_share: float = 1.0


def account(events: Sequence[AnyEvent], steps: Iterable[StepRecord], now_wall_s: float | None) -> Goodput:
    """Account for all time from the first RunStarted to the last RunStopped, or to now_wall_s while the run goes on.

    now_wall_s None: a run without an end ends with its last sign of life (use it when no supervisor is alive). Steps
    between logged ones are interpolated. ETTR's definition: productive over wall time, as in Meta's "Revisiting
    Reliability in Large-Scale Machine Learning Research Clusters", without the time in which the job was stopped.
    """
    timeline = cut(events, steps, now_wall_s)
    spent_us: dict[TimeCause, int] = dict.fromkeys(TimeCause, 0)
    for interval in timeline.intervals:
        spent_us[interval.cause] += interval.end_us - interval.start_us
    wall_us = sum(spent_us.values())
    productive_us = spent_us[TimeCause.PRODUCTIVE]
    asked_us = wall_us - spent_us[TimeCause.STOPPED]
    costs = _incident_costs(events, timeline)
    return Goodput(
        wall_s=wall_us / 1e6,
        productive_s=productive_us / 1e6,
        ettr=productive_us / asked_us if asked_us else None,
        badput_s={cause: us / 1e6 for cause, us in spent_us.items() if cause is not TimeCause.PRODUCTIVE},
        restarts=sum(isinstance(event, ActionTaken) and event.action in RESTARTING_ACTIONS for event in events),
        lost_steps=sum(lost.steps for lost in timeline.lost),
        incidents=costs,
        productive_share=_productive_share(events, timeline),
    )


def _productive_share(events: Iterable[AnyEvent], timeline: Timeline) -> float:
    """Mean, over the productive time, of the nodes that held ranks by the nodes that were asked for."""
    wanted, sizes = 0, [(0, 1.0)]
    for event in events:
        match event:
            case RunStarted():
                wanted = event.nodes
            case GenerationPlanned():
                sizes.append((round(event.t_wall_s * 1e6), min(1.0, len(event.nodes) / wanted) if wanted else 1.0))
    if all(share == 1.0 for _, share in sizes):
        return 1.0
    ends = [*(begin for begin, _ in sizes[1:]), sys.maxsize]
    total_us, weighed_us, at = 0, 0.0, 0
    for interval in timeline.intervals:
        start = interval.start_us
        while interval.cause is TimeCause.PRODUCTIVE and start < interval.end_us:
            while ends[at] <= start:
                at += 1
            length = min(interval.end_us, ends[at]) - start
            total_us, weighed_us, start = total_us + length, weighed_us + length * sizes[at][1], start + length
    return weighed_us / total_us if total_us else 1.0


def _incident_costs(events: Iterable[AnyEvent], timeline: Timeline) -> tuple[IncidentCost, ...]:
    spent_us: dict[tuple[int, TimeCause], int] = defaultdict(int)
    for interval in timeline.intervals:
        spent_us[interval.incident, interval.cause] += interval.end_us - interval.start_us
    lost_steps: dict[int, int] = defaultdict(int)
    for lost in timeline.lost:
        lost_steps[lost.incident] += lost.steps
    given = (event for event in events if isinstance(event, VerdictGiven))
    numbers = sorted({event.incident for event in given if event.verdict.severity is not Severity.NOTICE})
    return tuple(
        IncidentCost(
            incident=number,
            noticing_s=spent_us[number, TimeCause.NOTICING] / 1e6,
            deciding_s=spent_us[number, TimeCause.DECIDING] / 1e6,
            restarting_s=spent_us[number, TimeCause.RESTARTING] / 1e6,
            lost_steps=lost_steps[number],
            lost_s=spent_us[number, TimeCause.LOST] / 1e6,
        )
        for number in numbers
    )
