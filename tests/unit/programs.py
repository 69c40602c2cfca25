"""Made-up parallel programs: every rank runs the same operations over the groups of a mesh, until one rank stops."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

from health.collectives import FlightRecord, Operation, Stage
from trainer.flight import GroupRanks

AXES = ("pp", "fsdp", "tp")


@dataclass(frozen=True)
class Event:
    """What all ranks do next: a collective in every group of an axis, or a shift from each stage to the next.

    waits_after: how many events later it is waited for; 0: at once.
    """

    axis: str
    waits_after: int = 0


@dataclass
class _Entered:
    event: int
    kind: str
    key: tuple[object, ...]
    number: int
    peer: int = -1


@dataclass
class _Rank:
    at: int = 0
    part: int = 0
    entered: list[_Entered] = field(default_factory=list)


class Program:
    """A mesh of pp x fsdp x tp ranks (tp innermost) and the events they go through."""

    def __init__(self, shape: tuple[int, int, int], events: list[Event]) -> None:
        self.shape = shape
        self.events = [*events, Event("world")]
        self.size = shape[0] * shape[1] * shape[2]
        self.groups = {axis: self._groups_of(axis) for axis in (*AXES, "world")}

    def _groups_of(self, axis: str) -> dict[int, GroupRanks]:
        coords = list(itertools.product(*(range(n) for n in self.shape)))
        if axis == "world":
            whole = GroupRanks("0", "default_pg", tuple(range(self.size)))
            return dict.fromkeys(range(self.size), whole)
        at = AXES.index(axis)
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(coords):
            members.setdefault(place[:at] + place[at + 1 :], []).append(rank)
        found = {}
        for key, ranks in members.items():
            for rank in ranks:
                found[rank] = GroupRanks(f"{axis}{key}", f"mesh_{axis}", tuple(ranks))
        return found

    def run(self, stops: dict[int, int], skips: dict[int, int] | None = None) -> list[_Rank]:
        """Run until nobody can go on. stops: the event that a rank never enters; skips: one that it leaves out."""
        ranks = [_Rank() for _ in range(self.size)]
        moved = True
        while moved:
            moved = False
            for rank, state in enumerate(ranks):
                while self._advance(rank, state, ranks, stops, skips or {}):
                    moved = True
        return ranks

    def _advance(
        self, rank: int, state: _Rank, ranks: list[_Rank], stops: dict[int, int], skips: dict[int, int]
    ) -> bool:
        if state.at >= len(self.events):
            return False
        for each in state.entered:
            waits_at = each.event + self.events[each.event].waits_after
            if waits_at < state.at + (each.event < state.at) and not self.over(rank, each, ranks):
                return False
            if each.event == state.at and not self.events[each.event].waits_after and not self.over(rank, each, ranks):
                return False
        parts = self._parts(rank, state.at)
        if state.part == 0 and stops.get(rank) == state.at:
            return False
        if skips.get(rank) == state.at:
            state.part = len(parts)
        if state.part >= len(parts):
            state.at, state.part = state.at + 1, 0
            return True
        kind, key, peer = parts[state.part]
        number = 1 + sum((each.kind, each.key, each.peer) == (kind, key, peer) for each in state.entered)
        state.entered.append(_Entered(state.at, kind, key, number, peer))
        state.part += 1
        return True

    def _parts(self, rank: int, at: int) -> list[tuple[str, tuple[object, ...], int]]:
        event = self.events[at]
        if event.axis != "shift":
            group = self.groups[event.axis][rank]
            return [("collective", (group.name,), -1)] if len(group.ranks) > 1 else []
        stages = self.groups["pp"][rank].ranks
        stage, name = stages.index(rank), self.groups["pp"][rank].name
        parts = []
        if stage > 0:
            parts.append(("recv", (name,), stages[stage - 1]))
        if stage + 1 < len(stages):
            parts.append(("send", (name,), stages[stage + 1]))
        return parts

    def over(self, rank: int, each: _Entered, ranks: list[_Rank]) -> bool:
        """Whether everybody who is needed has entered the operation too."""
        if each.kind == "collective":
            members = next(g for of in self.groups.values() for g in of.values() if g.name == each.key[0]).ranks
            return all(
                any((o.key, o.number, o.event) == (each.key, each.number, each.event) for o in ranks[other].entered)
                for other in members
            )
        other_kind = "send" if each.kind == "recv" else "recv"
        return any(
            (o.kind, o.key, o.number, o.peer) == (other_kind, each.key, each.number, rank)
            for o in ranks[each.peer].entered
        )

    def record(self, rank: int, ranks: list[_Rank]) -> FlightRecord:
        """What this rank's witness would say."""
        operations = []
        for each in ranks[rank].entered:
            axis = self.events[each.event].axis
            operations.append(
                Operation(
                    group=str(each.key[0]),
                    number=each.number,
                    name="all_reduce" if each.kind == "collective" else each.kind,
                    stage=Stage.OVER if self.over(rank, each, ranks) else Stage.ENTERED,
                    sizes=((each.event if axis == "world" else 8,),),
                    peer=each.peer,
                    sends=each.kind == "send",
                )
            )
        mine = {of[rank].name: of[rank] for of in self.groups.values()}
        return FlightRecord(request=1, rank=rank, groups=tuple(mine.values()), operations=tuple(operations))


def random_program(seed: int) -> tuple[Program, int, int]:
    """A program, a culprit and the event that it never enters, so that somebody will miss it."""
    dice = random.Random(seed)
    shape = (dice.choice([1, 1, 2, 4]), dice.choice([1, 2, 3]), dice.choice([1, 2]))
    if shape == (1, 1, 1):
        shape = (1, 2, 1)
    kinds = ["fsdp", "tp", "world", *(["shift"] if shape[0] > 1 else [])]
    events = [Event(dice.choice(kinds), dice.choice([0, 0, 0, 1, 3])) for _ in range(dice.randrange(2, 24))]
    program = Program(shape, events)
    return program, dice.randrange(program.size), dice.randrange(len(program.events))
