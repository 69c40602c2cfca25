"""Where a rank stands: its coordinates on the mesh axes, and what follows from them. Pure, no torch at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import ParallelismConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """This process among all: its ranks, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


@dataclass(frozen=True)
class MeshCoords:
    """Coordinates of one rank, and what they decide.

    Ranks are numbered with pp outermost and tp innermost: pp, dp_replicate, dp_shard, cp, tp. Ranks with one dp_rank
    read the same sequences. dp_degree: how many different batches there are.
    """

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    dp_rank: int
    dp_degree: int
    is_first_stage: bool
    is_last_stage: bool


def world_size_of(layout: ParallelismConfig) -> int:
    """Number of ranks that the layout takes."""
    return layout.pp * layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp


def coords_of(rank: int, layout: ParallelismConfig) -> MeshCoords:
    """Coordinates of `rank`. Raises ValueError if the layout has no such rank."""
    size = world_size_of(layout)
    if not 0 <= rank < size:
        raise ValueError(
            f"rank {rank} is not on a mesh of {size} ranks; the degrees in [parallelism] must multiply to it"
        )
    rest, tp = divmod(rank, layout.tp)
    rest, cp = divmod(rest, layout.cp)
    rest, dp_shard = divmod(rest, layout.dp_shard)
    pp, dp_replicate = divmod(rest, layout.dp_replicate)
    return MeshCoords(
        pp=pp,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        cp=cp,
        tp=tp,
        dp_rank=dp_replicate * layout.dp_shard + dp_shard,
        dp_degree=layout.dp_replicate * layout.dp_shard,
        is_first_stage=pp == 0,
        is_last_stage=pp == layout.pp - 1,
    )


def loss_ranks(layout: ParallelismConfig) -> list[int]:
    """One rank per dp rank that holds its loss (last stage, first of cp and tp), in dp order."""
    found: dict[int, int] = {}
    for rank in range(world_size_of(layout)):
        coords = coords_of(rank, layout)
        if coords.is_last_stage and coords.cp == 0 and coords.tp == 0:
            found[coords.dp_rank] = rank
    return [found[dp_rank] for dp_rank in range(layout.dp_replicate * layout.dp_shard)]
