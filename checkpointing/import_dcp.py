"""A checkpoint folder of torch.distributed.checkpoint, ours or torchtitan's, as the snapshot a new run begins from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpointing.contents import COUNTER, SCALES, fresh_tensors, kept_of, wanted_tensors, weight_of
from checkpointing.dcp_metadata import SafeReader
from checkpointing.export_dcp import AVERAGE_KEY, STEP_KEY, TOKENS_KEY
from checkpointing.imported import SHARD_BYTES, check_unused, write_snapshot
from checkpointing.reshard import Box, intersect, subtract
from configs.schema import JobConfig
from parallelism.outline import Outline, outline

Progress = Callable[[str, int, int], None]


def import_dcp(
    source: Path, config: JobConfig, run_dir: Path, progress: Progress, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Commit what `source` holds as the first snapshot of a run without snapshots.

    Keys are those of torchtitan's own checkpoints; moments that it does not have are zero, and expert biases too.
    Nothing in the folder is executed. Memory: one logical tensor and what it is made of. progress: `write` and bytes.
    Returns the step: that of the checkpoint if `export_dcp` wrote it, else 0.

    Raises:
        ValueError: source is damaged, asks for code to be run, or is of another model; the run has snapshots; no room.
    """
    check_unused(run_dir)
    model = outline(config)
    checkpoint = _Checkpoint(source)
    wanted = wanted_tensors(model) + fresh_tensors(model)
    missing = [key for name in model.parameters for key in model.needed(name) if key not in checkpoint.tensors]
    if missing:
        raise ValueError(f"{source} has no {missing[0]} ({len(missing)} of the model's tensors are missing)")
    step, tokens_seen = checkpoint.count(STEP_KEY), checkpoint.count(TOKENS_KEY)

    def value(name: str) -> Tensor | None:
        return _value(model, checkpoint, name)

    write_snapshot(run_dir, step, wanted, value, {"tokens_seen": tokens_seen}, progress, shard_bytes)
    return step


def _value(model: Outline, checkpoint: _Checkpoint, name: str) -> Tensor | None:
    """A logical tensor, None if the checkpoint need not and does not have it."""
    if name == SCALES:
        return None
    if name == COUNTER:
        counters = (key for key in checkpoint.tensors if key.startswith("optimizer.state.") and key.endswith(".step"))
        first = next(counters, None)
        return None if first is None else checkpoint.read(first, ())
    if kept := kept_of(name):
        kind, parameter = kept
        key = f"optimizer.state.{parameter}.{kind}"
        return checkpoint.read(key, model.tensors[parameter].shape) if key in checkpoint.tensors else None
    inner = weight_of(name)
    assert inner is not None
    parts = model.needed(inner)
    # An average that the checkpoint does not have begins with the weights.
    prefixes = (AVERAGE_KEY, "") if name.startswith(AVERAGE_KEY) else ("",)
    for prefix in prefixes:
        if all(prefix + key in checkpoint.tensors for key in parts):
            return model.join(inner, {key: checkpoint.read(prefix + key, part.shape) for key, part in parts.items()})
    return None


class _Checkpoint:
    """The tensors of a folder, read one at a time by torch's own loader."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._reader = SafeReader(source)
        entries = self._reader.metadata.state_dict_metadata
        self.tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def count(self, name: str) -> int:
        """A whole number that `export_dcp` left, 0 if there is none."""
        value = int(self.read(name, ())) if name in self.tensors else 0
        if value < 0:
            raise ValueError(f"{self._source}: {name} is {value}")
        return value

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, of this shape. ValueError if it is another or cannot be read."""
        entry = self.tensors[name]
        if tuple(entry.size) != tuple(shape):
            raise ValueError(f"{name} has shape {list(entry.size)} in {self._source}, {list(shape)} in this job")
        if not _is_covered(entry):
            raise ValueError(f"{self._source}: .metadata does not say where all of {name} is")
        tensor = torch.empty(shape, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            cause = next((cause for cause, _ in error.failures.values()), error)
            raise ValueError(f"{self._source}: {name} cannot be read: {cause}") from error
        return tensor


def _is_covered(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks fill the tensor: torch's loader leaves what they do not as it was."""
    left = [Box((0,) * len(entry.size), tuple(entry.size))]
    for chunk in entry.chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if len(box.offsets) != len(entry.size) or len(box.sizes) != len(entry.size):
            return False
        rest = []
        for piece in left:
            common = intersect(piece, box)
            rest += [piece] if common is None else subtract(piece, common)
        left = rest
    return not any(piece.elements for piece in left)
