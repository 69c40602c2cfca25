"""Rounding by chance and mixing by chance, from counters and no generator: a step that is computed again is the same.

What an element is rounded with depends on the run's seed, the step, the module, and where in the global batch and in
the matrix the element stands; not on the rank, nor on how the batch was cut into microbatches.
"""

from __future__ import annotations

import torch
from torch import Tensor

HADAMARD_SIZE = 16

_WORD = 0xFFFFFFFF
# The signs that make a Hadamard transform a random one; any fixed ones do, as long as both operands get the same.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def uniform(key: int, rows: range, columns: range, device: torch.device) -> Tensor:
    """Numbers in [0, 1), one for each place of a matrix: functions of the key, the row's number and the column's."""
    row = _mixed(torch.arange(rows.start, rows.stop, device=device) * 0x9E3779B1 + key & _WORD)
    column = torch.arange(columns.start, columns.stop, device=device) * 0x85EBCA6B
    words = _mixed(row[:, None] + column[None, :] & _WORD)
    return (words >> 8).float() * 2.0**-24


def transform(values: Tensor) -> Tensor:
    """A random Hadamard transform of each 16 rows of [R, C], zeros added behind: products over rows stay."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % HADAMARD_SIZE))
    mixed = _hadamard(values.device) @ padded.unflatten(0, (-1, HADAMARD_SIZE))
    return mixed.flatten(0, 1)


def _mixed(words: Tensor) -> Tensor:
    """MurmurHash3's finaliser, on 32 bits of 64."""
    words = words ^ words >> 16
    words = words * 0x85EBCA6B & _WORD
    words = words ^ words >> 13
    words = words * 0xC2B2AE35 & _WORD
    return words ^ words >> 16


def _hadamard(device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < HADAMARD_SIZE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * torch.tensor(_SIGNS, dtype=torch.float32, device=device) / HADAMARD_SIZE**0.5
