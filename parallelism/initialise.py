"""Weights as a function of (seed, parameter name): the same on every layout, whatever the mesh."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallelism import titan


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part; unlike `hash`, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def materialise(part: nn.Module, device: torch.device, seed: int, with_weights: bool) -> None:
    """Give a meta model storage on `device`, right buffers and, if asked, initial weights.

    Without weights the parameters hold whatever memory held: for a caller that loads a snapshot next. Each rank draws
    a whole parameter at a time and keeps its shard, so initialising needs no communication and room for the largest
    parameter in fp32.
    """
    part.to_empty(device=device)
    with torch.no_grad():
        titan.retie(part)
        titan.reset_buffers(part)
        if with_weights:
            for name, parameter, initialise in titan.initialisers(part):
                _draw(parameter, initialise, derive_seed(seed, "init", name))
    part.train()


def _draw(parameter: nn.Parameter, initialise: object, seed: int) -> None:
    assert callable(initialise)
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    torch.manual_seed(seed)
    initialise(whole)
    if isinstance(parameter, DTensor):
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())
    else:
        parameter.copy_(whole)
