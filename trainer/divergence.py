"""Which rank computed something else, from what each sent in two computations of the same step. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the supervisor's tests need no torch
    from parallelism.recorder import Tape


@dataclass(frozen=True)
class Divergence:
    """One rank's difference between two tapes: the place in the first where it begins, and per channel the number of
    the first send that differs."""

    place: int
    sends: Mapping[int, int]


def divergence(first: Tape, again: Tape) -> Divergence | None:
    """How two tapes of one rank differ; None if they do not."""
    place = next((i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b), None)
    if place is None and len(first) == len(again):
        return None
    theirs = {(sent.channel, sent.number): sent.sum for sent in again}
    sends: dict[int, int] = {}
    for sent in first:
        if sent.sum is not None and theirs.get((sent.channel, sent.number)) != sent.sum:
            sends.setdefault(sent.channel, sent.number)
    return Divergence(min(len(first), len(again)) if place is None else place, sends)


def is_excused(first: Tape, mine: Divergence, others: Iterable[Mapping[int, int]]) -> bool:
    """Whether this rank had taken part in something to which another rank had already sent something else.

    others: `Divergence.sends` of the other ranks that differ.
    """
    before = {(sent.channel, sent.number) for sent in first[: mine.place]}
    return any(number in before for sends in others for number in sends.items())


def outvoted(shares: Mapping[int, Mapping[int, int]]) -> frozenset[int]:
    """Ranks whose result for a share is not what the majority of those who computed it has.

    shares: of each share (and place in it) the digest that each rank found. Where there is no majority, nobody is.
    """
    odd: set[int] = set()
    for found in shares.values():
        digest, votes = Counter(found.values()).most_common(1)[0]
        if 2 * votes > len(found):
            odd |= {rank for rank, theirs in found.items() if theirs != digest}
    return frozenset(odd)


def disputed(shares: Mapping[int, Mapping[int, int]]) -> frozenset[int]:
    """Ranks that computed a share for which not all found the same."""
    return frozenset(rank for found in shares.values() if len(set(found.values())) > 1 for rank in found)
