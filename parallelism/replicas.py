"""Tensors that several ranks must hold alike, and one number a rank that tells in a single sum whether they do.

Each rank multiplies what it holds with a factor, chosen so that the factors of the ranks that hold the same add up to
nothing. Where all agree, the sum over the whole job is zero; one rank that differs makes it something else. So all
replicas of a job are compared by one integer in an all-reduce that is made anyhow; who differs is asked only then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from parallelism.exchange import gather_ints
from parallelism.initialise import derive_seed
from parallelism.recorder import fold

_MODULUS = 1 << 64


def placement_key(stage: int, tensor: Tensor) -> str:
    """Equal on exactly those ranks that hold the same part of the tensor. stage: the pipeline stage's number."""
    if not isinstance(tensor, DTensor):
        return f"stage {stage}"
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    assert mesh.mesh_dim_names is not None
    cut = [
        f"{mesh.mesh_dim_names[dim]} {coordinate[dim]}"
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    ]
    return f"stage {stage} {' '.join(cut)}"


class Replicas:
    """Which of a list of tensors this rank shares with which others. Built by all ranks together.

    keys: of each tensor, what `placement_key` or a caller of its own kind says; they mean the same on all ranks.
    """

    def __init__(self, rank: int, keys: Sequence[str]) -> None:
        self.rank = rank
        self._members: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            self._members.setdefault(key, []).append(number)
        self._ids = {key: derive_seed("replicas", key) for key in self._members}
        holders = _holders(gather_ints(list(self._ids.values())), frozenset(self._ids.values()))
        self._factors = {key: _factor(number, holders[number].index(rank), len(holders[number]))
                         for key, number in self._ids.items()}  # fmt: skip

    def word(self, sums: Sequence[int]) -> int:
        """What this rank adds to the job's sum, a signed 64-bit number; sums: one of each tensor.

        Added up over all ranks, modulo 2^64, the words are zero if all replicas are equal. One rank that differs shows
        but for a chance of less than 2^-32.
        """
        total = sum(self._factors[key] * value for key, value in self._by_key(sums).items())
        return (total + (1 << 63)) % _MODULUS - (1 << 63)

    def compare(self, sums: Sequence[int]) -> Disagreement:
        """Which ranks differ from their replicas. Collective; for when the words did not add up to nothing."""
        mine = [number for key, value in self._by_key(sums).items() for number in (self._ids[key], value)]
        held: dict[int, dict[int, int]] = {}
        for rank, row in enumerate(gather_ints(mine)):
            for number, value in zip(row[::2], row[1::2], strict=True):
                held.setdefault(number, {})[rank] = value
        return judge_replicas(held)

    def _by_key(self, sums: Sequence[int]) -> Mapping[str, int]:
        return {key: fold(sums[number] for number in numbers) for key, numbers in self._members.items()}


@dataclass(frozen=True)
class Disagreement:
    """odd: ranks that a majority of their replicas outvotes. tied: ranks of which nobody can say who is right."""

    odd: frozenset[int]
    tied: frozenset[int]


def judge_replicas(held: Mapping[int, Mapping[int, int]]) -> Disagreement:
    """Who differs. held: of each thing that is shared, the sum that each of its ranks has."""
    odd: set[int] = set()
    tied: set[int] = set()
    for by_rank in held.values():
        (value, votes), *others = Counter(by_rank.values()).most_common()
        if others and 2 * votes > len(by_rank):
            odd |= {rank for rank, theirs in by_rank.items() if theirs != value}
        elif others:
            tied |= set(by_rank)
    return Disagreement(frozenset(odd), frozenset(tied - odd))


def _holders(rows: Sequence[Sequence[int]], wanted: Collection[int]) -> dict[int, list[int]]:
    """By number, the ranks in whose row it is."""
    holders: dict[int, list[int]] = {number: [] for number in wanted}
    for rank, row in enumerate(rows):
        for number in holders.keys() & set(row):
            holders[number].append(rank)
    return holders


def _factor(number: int, place: int, count: int) -> int:
    """Differences around a ring of random numbers: they add up to nothing. 0 for a ring of one."""
    if count == 1:
        return 0
    ring = [derive_seed("ring", number, each) for each in (place, (place + 1) % count)]
    return ring[0] - ring[1]
