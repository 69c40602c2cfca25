"""Which samples a step reads: pure arithmetic on (seed, step), the same on every machine and for every layout.

    global sample n = (step - 1) * global_batch + j
      -> Blend.locate:  n -> (set, index within the set)
      -> epoch, position = divmod(index, windows of the set)
      -> EpochOrder.pieces:  position -> stretches of documents

Random numbers are raw PCG64 output keyed by SeedSequence and sorted: the two streams that numpy promises never to
change, so neither a new numpy nor another processor moves a sample.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

BLEND_PERIOD = 10_000
_DOCUMENTS, _WINDOWS = 0, 1


def step_samples(step: int, global_batch: int, dp_rank: int, dp_degree: int) -> range:
    """Global sample numbers that one data-parallel rank reads in a step; steps count from 1."""
    assert step >= 1
    assert global_batch % dp_degree == 0
    assert 0 <= dp_rank < dp_degree
    local_batch = global_batch // dp_degree
    first = (step - 1) * global_batch + dp_rank * local_batch
    return range(first, first + local_batch)


class Draw(NamedTuple):
    """A sample of a blend: the set, and how many samples of that set came before."""

    set_index: int
    number: int


class Blend:
    """Mixes sets in a repeating pattern that honours their weights to 1/period.

    Weights are rounded to `period` draws (largest remainder, at least one draw a set). Draw k of a set with c of p
    draws may come no earlier than floor(k p / c) and no later than ceil((k + 1) p / c); always taking the earliest
    deadline meets all of these (unit tasks in fair shares: Baruah et al., Proportionate Progress, 1996). So in every
    prefix of the order each set is less than one sample away from its share.
    """

    def __init__(self, weights: Sequence[float], period: int = BLEND_PERIOD) -> None:
        """Lay out the pattern.

        Raises:
            ValueError: no set, a weight that is not positive and finite, or more sets than draws.
        """
        self.counts = _quantize(weights, period)
        self.period = sum(self.counts)
        self._pattern = _fair_order(self.counts)
        self._rank = np.empty(self.period, dtype=np.int64)
        for set_index, count in enumerate(self.counts):
            self._rank[self._pattern == set_index] = np.arange(count)

    def locate(self, sample: int) -> Draw:
        """The set that global sample number `sample` comes from, and its number within the set."""
        cycle, place = divmod(sample, self.period)
        set_index = int(self._pattern[place])
        return Draw(set_index, cycle * self.counts[set_index] + int(self._rank[place]))


def _quantize(weights: Sequence[float], period: int) -> tuple[int, ...]:
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"data set weights must be positive numbers, at least one; got {list(weights)}")
    if len(weights) > period:
        raise ValueError(f"a blend holds at most {period} sets, not {len(weights)}; merge some of them")
    total = sum(weights)
    shares = [weight / total * period for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    while sum(counts) != period:
        missing = 1 if sum(counts) < period else -1
        candidates = [i for i, count in enumerate(counts) if count + missing >= 1]
        counts[max(candidates, key=lambda i: (missing * (shares[i] - counts[i]), -i))] += missing
    divisor = reduce(gcd, counts)
    return tuple(count // divisor for count in counts)


def _fair_order(counts: Sequence[int]) -> Indices:
    period = sum(counts)
    released = [(0, -(-period // count), set_index, 0) for set_index, count in enumerate(counts)]
    waiting: list[tuple[int, int, int]] = []
    order = np.empty(period, dtype=np.int64)
    for place in range(period):
        while released and released[0][0] <= place:
            _, deadline, set_index, draw = heapq.heappop(released)
            heapq.heappush(waiting, (deadline, set_index, draw))
        deadline, set_index, draw = heapq.heappop(waiting)
        assert place < deadline
        order[place] = set_index
        if draw + 1 < counts[set_index]:
            count = counts[set_index]
            release, due = (draw + 1) * period // count, -(-(draw + 2) * period // count)
            heapq.heappush(released, (release, due, set_index, draw + 1))
    return order


def windows_per_epoch(tokens: int, seq_len: int) -> int:
    """Samples that one pass over `tokens` tokens gives: windows of seq_len + 1, each sharing its last token."""
    return max(0, (tokens - 1) // seq_len)


class Piece(NamedTuple):
    """Tokens offset .. offset + length of a document."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class EpochOrder:
    """One pass over a set: documents shuffled and laid end to end, cut into windows, windows shuffled.

    The tokens after the last whole window (fewer than seq_len) are not read in this epoch; the next one shuffles anew.

    Attributes:
        documents: int64 [documents], document numbers in reading order.
        ends: int64 [documents], where in the concatenation each of them ends.
        windows: int64 [windows], window numbers in reading order.
    """

    seq_len: int
    documents: Indices
    ends: Indices
    windows: Indices

    def pieces(self, position: int) -> Iterator[Piece]:
        """What the sample at this position of the epoch is made of, seq_len + 1 tokens in all."""
        start = int(self.windows[position]) * self.seq_len
        left = self.seq_len + 1
        place = int(np.searchsorted(self.ends, start, side="right"))
        begin = int(self.ends[place - 1]) if place else 0
        while left:
            end = int(self.ends[place])
            length = min(left, end - start)
            if length:
                yield Piece(int(self.documents[place]), start - begin, length)
            start, left, begin, place = start + length, left - length, end, place + 1


def epoch_order(lengths: Indices, seq_len: int, seed: int, set_index: int, epoch: int) -> EpochOrder:
    """The order of one epoch of one set. lengths: tokens of each document, [documents]."""
    documents = _permutation(len(lengths), seed, set_index, epoch, _DOCUMENTS)
    ends = np.cumsum(lengths[documents])
    windows = windows_per_epoch(int(ends[-1]), seq_len)
    return EpochOrder(seq_len, documents, ends, _permutation(windows, seed, set_index, epoch, _WINDOWS))


def _permutation(size: int, *key: int) -> Indices:
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable").astype(np.int64, copy=False)
