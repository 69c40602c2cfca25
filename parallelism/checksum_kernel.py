"""The GPU's part of `parallelism.checksums`: one kernel over the words of many tensors.

Each block adds what it found to its tensor's sum. Additions modulo 2^64 may come in any order: every run gives the
same sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WORD_BYTES = 4


@triton.jit
def weighted_sums(starts, counts, owners, firsts, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program p adds BLOCK words, from word firsts[p] of tensor owners[p] on, to that tensor's sum."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    words = tl.load(starts + owner).to(tl.pointer_type(tl.int32))
    offsets = tl.load(firsts + program) + tl.arange(0, BLOCK)
    word = tl.load(words + offsets, mask=offsets < tl.load(counts + owner), other=0).to(tl.int64)
    # Odd, and well mixed in its upper half, so that two changes do not cancel each other.
    weight = ((offsets * 0x1E3779B97F4A7C15 + 0x2545F4914F6CDD1D) ^ ((offsets * 0x369DEA0F31A53F85) >> 29)) | 1
    tl.atomic_add(sums + owner, tl.sum(word * weight, axis=0))


class Words:
    """Where the words of some tensors lie: a table on the device, made once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._device = tensors[0].device
        self._ragged = {i: tensor for i, tensor in enumerate(tensors) if not _is_whole_words(tensor)}
        self._padded = {i: torch.zeros(_words(tensor), dtype=torch.int32, device=self._device)
                        for i, tensor in self._ragged.items()}  # fmt: skip
        counts = torch.tensor([_words(tensor) for tensor in tensors], dtype=torch.int64)
        blocks = (counts + _BLOCK - 1) // _BLOCK
        owners = torch.repeat_interleave(torch.arange(len(tensors)), blocks)
        before = torch.cumsum(blocks, 0) - blocks
        firsts = (torch.arange(len(owners)) - before[owners]) * _BLOCK
        starts = [self._padded.get(i, tensor).data_ptr() for i, tensor in enumerate(tensors)]
        table = (torch.tensor(starts, dtype=torch.int64), counts, owners, firsts)
        self._starts, self._counts, self._owners, self._firsts = (
            each.to(self._device, non_blocking=True) for each in table
        )

    def sums(self) -> Tensor:
        """The sums as the tensors are now, int64 [number of tensors], on their device."""
        for i, tensor in self._ragged.items():
            data = tensor.reshape(-1).view(torch.uint8)
            self._padded[i].view(torch.uint8)[: data.numel()].copy_(data)
        sums = torch.zeros(len(self._tensors), dtype=torch.int64, device=self._device)
        if len(self._owners):
            weighted_sums[(len(self._owners),)](
                self._starts, self._counts, self._owners, self._firsts, sums, BLOCK=_BLOCK
            )
        return sums


def _words(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _WORD_BYTES)


def _is_whole_words(tensor: Tensor) -> bool:
    whole = tensor.numel() * tensor.element_size() % _WORD_BYTES == 0
    return whole and tensor.is_contiguous() and tensor.data_ptr() % _WORD_BYTES == 0
