"""One 64-bit sum a tensor, taken where the tensor is: any single changed bit changes it, and so does any exchange.

On the CPU it is xxh3, which reads about as fast as memory gives. On a GPU it is the sum of all 32-bit words, each
times an odd number that depends on its position, modulo 2^64: no two words give the same product with an odd number,
and nothing but the sums leaves the device. Sums of one kind of device say nothing about those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from parallelism.optimizer import local_of

if TYPE_CHECKING:
    from parallelism.checksum_kernel import Words


class Checksummer:
    """Takes the sums of the same tensors again and again; they must all be on one device and keep their storage."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [local_of(tensor).detach() for tensor in tensors]
        self._words: Words | None = None
        if self._tensors and self._tensors[0].device.type != "cpu":
            from parallelism.checksum_kernel import Words

            self._words = Words(self._tensors)

    def take(self) -> Tensor:
        """The sums as they are now: int64 [number of tensors], on their device; a DTensor's is its local shard's.

        On a GPU nothing waits: the pass is queued behind what computes the tensors.
        """
        if self._words is not None:
            return self._words.sums()
        return torch.tensor([_signed(_hash(tensor)) for tensor in self._tensors], dtype=torch.int64)


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of some tensors, once; see `Checksummer`."""
    return Checksummer(tensors).take()


def _hash(tensor: Tensor) -> int:
    return xxhash.xxh3_64_intdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
