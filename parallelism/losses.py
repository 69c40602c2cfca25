"""The loss of a step: cross-entropy, and beside it, if wanted, z-loss, which keeps logits from drifting away."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from parallelism import titan

_IGNORED = -100


class StepLoss:
    """The loss of one microbatch after the other, each as a part of the mean over all tokens of the step.

    Z-loss (PaLM, arXiv 2204.02311) is z_coefficient times the mean square of the log of the softmax's denominator. It
    is part of what is minimised and not of the loss that is told: that stays comparable. Evaluations have none.
    """

    def __init__(self, z_coefficient: float, global_tokens: int) -> None:
        """global_tokens: tokens of the step over all ranks."""
        self.has_z = z_coefficient > 0
        self._z_coefficient = z_coefficient
        self._global_tokens = global_tokens
        self._parts: list[tuple[Tensor, Tensor]] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What to minimise: logits [B, S, V] may be sharded over tp, labels [B, S]."""
        if not self.has_z or not torch.is_grad_enabled():
            return titan.token_loss_sum(logits, labels) / self._global_tokens
        total, cross_entropy, z_loss = token_loss_sum_with_z(logits, labels, self._z_coefficient)
        self._parts.append((cross_entropy / self._global_tokens, z_loss / self._global_tokens))
        return total / self._global_tokens

    def forget(self) -> None:
        """Begin anew: what was computed so far is no part of a step, or of one that is over."""
        self._parts.clear()

    def parts(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy and z-loss of the microbatches since `forget`, detached scalars on their device."""
        assert self._parts, "no microbatch was computed with z-loss"
        cross_entropy, z_loss = zip(*self._parts, strict=True)
        return torch.stack(cross_entropy).sum(), torch.stack(z_loss).sum()


def token_loss_sum_with_z(logits: Tensor, labels: Tensor, z_coefficient: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all tokens, in fp32: the loss to minimise, and the cross-entropy and z-loss that it is made of.

    One pass gives both: the softmax's denominator is what cross-entropy needs anyhow. The last two have no gradient.
    """
    group: dist.ProcessGroup | None = None
    if isinstance(logits, DTensor):
        if logits.placements == (Shard(logits.ndim - 1),):
            group = logits.device_mesh.get_group()
            logits = logits.to_local()
        else:
            logits = logits.full_tensor()
    found = _LossWithZ.apply(logits.flatten(0, 1), labels.flatten(0, 1), group, z_coefficient)
    total, cross_entropy, z_loss = found
    return total, cross_entropy, z_loss


class _LossWithZ(torch.autograd.Function):
    """On this rank's columns of the logits [N, V_local], of which all ranks of `group` have equally many."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None, z_coefficient: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = logits.shape[-1]
        place = 0 if group is None else dist.get_rank(group)
        index = labels - place * columns
        mine, counted = (index >= 0) & (index < columns), labels != _IGNORED
        values = logits.float()
        largest = values.amax(dim=-1)
        _reduce(largest, dist.ReduceOp.MAX, group)
        index = torch.where(mine, index, 0)
        shifted = values - largest.unsqueeze(-1)
        label = torch.where(mine, shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)
        sums = torch.stack([shifted.exp().sum(dim=-1), label])
        _reduce(sums, dist.ReduceOp.SUM, group)
        log_denominator = sums[0].log()
        cross_entropy = torch.where(counted, log_denominator - sums[1], 0.0).sum()
        log_z = log_denominator + largest
        z_loss = z_coefficient * torch.where(counted, log_z, 0.0).square().sum()
        ctx.save_for_backward(logits, log_z, index, mine, counted)
        ctx.z_coefficient = z_coefficient
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return cross_entropy + z_loss, cross_entropy, z_loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, log_z, index, mine, counted = ctx.saved_tensors
        found = (logits.float() - log_z.unsqueeze(-1)).exp_()
        found *= (1.0 + 2.0 * ctx.z_coefficient * log_z).unsqueeze(-1)
        found.scatter_add_(-1, index.unsqueeze(-1), -mine.to(found.dtype).unsqueeze(-1))
        found *= torch.where(counted, gradients[0], 0.0).unsqueeze(-1)
        return found.to(logits.dtype), None, None, None


def _reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    reducing = dist.all_reduce(tensor, operation, group=group, async_op=True)
    assert reducing is not None
    reducing.wait()
