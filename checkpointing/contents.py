"""Which logical tensors a snapshot of a job must hold, worked out without building it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from checkpointing.assemble import SnapshotReader
from checkpointing.layout import SnapshotDamagedError
from parallelism.outline import Outline

COUNTER = "optimizer.step"
SCALES = "precision.amax_history"
MOMENTS = ("optimizer.exp_avg.", "optimizer.exp_avg_sq.")


class Wanted(NamedTuple):
    """A logical tensor that a snapshot must have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of all its elements."""
        return self.dtype.itemsize * math.prod(self.shape)


def wanted_tensors(model: Outline) -> list[Wanted]:
    """Everything that a snapshot of this model and its optimizer holds, the model first."""
    found = [Wanted(f"model.{name}", tensor.dtype, tuple(tensor.shape)) for name, tensor in model.tensors.items()]
    found.append(Wanted(COUNTER, torch.float32, ()))
    for moment in MOMENTS:
        found += [Wanted(moment + name, p.dtype, tuple(p.shape)) for name, p in model.parameters.items()]
    return found


def fresh_tensors(model: Outline) -> list[Wanted]:
    """What a snapshot to begin with holds beside `wanted_tensors`, as zeros: scales of steps that never were."""
    return [] if model.scales is None else [Wanted(SCALES, torch.float32, model.scales)]


def check_shapes(snapshot: SnapshotReader, wanted: Sequence[Wanted]) -> None:
    """SnapshotDamagedError unless the snapshot has all of `wanted`, in these shapes."""
    for tensor in wanted:
        dtype, shape = snapshot.tensors.get(tensor.name, (None, None))
        if (dtype, shape) != (tensor.dtype, tensor.shape):
            found = "is missing" if shape is None else f"is {dtype} {list(shape)}"
            raise SnapshotDamagedError(
                f"step {snapshot.manifest.step}: {tensor.name} {found}, config.toml asks for "
                f"{tensor.dtype} {list(tensor.shape)}: the snapshot is of another model than config.toml describes"
            )
