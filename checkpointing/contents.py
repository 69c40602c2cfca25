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
_MODEL, _OPTIMIZER, _AVERAGE = "model.", "optimizer.", "ema."
SCALES = "precision.amax_history"


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
    found = wanted_weights(model)
    found.append(Wanted(COUNTER, torch.float32, ()))
    for name, parameter in model.parameters.items():
        found += [Wanted(kept_as(kind, name), parameter.dtype, tuple(parameter.shape)) for kind in model.kept(name)]
    if model.has_average:
        found += [Wanted(_AVERAGE + name, p.dtype, tuple(p.shape)) for name, p in model.parameters.items()]
    return found


def wanted_weights(model: Outline, averaged: bool = False) -> list[Wanted]:
    """The model's tensors, or their averages where there are such, in the order of `Outline.tensors`."""
    return [
        Wanted(weight_name(model, name, averaged), tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.tensors.items()
    ]


def weight_name(model: Outline, name: str, averaged: bool = False) -> str:
    """The logical tensor that holds one of the model's, or, if it has one and that is wanted, its average.

    Raises:
        ValueError: the run keeps no averages.
    """
    if averaged and not model.has_average:
        raise ValueError("the run keeps no average of its weights (ema.decay = 0): leave --ema out")
    return (_AVERAGE if averaged and name in model.parameters else _MODEL) + name


def weight_of(name: str) -> str | None:
    """The model's name of a logical tensor that is a weight or the average of one, None for others."""
    prefix, _, inner = name.partition(".")
    return inner if f"{prefix}." in (_MODEL, _AVERAGE) else None


def kept_as(kind: str, parameter: str) -> str:
    """The logical tensor in which the optimizer keeps something of a parameter."""
    return f"{_OPTIMIZER}{kind}.{parameter}"


def kept_of(name: str) -> tuple[str, str] | None:
    """The inverse: kind and parameter, None for a logical tensor of another kind."""
    kind, found, parameter = name.removeprefix(_OPTIMIZER).partition(".")
    return (kind, parameter) if found and name.startswith(_OPTIMIZER) else None


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
