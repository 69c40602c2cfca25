"""Promise: on logits that are cut over ranks both losses and the gradients are those of one rank."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallelism.losses import token_loss_sum_with_z
from parallelism.mesh import World
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed


def cut(world: World) -> list[float]:
    """How far both losses and this rank's gradients are off, for cut and for whole logits."""
    generator = torch.Generator().manual_seed(5)
    logits, labels = 2 * torch.randn(2, 6, 16, generator=generator), torch.randint(0, 16, (2, 6), generator=generator)
    labels[0, 3] = -100
    alone = logits.clone().requires_grad_()
    total, *parts = token_loss_sum_with_z(alone, labels, 0.1)
    total.backward()
    assert alone.grad is not None
    mesh = init_device_mesh("cpu", (world.world_size,), mesh_dim_names=("tp",))
    off = []
    for placement in (Shard(2), Replicate()):
        spread = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        found, *found_parts = token_loss_sum_with_z(spread, labels, 0.1)
        found.backward()
        expected = distribute_tensor(alone.grad, mesh, [placement]).to_local()
        assert isinstance(spread.grad, DTensor)
        off.append(float((spread.grad.to_local() - expected).abs().max() / alone.grad.abs().max()))
        pairs = zip((found, *found_parts), (total, *parts), strict=True)
        off += [abs(float(a.detach()) / float(b.detach()) - 1) for a, b in pairs]
    return off


def test_cut_logits_give_what_whole_ones_give() -> None:
    assert max(max(off) for off in run_ranks(2, cut)) < 1e-6
