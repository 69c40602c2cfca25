"""Who waits for whom: the graph of ranks and open operations, and the ranks at its root. Pure; linear in its input."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from health.collectives import FlightRecord, Operation, Stage
from trainer.flight import GroupRanks

# Ranks exchange pieces of different sizes in these.
_UNEVEN = frozenset({"all_to_all", "all_to_allv", "alltoall", "alltoall_base", "gather", "scatter", "broadcast"})
_UNEVEN_PARTS = ("coalesced", "barrier")


@dataclass(frozen=True)
class Waiting:
    """One open operation, who waits in it, and who does not come: surely, or for all that is known (no record)."""

    group: GroupRanks
    operation: Operation
    ranks: tuple[int, ...]
    late: tuple[int, ...]
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """Ranks of one group that did different things under one number."""

    group: GroupRanks
    number: int
    by_what: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Waits:
    """All that is waited for. whole: operations that all ranks entered, and which do not end."""

    waiting: tuple[Waiting, ...] = ()
    whole: tuple[Waiting, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()

    @property
    def waited_for(self) -> frozenset[int]:
        """Ranks that some operation lacks, those without a record included."""
        return frozenset(rank for each in self.waiting for rank in (*each.late, *each.unknown))

    @property
    def waiters(self) -> frozenset[int]:
        """Ranks that wait in an operation which somebody did not enter."""
        return frozenset(rank for each in self.waiting for rank in each.ranks)

    @property
    def roots(self) -> tuple[frozenset[int], frozenset[int]]:
        """Ranks that are waited for and wait for nobody: those whose record says so, and those without one."""
        roots = self.waited_for - self.waiters
        known = frozenset(rank for each in self.waiting for rank in each.late)
        return roots & known, roots - known

    def of(self, late: int) -> list[Waiting]:
        """The operations that lack this rank."""
        return [each for each in self.waiting if late in each.late or late in each.unknown]


def find_waits(records: Mapping[int, FlightRecord], sends_too: bool = True) -> Waits:
    """What the ranks' records say together; a rank that is in no record but in some group is unknown.

    sends_too: whether an open send counts as waiting, which it need not do: it may be waited for later.
    """
    groups = {(group.name, group.ranks): group for record in records.values() for group in record.groups}
    names: dict[int, dict[str, GroupRanks]] = {
        rank: {group.name: group for group in record.groups} for rank, record in records.items()
    }
    entered = {rank: record.entered() for rank, record in records.items()}
    found: list[Waiting] = []
    whole: list[Waiting] = []
    for (name, ranks), numbers in _open_collectives(records, names).items():
        for number, (operation, waiters) in sorted(numbers.items()):
            each = _collective(groups[name, ranks], number, operation, waiters, records, entered)
            (found if each.late or each.unknown else whole).append(each)
    for each in _peers(records, names, sends_too):
        (found if each.late or each.unknown else whole).append(each)
    return Waits(tuple(found), tuple(whole), tuple(_mismatches(records, names)))


_Key = tuple[str, tuple[int, ...]]


def _open_collectives(
    records: Mapping[int, FlightRecord], names: Mapping[int, Mapping[str, GroupRanks]]
) -> dict[_Key, dict[int, tuple[Operation, set[int]]]]:
    """Open collectives by group and number, with the ranks that are in them."""
    found: dict[_Key, dict[int, tuple[Operation, set[int]]]] = defaultdict(dict)
    for rank, record in records.items():
        for each in record.open:
            group = names[rank].get(each.group)
            if each.peer < 0 and group is not None:
                numbers = found[group.name, group.ranks]
                numbers.setdefault(each.number, (each, set()))[1].add(rank)
    return found


def _collective(
    group: GroupRanks,
    number: int,
    operation: Operation,
    waiters: Collection[int],
    records: Mapping[int, FlightRecord],
    entered: Mapping[int, Mapping[str, int]],
) -> Waiting:
    others = [rank for rank in group.ranks if rank not in waiters]
    late = [rank for rank in others if rank in records and entered[rank].get(group.name, 0) < number]
    unknown = [rank for rank in others if rank not in records]
    waiting = sorted(waiters)
    if not late:
        # All have asked for it. On a GPU some may run it while another's device never gets there.
        stages = {rank: _stage_of(records[rank], group.name, number) for rank in waiting}
        if Stage.STARTED in stages.values():
            late = [rank for rank in waiting if stages[rank] is Stage.ENTERED]
            waiting = [rank for rank in waiting if rank not in late]
    return Waiting(group, operation, tuple(waiting), tuple(late), tuple(unknown))


def _stage_of(record: FlightRecord, group: str, number: int) -> Stage:
    of = [each.stage for each in record.operations if (each.group, each.number, each.peer) == (group, number, -1)]
    return min(of, default=Stage.OVER)


def _peers(
    records: Mapping[int, FlightRecord], names: Mapping[int, Mapping[str, GroupRanks]], sends_too: bool
) -> Iterable[Waiting]:
    """Open receipts whose sender did not send, and open sends whose receiver does not take."""
    newest: dict[tuple[int, str, bool, int], int] = {}
    still_open: Counter[tuple[int, str, bool, int]] = Counter()
    for rank, record in records.items():
        for each in record.operations:
            if each.peer >= 0:
                key = (rank, each.group, each.sends, each.peer)
                newest[key] = max(newest.get(key, 0), each.number)
                still_open[key] += each.stage is not Stage.OVER
    for rank, record in records.items():
        asked: Counter[tuple[str, bool, int]] = Counter()
        for each in record.open:
            group = names[rank].get(each.group)
            if each.peer < 0 or group is None:
                continue
            asked[each.group, each.sends, each.peer] += 1
            if each.sends and not sends_too:
                continue
            other = (each.peer, each.group, not each.sends, rank)
            known = each.peer in records
            came = (
                newest.get(other, 0) >= each.number
                if each.number and (newest.get(other, 1) or not known)
                else still_open[other] >= asked[each.group, each.sends, each.peer]
            )
            late = (each.peer,) if known and not came else ()
            yield Waiting(group, each, (rank,), late, () if known else (each.peer,))


def _mismatches(
    records: Mapping[int, FlightRecord], names: Mapping[int, Mapping[str, GroupRanks]]
) -> Iterable[Mismatch]:
    """Of each group the first number under which its ranks do different things, and which is not over for all.

    What is over was agreed on, or is a kind of operation that bears it.
    """
    done: dict[_Key, dict[int, dict[str, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    still_open: set[tuple[_Key, int]] = set()
    for rank, record in records.items():
        for each in record.operations:
            group = names[rank].get(each.group)
            if each.peer < 0 and group is not None:
                done[group.name, group.ranks][each.number][_what(each)].add(rank)
                if each.stage is not Stage.OVER:
                    still_open.add(((group.name, group.ranks), each.number))
    for (name, ranks), numbers in done.items():
        for number in sorted(numbers):
            by_what = numbers[number]
            ambiguous = sum(len(each) for each in by_what.values()) > len(set().union(*by_what.values()))
            if len(by_what) > 1 and not ambiguous and ((name, ranks), number) in still_open:
                about = next(g for r in records for g in names[r].values() if (g.name, g.ranks) == (name, ranks))
                yield Mismatch(about, number, {what: tuple(sorted(of)) for what, of in sorted(by_what.items())})
                break


def _what(operation: Operation) -> str:
    """What all ranks must agree on, in words."""
    if operation.name in _UNEVEN or any(part in operation.name for part in _UNEVEN_PARTS):
        return operation.name
    shapes = ", ".join("x".join(map(str, shape)) or "one number" for shape in operation.sizes)
    return f"{operation.name} of {shapes}" if shapes else operation.name
