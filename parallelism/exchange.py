"""Small numbers that every rank has and every rank wants to see; for startup and for rare occasions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_ints(mine: Sequence[int]) -> list[list[int]]:
    """Every rank's signed 64-bit numbers, by rank; ranks may have different numbers of them. Collective."""
    world_size = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(mine)], dtype=torch.int64))
    longest = max(int(count) for count in counts)
    if longest == 0:
        return [[] for _ in counts]
    padded = torch.zeros(longest, dtype=torch.int64)
    padded[: len(mine)] = torch.tensor(list(mine), dtype=torch.int64)
    rows = [torch.zeros(longest, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(rows, padded)
    return [[int(value) for value in row[: int(count)]] for row, count in zip(rows, counts, strict=True)]
