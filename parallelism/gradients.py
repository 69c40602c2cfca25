"""The norm of all gradients of the job, whatever they are sharded over, in one collective."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallelism.optimizer import local_of


def clip_by_global_norm(parts: list[nn.Module], stage_ranks: int, max_norm: float) -> Tensor:
    """Scale gradients down to a global 2-norm of max_norm. Collective over all ranks.

    Each rank adds up the squares of its local shards, a shard that several ranks of the stage hold counted by its
    share, and one all-reduce over the world adds the ranks up: no walk along mesh axes, and bit for bit the same
    result everywhere, so that ranks may decide on it without another vote.

    Args:
        parts: this rank's stages, after backward.
        stage_ranks: number of ranks that a pipeline stage is spread over.
        max_norm: the largest norm that passes unscaled.

    Returns:
        The norm before scaling, an fp32 scalar on the device. Not finite if any gradient is not.
    """
    gradients, shares = [], []
    for part in parts:
        for parameter in part.parameters():
            if parameter.grad is not None:
                gradients.append(local_of(parameter.grad))
                shares.append(shards_of(parameter) / stage_ranks)
    device = gradients[0].device
    with torch.no_grad():
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        squares = norms.square() @ torch.tensor(shares, dtype=torch.float64, device=device)
        # Not a synchronous one: NCCL would run it among what computes, where waiting cannot be told from computing.
        summing = dist.all_reduce(squares, async_op=True)
        assert summing is not None
        summing.wait()
        norm = squares.sqrt().float()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def shards_of(parameter: nn.Parameter) -> int:
    """Into how many different pieces a parameter that has a gradient is cut."""
    assert isinstance(parameter, DTensor)
    assert isinstance(parameter.grad, DTensor)
    assert not any(placement.is_partial() for placement in parameter.grad.placements)
    mesh = parameter.device_mesh
    # Not is_shard(): a dim that two axes cut (tp, then fsdp) has a strided placement, for which that is False.
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if not placement.is_replicate())
