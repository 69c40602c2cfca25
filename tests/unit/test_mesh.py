"""Ranks on the mesh: each has one place, and reads what its place says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import ParallelismConfig
from parallelism.mesh import coords_of, loss_ranks, world_size_of

degrees = st.integers(1, 4)
layouts = st.builds(ParallelismConfig, pp=degrees, dp_replicate=degrees, dp_shard=degrees, cp=degrees, tp=degrees)


@given(layouts)
def test_coordinates_are_those_of_a_row_major_grid(layout: ParallelismConfig) -> None:
    """pp varies slowest and tp fastest, as in the grid that numpy lays out."""
    shape = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    for rank in range(world_size_of(layout)):
        coords = coords_of(rank, layout)
        place = (coords.pp, coords.dp_replicate, coords.dp_shard, coords.cp, coords.tp)
        assert place == tuple(map(int, np.unravel_index(rank, shape)))


@given(layouts)
def test_every_batch_is_read_by_whole_model_replicas(layout: ParallelismConfig) -> None:
    """Each dp rank stands for pp * cp * tp ranks, one first and one last stage among them."""
    everyone = [coords_of(rank, layout) for rank in range(world_size_of(layout))]
    for dp_rank in range(layout.dp_replicate * layout.dp_shard):
        readers = [coords for coords in everyone if coords.dp_rank == dp_rank]
        assert len(readers) == layout.pp * layout.cp * layout.tp
        assert sum(coords.is_first_stage for coords in readers) == layout.cp * layout.tp
        assert sum(coords.is_last_stage for coords in readers) == layout.cp * layout.tp


@given(layouts)
def test_loss_comes_from_one_last_stage_a_batch(layout: ParallelismConfig) -> None:
    """`loss_ranks` lists each dp rank once, in order, from the last stage."""
    places = [coords_of(rank, layout) for rank in loss_ranks(layout)]
    assert [coords.dp_rank for coords in places] == list(range(layout.dp_replicate * layout.dp_shard))
    assert all(coords.is_last_stage for coords in places)


def test_rank_off_the_mesh_is_refused() -> None:
    """A rank beyond the degrees is a user's mistake."""
    with pytest.raises(ValueError, match="degrees"):
        coords_of(4, ParallelismConfig(dp_shard=4))
