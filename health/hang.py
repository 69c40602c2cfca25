"""Who is to blame when all ranks stand still: from what was collected of them to one verdict. Pure.

The rank to find is the one that others wait for and that waits for nobody. Those that wait are never blamed: where no
such rank can be told, the verdict names none. What the beats alone suggest (`health.watchdog`) counts only where no
rank could say what it waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from health.collectives import FlightRecord, group_words, ranks_words
from health.hang_evidence import RankEvidence
from health.verdict import Certainty, Verdict
from health.waiting import Mismatch, Waiting, Waits, find_waits
from health.watchdog import Standing
from trainer.events import Phase

_FRAMES = 6
_OPERATIONS = 8
_DATA_PHASES = frozenset({Phase.DATA, Phase.VALIDATION})
# Of the time between two looks: below, a process sleeps.
_BUSY = 0.5


@dataclass(frozen=True)
class Finding:
    """A verdict, and whether the evidence already suffices to act on it; doubt: why it does not."""

    verdict: Verdict
    sure: bool
    doubt: str = ""


def judge_hang(standing: Standing, nodes: Mapping[int, str], evidence: Mapping[int, RankEvidence]) -> Finding:
    """The verdict on ranks that stand still.

    nodes: the node of every rank of the generation. evidence: by rank; ranks may be missing.
    """
    known = {rank: evidence.get(rank, RankEvidence(rank)) for rank in sorted(nodes)}
    records = {rank: each.record for rank, each in known.items() if each.record is not None and not each.stopped}
    told = {rank: record for rank, record in records.items() if record.groups}
    moved = [rank for rank, each in known.items() if each.facts is not None and each.facts.record_moved]
    finding = _judge(standing, nodes, known, told)
    if moved and finding.sure:
        doubt = f"collectives of {ranks_words(moved)} came or went between two looks"
        return Finding(finding.verdict, False, doubt)
    return finding


def _judge(
    standing: Standing,
    nodes: Mapping[int, str],
    known: Mapping[int, RankEvidence],
    records: Mapping[int, FlightRecord],
) -> Finding:
    case = _Case(standing, nodes, known, find_waits(records))
    stopped = [rank for rank, each in known.items() if each.stopped]
    if stopped and len(stopped) < len(known):
        return case.blame(stopped, Certainty.PROOF, ())
    if case.waits.mismatches:
        return case.nobody(_disagreement(case.waits.mismatches[0]), sure=True, mark="collectives differ")
    certain, silent = case.waits.roots
    if not certain and case.waits.waiting and not silent:
        # Nobody is free: it may be that a send, which need not be waited for at once, closes the circle.
        alone = find_waits(records, sends_too=False)
        certain, silent = alone.roots
        outside = frozenset(rank for rank in case.waits.waiters & case.waits.waited_for if _outside_torch(known[rank]))
        certain = certain or (outside if len(outside) == 1 else frozenset())
    if certain:
        return case.blame(sorted(certain), Certainty.LIKELY, _doubts(sorted(certain), standing, known))
    if silent:
        return case.blame(sorted(silent), _certainty_of(silent, known), _doubts(sorted(silent), standing, known))
    if case.waits.waiting:
        circle = sorted(case.waits.waiters & case.waits.waited_for)
        line = f"{ranks_words(circle)} wait for each other in a circle: they do not agree on the order of collectives"
        return case.nobody(line, sure=True, mark="collectives in a circle")
    if case.waits.whole:
        line = f"all ranks came to {_operation_words(case.waits.whole[0])}, and it does not end"
        return case.nobody(line, sure=False, doubt="it may just be slow")
    if not records:
        # Nothing could be asked: what the beats say is all there is.
        verdict = msgspec.structs.replace(standing.verdict, certainty=Certainty.HINT)
        return Finding(verdict, False, "no rank could say what it waits for")
    return case.nobody("no rank is in a collective", sure=False, doubt="ranks may be at work or wait for their data")


@dataclass(frozen=True)
class _Case:
    """What all verdicts of one judgement are made from."""

    standing: Standing
    nodes: Mapping[int, str]
    known: Mapping[int, RankEvidence]
    waits: Waits

    def blame(self, late: Sequence[int], certainty: Certainty, doubts: Sequence[str]) -> Finding:
        """The ranks that are late, all of them on one node or none of them named in particular."""
        nodes = sorted({self.nodes[rank] for rank in late})
        lines = [line for rank in late[:_OPERATIONS] for line in self._about(rank)]
        if len(nodes) > 1:
            certainty = Certainty.HINT
        verdict = msgspec.structs.replace(
            self.standing.verdict,
            node=nodes[0] if len(nodes) == 1 else "",
            rank=late[0] if len(late) == 1 else -1,
            certainty=certainty,
            evidence=(*lines, *self._rest(late)),
        )
        return Finding(verdict, not doubts, "; ".join(doubts))

    def nobody(self, line: str, *, sure: bool, mark: str = "", doubt: str = "") -> Finding:
        """A verdict without a culprit."""
        base = self.standing.verdict
        verdict = msgspec.structs.replace(
            base,
            node="",
            rank=-1,
            certainty=Certainty.LIKELY if sure else Certainty.HINT,
            fingerprint=f"{base.fingerprint}: {mark}" if mark else base.fingerprint,
            evidence=(line, *self._rest(())),
        )
        return Finding(verdict, sure, doubt)

    def _about(self, rank: int) -> list[str]:
        """What is wrong with a late rank, who lacks it, and where it is."""
        each, node = self.known[rank], self.nodes[rank]
        waits = [
            f"{ranks_words(lack.ranks)} wait{'s' * (len(lack.ranks) == 1)} for it in {_operation_words(lack)}"
            for lack in self.waits.of(rank)[:_OPERATIONS]
        ]
        lines = [": ".join([f"rank {rank} on {node} {_state_words(each)}", *(["; ".join(waits)] if waits else [])])]
        if each.frames:
            lines.append(f"stack of rank {rank}, innermost first: {' < '.join(each.frames[:_FRAMES])}")
        if each.facts is not None and each.facts.kernel:
            lines.append(f"in the kernel, rank {rank} is in {each.facts.kernel}")
        return lines

    def _rest(self, late: Sequence[int]) -> tuple[str, ...]:
        """What the watchdog saw, and the other operations that do not end."""
        waiting = [
            f"{ranks_words(each.ranks)} in {_operation_words(each)} without {ranks_words((*each.late, *each.unknown))}"
            for each in self.waits.waiting
            if not set(late) & {*each.late, *each.unknown}
        ]
        return (self.standing.fact, *waiting[:_OPERATIONS], *self.standing.verdict.evidence[1:])


def _doubts(late: Sequence[int], standing: Standing, known: Mapping[int, RankEvidence]) -> list[str]:
    return [doubt for rank in late if (doubt := _doubt(known[rank], standing.phases.get(rank)))]


def _doubt(each: RankEvidence, phase: Phase | None) -> str:
    """Why a late rank may still come, "" if nothing speaks for it."""
    facts = each.facts
    if facts is None:
        return f"rank {each.rank}'s agent said nothing of it"
    busy = facts.cpu_s > _BUSY * facts.looked_s
    if each.record is None:
        # Its interpreter is held: by a call that sleeps or spins, or for lack of a processor.
        if (facts.state == "R" or facts.runnable) and not busy:
            return f"rank {each.rank} gets no processor"
        return f"rank {each.rank} moves" if each.stack_moved else ""
    if facts.state == "R" or busy or each.stack_moved:
        return f"rank {each.rank} computes"
    if phase in _DATA_PHASES and any("trainer/data.py" in frame for frame in each.frames):
        return f"rank {each.rank} waits for its data"
    return ""


def _certainty_of(silent: frozenset[int], known: Mapping[int, RankEvidence]) -> Certainty:
    """Of ranks without a record: one whose agent saw it silent is likely the one, one whose agent is silent may be."""
    told = all(known[rank].facts is not None for rank in silent)
    return Certainty.LIKELY if told and len(silent) == 1 else Certainty.HINT


def _outside_torch(each: RankEvidence) -> bool:
    """Whether the main thread is in code of its own, rather than in something of torch's that may wait."""
    return bool(each.frames) and "/torch/" not in each.frames[0]


def _state_words(each: RankEvidence) -> str:
    facts = each.facts
    if facts is None:
        return "does not come, and its agent says nothing of it"
    if each.stopped:
        return "is dead" if facts.state in "ZX" else f"is stopped (process state {facts.state})"
    if each.record is None:
        held = "sleeps" if facts.state != "R" else "runs"
        return f"does not come and does not answer: it {held} and lets none of its threads run"
    return f"does not come (process state {facts.state}, {facts.cpu_s:.2f} s of work in {facts.looked_s:.2f} s)"


def _operation_words(each: Waiting) -> str:
    operation = each.operation
    if operation.peer >= 0:
        way = "to" if operation.sends else "from"
        count = f" number {operation.number}" if operation.number else ""
        return f"{operation.name}{count} {way} rank {operation.peer} of {group_words(each.group)}"
    return f"{operation.name} number {operation.number} of {group_words(each.group)}"


def _disagreement(mismatch: Mismatch) -> str:
    what = "; ".join(f"{ranks_words(ranks)}: {what}" for what, ranks in mismatch.by_what.items())
    return (
        f"ranks disagree on collective number {mismatch.number} of {group_words(mismatch.group)}: {what}. "
        "That is a bug in the program, not bad hardware"
    )
