"""What a supervisor that died had begun and not finished, from its journal. Pure.

It writes down a verdict before it decides, and a fact before it judges; whoever takes over goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cluster import suspicions
from cluster.events import ActionTaken, AnyEvent, RunStarted, VerdictGiven, WorkersReported
from health.verdict import Severity, Verdict
from trainer.events import Fact, FactKind


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """undecided: verdicts without an action. unjudged: facts that ask for a verdict and got none. judged: all verdicts
    that were given, so that agents who tell of them once more are not believed twice."""

    undecided: tuple[VerdictGiven, ...] = ()
    unjudged: tuple[Fact, ...] = ()
    judged: frozenset[Verdict] = frozenset()


def find_unfinished(events: Iterable[AnyEvent]) -> Unfinished:
    """What the newest attempt left."""
    undecided: dict[int, VerdictGiven] = {}
    facts: list[Fact] = []
    judged: set[Verdict] = set()
    for event in events:
        match event:
            case RunStarted():
                undecided.clear()
                facts.clear()
                judged.clear()
            case WorkersReported() if event.fact.kind in (FactKind.CORRUPTION_FOUND, FactKind.ROLLBACK_WANTED):
                facts.append(event.fact)
            case VerdictGiven():
                judged |= {event.verdict, *event.others}
                if event.incident:
                    undecided[event.incident] = event
            case ActionTaken():
                undecided.pop(event.incident, None)
    return Unfinished(
        undecided=tuple(undecided.values()),
        unjudged=tuple(fact for fact in facts if _asks(verdict := _verdict(fact)) and verdict not in judged),
        judged=frozenset(judged),
    )


def _verdict(fact: Fact) -> Verdict:
    return suspicions.corruption(fact) if fact.kind is FactKind.CORRUPTION_FOUND else suspicions.odd_numbers(fact)


def _asks(verdict: Verdict) -> bool:
    return verdict.severity is not Severity.NOTICE
