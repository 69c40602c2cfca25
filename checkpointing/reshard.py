"""Which bytes of which shards make up the state of a rank, whatever mesh they were saved on. Pure arithmetic.

Every local tensor is a box inside its logical tensor, and so is every stored slice; what to read is the intersection
of what is needed with what is stored, until nothing needed is left over.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from checkpointing.layout import TensorSlice


class NotCoveredError(ValueError):
    """The stored shards do not hold everything that is needed; the message names the first tensor."""


class Box(NamedTuple):
    """A hyper-rectangle: where it begins and how far it goes in each dim. No dims: a single element."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


class Read(NamedTuple):
    """Copy `box` (in the logical tensor's coordinates) of `part` in shard number `shard` to tensor number `target`."""

    target: int
    shard: int
    part: TensorSlice
    box: Box


def box_of(part: TensorSlice) -> Box:
    """The box that a slice fills."""
    return Box(part.offsets, part.sizes)


def intersect(a: Box, b: Box) -> Box | None:
    """What both boxes have in common, None if that is nothing."""
    starts = tuple(map(max, a.offsets, b.offsets))
    ends = (min(ao + asz, bo + bsz) for ao, asz, bo, bsz in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def subtract(whole: Box, part: Box) -> list[Box]:
    """What is left of `whole` without `part`, as boxes that do not overlap. `part` must lie inside `whole`."""
    rest = []
    offsets, sizes = list(whole.offsets), list(whole.sizes)
    for dim, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        before, after = start - offsets[dim], offsets[dim] + sizes[dim] - start - size
        if before:
            rest.append(Box(tuple(offsets), (*sizes[:dim], before, *sizes[dim + 1 :])))
        if after:
            rest.append(
                Box((*offsets[:dim], start + size, *offsets[dim + 1 :]), (*sizes[:dim], after, *sizes[dim + 1 :]))
            )
        offsets[dim], sizes[dim] = start, size
    return rest


def plan_reads(
    needed: Sequence[TensorSlice], shards: Sequence[Sequence[TensorSlice]], preferred: int = 0
) -> list[Read]:
    """The reads that fill every needed slice exactly once, from few shards.

    shards: what each stored file holds. Shard `preferred` wins ties, then the ones after it in turn, so that many
    ranks do not all read replicated tensors from one file. If that shard alone has just what is needed, it is all
    that is read. Else, greedily, the shard that adds most (lazy greedy: what a shard adds only ever shrinks).
    NotCoveredError if anything is missing, or differs in shape or dtype.
    """
    remaining = _Remaining(needed)
    if remaining.gain_bytes(shards[preferred]) == remaining.size_bytes:
        return remaining.take(preferred, shards[preferred])
    heap = [
        (-remaining.gain_bytes(shards[shard]), turn, shard)
        for turn, shard in ((i, (preferred + i) % len(shards)) for i in range(len(shards)))
    ]
    heapq.heapify(heap)
    reads: list[Read] = []
    while heap and not remaining.empty:
        _, turn, shard = heapq.heappop(heap)
        gain = remaining.gain_bytes(shards[shard])
        if heap and gain < -heap[0][0]:
            heapq.heappush(heap, (-gain, turn, shard))
        elif gain == 0:
            break
        else:
            reads += remaining.take(shard, shards[shard])
    remaining.check_empty()
    return reads


class _Remaining:
    """Boxes still to be filled, by tensor."""

    def __init__(self, needed: Sequence[TensorSlice]) -> None:
        self._needed = needed
        self._targets = {part.name: target for target, part in enumerate(needed)}
        self._boxes = {part.name: [box_of(part)] for part in needed if box_of(part).elements}
        self.size_bytes = sum(part.end_bytes - part.start_bytes for part in needed)

    @property
    def empty(self) -> bool:
        return not self._boxes

    def gain_bytes(self, parts: Sequence[TensorSlice]) -> int:
        total = 0
        for part in parts:
            stored = box_of(part)
            for box in self._boxes.get(part.name, ()):
                self._check_same_tensor(part)
                common = intersect(box, stored)
                if common is not None:
                    total += common.elements * ((part.end_bytes - part.start_bytes) // stored.elements)
        return total

    def take(self, shard: int, parts: Sequence[TensorSlice]) -> list[Read]:
        reads = []
        for part in parts:
            left = []
            for box in self._boxes.pop(part.name, ()):
                common = intersect(box, box_of(part))
                if common is None:
                    left.append(box)
                else:
                    reads.append(Read(self._targets[part.name], shard, part, common))
                    left += subtract(box, common)
            if left:
                self._boxes[part.name] = left
        return reads

    def check_empty(self) -> None:
        if self._boxes:
            name, boxes = next(iter(self._boxes.items()))
            raise NotCoveredError(f"no shard holds {name} at {boxes[0].offsets}, {boxes[0].sizes} elements")

    def _check_same_tensor(self, stored: TensorSlice) -> None:
        wanted = self._needed[self._targets[stored.name]]
        if (stored.dtype, stored.global_shape) != (wanted.dtype, wanted.global_shape):
            raise NotCoveredError(
                f"{stored.name} is {stored.dtype} {list(stored.global_shape)} in the snapshot, "
                f"{wanted.dtype} {list(wanted.global_shape)} in this job"
            )
