"""Which batches a run leaves out, and which snapshots belong to a history that it gave up. Pure, no torch.

Batches are numbered from 1 by their position in the job's stream of data: without anything left out, step s reads
batch s. What is left out is a set of positions, so that it does not matter when, or in which order, it was decided:
step s reads the s-th batch of those that remain.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

Age = tuple[int, int]
Ranges = tuple[tuple[int, int], ...]


class Refused(msgspec.Struct, frozen=True):
    """Snapshots, by (generation, step), that must not be loaded.

    ages: single ones. abandoned: (generation, step) of histories that were given up: nothing that this generation or
    an earlier one made after that step.
    """

    ages: tuple[Age, ...] = ()
    abandoned: tuple[Age, ...] = ()

    def __contains__(self, age: object) -> bool:
        if not isinstance(age, tuple):
            return False
        generation, step = age
        return age in self.ages or any(generation <= last and step > kept for last, kept in self.abandoned)


def union(*several: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges (first, count) of positions, joined and put in order: sorted, and apart from each other."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted((first, count) for ranges in several for first, count in ranges):
        if joined and first <= sum(joined[-1]):
            before = joined.pop()
            first, count = before[0], max(sum(before), first + count) - before[0]
        if count > 0:
            joined.append((first, count))
    return tuple(joined)


def batch_of(step: int, left_out: Ranges) -> int:
    """Position of the batch that a step reads. left_out: as `union` puts it."""
    position = step
    for first, count in left_out:
        if first > position:
            break
        position += count
    return position


def passed_over(step: int, left_out: Ranges) -> Ranges:
    """The ranges that lie between the batch of the step before and the batch of this one."""
    before, now = batch_of(step - 1, left_out) if step > 1 else 0, batch_of(step, left_out)
    return tuple((first, count) for first, count in left_out if before < first < now)


def batches_of(first_step: int, last_step: int, left_out: Ranges) -> Ranges:
    """Positions of the batches that steps first_step .. last_step read, as ranges."""
    return union((batch_of(step, left_out), 1) for step in range(first_step, last_step + 1))
