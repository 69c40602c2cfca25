"""Promise: a state saved on any grid of ranks is read back whole on any other grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.layout import TensorSlice
from checkpointing.reshard import Box, NotCoveredError, box_of, intersect, plan_reads, subtract

Cuts = list[list[int]]


@st.composite
def grid(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A random cut of a tensor into boxes, one a rank, some of them empty, uneven as they come."""
    per_dim = []
    for size in shape:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
        per_dim.append(list(itertools.pairwise([0, *cuts, size])))
    boxes = []
    for spans in itertools.product(*per_dim):
        boxes.append(Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans)))
    return draw(st.permutations(boxes))


@st.composite
def two_grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    return shape, draw(grid(shape)), draw(grid(shape))


def as_slice(box: Box, shape: tuple[int, ...], name: str = "w", dtype: str = "I64") -> TensorSlice:
    return TensorSlice(name, dtype, shape, box.offsets, box.sizes, 0, 8 * box.elements)


def window(box: Box, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    origin = origin or (0,) * len(box.offsets)
    return tuple(slice(o - b, o - b + s) for o, s, b in zip(box.offsets, box.sizes, origin, strict=True))


@settings(max_examples=200, deadline=None)
@given(two_grids(), st.integers(1, 3))
def test_any_grid_to_any_grid_gives_the_same_tensor(
    grids: tuple[tuple[int, ...], list[Box], list[Box]], copies: int
) -> None:
    shape, stored, needed = grids
    full = np.arange(math.prod(shape)).reshape(shape)
    files = [[as_slice(box, shape)] for box in stored] * copies
    contents = [full[window(box)] for box in stored] * copies
    for rank, box in enumerate(needed):
        local = np.full(box.sizes, -1)
        touched = np.zeros(box.sizes, dtype=int)
        for read in plan_reads([as_slice(box, shape)], files, rank % len(files)):
            into = window(read.box, box.offsets)
            local[into] = contents[read.shard][window(read.box, read.part.offsets)]
            touched[into] += 1
        assert (local == full[window(box)]).all()
        assert (touched == 1).all()


@settings(max_examples=100, deadline=None)
@given(two_grids(), st.data())
def test_a_missing_piece_is_never_papered_over(
    grids: tuple[tuple[int, ...], list[Box], list[Box]], data: st.DataObject
) -> None:
    """With one shard gone, exactly the ranks that need something of it refuse."""
    shape, stored, needed = grids
    gone = data.draw(st.integers(0, len(stored) - 1))
    files = [[as_slice(box, shape)] if i != gone else [] for i, box in enumerate(stored)]
    for box in needed:
        if box.elements and intersect(box, stored[gone]):
            with pytest.raises(NotCoveredError, match="no shard holds w"):
                plan_reads([as_slice(box, shape)], files)
        else:
            plan_reads([as_slice(box, shape)], files)


@given(two_grids())
def test_subtraction_and_intersection_partition_a_box(grids: tuple[tuple[int, ...], list[Box], list[Box]]) -> None:
    _, some, others = grids
    for a, b in itertools.product(some, others):
        if a.elements and (common := intersect(a, b)):
            parts = [common, *subtract(a, common)]
            assert sum(part.elements for part in parts) == a.elements
            assert all(intersect(x, y) is None for x, y in itertools.combinations(parts, 2))


def test_an_unchanged_layout_reads_its_own_file_only() -> None:
    shape = (8, 4)
    rows = [Box((2 * i, 0), (2, 4)) for i in range(4)]
    norm = TensorSlice("norm", "I64", (4,), (0,), (4,), 64, 96)
    files = [[as_slice(box, shape), norm] for box in rows]
    for rank in range(4):
        reads = plan_reads(files[rank], files, rank)
        assert {read.shard for read in reads} == {rank}
        assert [read.box for read in reads] == [rows[rank], Box((0,), (4,))]


def test_replicas_are_read_from_few_files() -> None:
    """Two replicas of two halves: a whole tensor needs two files, not four; a norm beside them adds none."""
    shape = (8, 4)
    top, bottom = Box((0, 0), (4, 4)), Box((4, 0), (4, 4))
    norm = TensorSlice("norm", "I64", (4,), (0,), (4,), 128, 160)
    files = [[as_slice(box, shape), norm] for box in (top, bottom, top, bottom)]
    whole = as_slice(Box((0, 0), shape), shape)
    for rank in range(4):
        reads = plan_reads([whole, norm], files, rank)
        assert len({read.shard for read in reads}) == 2


def test_another_shape_or_dtype_is_refused_in_words() -> None:
    box = Box((0, 0), (4, 4))
    assert box_of(as_slice(box, (4, 4))) == box
    with pytest.raises(NotCoveredError, match=r"w is I64 \[4, 4\] in the snapshot, F64 \[4, 4\] in this job"):
        plan_reads([as_slice(box, (4, 4), dtype="F64")], [[as_slice(box, (4, 4))]])
    with pytest.raises(NotCoveredError, match=r"\[8, 4\] in this job"):
        plan_reads([as_slice(box, (8, 4))], [[as_slice(box, (4, 4))]])
