"""Promise: Muon's update does not depend on how parameters are cut, and is the same on all that hold a piece."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from configs.schema import OptimizerConfig
from parallelism.mesh import World
from parallelism.muon import FusedHeads, Muon, MuonSlot, orthogonalise
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

CONFIG = OptimizerConfig(name="muon", muon_lr_ratio=0.5)
LR, DECAY = 0.1, 0.3
# Shapes, and placements on a mesh of 2 x 2. The third leaves a rank without a row, the last two are experts.
CUTS: list[tuple[tuple[int, ...], tuple[Placement, ...]]] = [
    ((12, 20), (Shard(0), Shard(1))),
    ((10, 6), (Replicate(), Shard(0))),
    ((3, 9), (Shard(0), Shard(0))),
    ((4, 6, 10), (Shard(0), Replicate())),
    ((3, 8, 5), (Shard(0), Shard(1))),
]
FUSED = FusedHeads(queries_per_key=1, head_dim=2)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alone(shape: tuple[int, ...], number: int, fused: FusedHeads | None) -> Tensor:
    """What two updates make of a whole parameter, by the formulas of the paper."""
    weight, momentum = values(shape, number), torch.zeros(shape)
    for step in range(2):
        gradient = values(shape, 100 * step + 50 + number)
        momentum.lerp_(gradient, 1 - CONFIG.muon_momentum)
        wanted = gradient.lerp(momentum, CONFIG.muon_momentum)
        wanted = wanted.view(-1, *shape[-2:])
        parts = fused.split(wanted) if fused else [wanted]
        done = [0.2 * max(part.shape[-2:]) ** 0.5 * orthogonalise(part, 5) for part in parts]
        update = (fused.join(done) if fused else done[0]).view(shape)
        weight = weight * (1 - 0.5 * LR * DECAY) - 0.5 * LR * update
    return weight


def spread(world: World) -> list[list[float]]:
    """By parameter: the largest error of this rank's piece, and how much of it there is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    slots, expected = [], []
    for number, (shape, placements) in enumerate(CUTS):
        parameter = nn.Parameter(distribute_tensor(values(shape, number), mesh, placements))
        local = parameter.detach().to_local()
        fused = FUSED if number == 0 else None
        slots.append(MuonSlot(parameter, local, torch.zeros_like(local), DECAY, fused))
        expected.append(distribute_tensor(alone(shape, number, fused), mesh, placements))
    muon = Muon(CONFIG, slots, range(dist.get_world_size()), None, torch.float32)
    for step in range(2):
        for number, slot in enumerate(slots):
            whole = values(tuple(slot.parameter.shape), 100 * step + 50 + number)
            slot.parameter.grad = distribute_tensor(whole, mesh, CUTS[number][1])
        muon.step(LR)
    found = []
    for slot, whole in zip(slots, expected, strict=True):
        assert isinstance(whole, DTensor)
        off = (slot.local - whole.to_local()).abs()
        found.append([float(off.max()) if off.numel() else 0.0, off.numel()])
    return found


def test_every_cut_gives_the_update_of_one_process() -> None:
    """Matrices and experts cut by rows, columns, both or not at all, a fused projection and an empty shard."""
    by_rank = run_ranks(4, spread)
    for number in range(len(CUTS)):
        assert max(found[number][0] for found in by_rank) < 2e-5
        assert sum(found[number][1] for found in by_rank) > 0
    assert min(found[2][1] for found in by_rank) == 0
