"""Promise: z-loss is minimised beside the loss with the right gradients, told apart from it, and absent elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallelism.losses import StepLoss, token_loss_sum_with_z

Z = 0.05


def logits_and_labels(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [2, 5, 11], large enough to overflow a naive exp, and labels of which one is to be ignored."""
    generator = torch.Generator().manual_seed(3)
    logits = (200 * torch.randn(2, 5, 11, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[1, 2] = -100
    return logits, labels


def plainly(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both sums as their definitions say, in fp64."""
    wide, kept = logits.double().flatten(0, 1), labels.flatten() != -100
    cross_entropy = torch.nn.functional.cross_entropy(wide, labels.flatten(), reduction="sum")
    return cross_entropy, Z * wide.logsumexp(-1)[kept].square().sum()


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_both_losses_and_their_gradient_are_those_of_the_definitions(dtype: torch.dtype, rel: float) -> None:
    logits, labels = logits_and_labels(dtype)
    total, cross_entropy, z_loss = token_loss_sum_with_z(logits, labels, Z)
    expected = plainly(logits, labels)
    assert (float(cross_entropy), float(z_loss)) == pytest.approx([each.item() for each in expected], rel=1e-5)
    assert total.item() == pytest.approx(sum(expected).item(), rel=1e-5)
    assert not cross_entropy.requires_grad
    (wanted,) = torch.autograd.grad(sum(expected), logits)
    (found,) = torch.autograd.grad(3 * total, logits)
    torch.testing.assert_close(found, 3 * wanted, rtol=rel, atol=rel * float(wanted.abs().max()))
    assert not found[1, 2].any(), "an ignored token pulls at nothing"


def test_a_step_tells_its_losses_apart_and_an_evaluation_has_no_z_loss() -> None:
    logits, labels = logits_and_labels()
    loss = StepLoss(Z, global_tokens=20)
    loss(logits, labels)
    loss.forget()  # a pipeline's trial run
    total = sum(float(loss(part, own).detach()) for part, own in zip(logits.split(1), labels.split(1), strict=True))
    cross_entropy, z_loss = (each.item() for each in plainly(logits, labels))
    assert [float(each) for each in loss.parts()] == pytest.approx([cross_entropy / 20, z_loss / 20], rel=1e-5)
    assert total == pytest.approx((cross_entropy + z_loss) / 20, rel=1e-5)
    with torch.no_grad():
        assert float(loss(logits, labels)) == pytest.approx(cross_entropy / 20, rel=1e-5)
