"""From a linear layer whose operands are spread over the tp axis to a product of plain tensors, and back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from parallelism.lowp_state import Site


def linear(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T over the last dim of x, by the site's kernel.

    Each rank multiplies what it has, with scales of its own; what belongs together is added up afterwards, as with any
    other linear layer. Where weight is no DTensor, nothing is spread.
    """
    if not isinstance(weight, DTensor):
        return _flat(site, x, weight, 0)
    assert isinstance(x, DTensor), f"{site.name}: the weight is spread over tp, but its input is not"
    assert weight.device_mesh.ndim == x.device_mesh.ndim == 1
    mesh, along = weight.device_mesh, _Spread(x.placements[0], weight.placements[0], x.ndim)
    first_column = mesh.get_local_rank() * weight.to_local().shape[0] if along.column else 0
    local = _flat(
        site,
        x.to_local(grad_placements=[along.x_grad]),
        weight.to_local(grad_placements=[along.weight_grad]),
        first_column,
    )
    return DTensor.from_local(local, mesh, [along.result], run_check=False)


class _Spread:
    """How the result and the gradients of x @ weight.T are spread over one axis, by how its operands are.

    column: each rank has some of the outputs.
    """

    def __init__(self, x: Placement, weight: Placement, x_dims: int) -> None:
        self.column = weight.is_shard(0)
        self.x_grad: Placement = x
        self.weight_grad: Placement = weight
        self.result: Placement = x
        if x.is_replicate() and self.column:
            self.x_grad, self.result = Partial(), Shard(x_dims - 1)
        elif x.is_shard(x_dims - 1) and weight.is_shard(1):
            self.result = Partial()
        elif weight.is_replicate() and x.is_shard() and not x.is_shard(x_dims - 1):
            # Each rank has some of the tokens.
            self.weight_grad = Partial()
        elif not (weight.is_replicate() and x.is_replicate()):
            raise AssertionError(f"no rule for an input that is {x} and a weight that is {weight}")


def _flat(site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
    product = site.kernel.linear(site, x.reshape(-1, x.shape[-1]), weight, first_column)
    return product.unflatten(0, x.shape[:-1])
