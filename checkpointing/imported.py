"""Writes a snapshot that no rank staged: tensors from elsewhere, in files of bounded size, the manifest last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from checkpointing import disk
from checkpointing.contents import Wanted
from checkpointing.disk import write_atomic
from checkpointing.flatten import DTYPES
from checkpointing.layout import (
    MANIFEST_NAME,
    VERSION,
    Json,
    Manifest,
    ShardMeta,
    TensorSlice,
    encode_document,
    shard_file_name,
    sidecar_name,
)
from checkpointing.shardfile import ShardPlan, SnapshotMeta, parse_header, plan_shard
from checkpointing.staged import StreamedFile, staged_folder

SHARD_BYTES = 4 * 2**30
MESH = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1}
_GENERATION = 0
_RESERVE_BYTES = 16 * 1024
Progress = Callable[[str, int, int], None]


def check_unused(run_dir: Path) -> None:
    """ValueError if the run has snapshots: an import would hide them, or be hidden."""
    if steps := disk.all_steps(run_dir):
        raise ValueError(
            f"{disk.step_dir(run_dir, steps[0])} exists: the run has snapshots already; import into a new run"
        )


def write_snapshot(
    run_dir: Path, step: int, tensors: Sequence[Wanted], value: Callable[[str], Tensor | None],
    scalars: Mapping[str, Json], progress: Progress, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Commit a snapshot of generation 0 that any layout loads. Nothing is left of one that fails.

    value: a whole tensor by name, asked for once each, in order; None for zeros, which are written as a hole. Memory:
    one such tensor. progress: `write` and bytes. shard_bytes: the most that one file holds, unless a tensor is larger.

    Raises:
        ValueError: the run has snapshots; no room; or what `value` raises.
    """
    check_unused(run_dir)
    groups = _divide(tensors, shard_bytes)
    snapshot = SnapshotMeta(
        step=step,
        generation=_GENERATION,
        scalars={name: msgspec.Raw(msgspec.json.encode(scalar)) for name, scalar in scalars.items()},
        leaves={},
    )
    total, done = sum(tensor.size_bytes for tensor in tensors), 0
    metas = []
    with staged_folder(disk.step_dir(run_dir, step)) as folder:
        for rank, group in enumerate(groups):
            plan = plan_shard([_slice(tensor) for tensor in group], rank, len(groups), MESH, _RESERVE_BYTES)
            with StreamedFile(folder / shard_file_name(_GENERATION, rank)) as stream:
                stream.write(plan.header(snapshot))
                for tensor in group:
                    progress("write", done, total)
                    _write(stream, tensor, value(tensor.name))
                    done += tensor.size_bytes
                metas.append(_describe(plan, snapshot, stream, rank))
            write_atomic(folder / sidecar_name(_GENERATION, rank), encode_document(metas[-1]))
        write_atomic(folder / MANIFEST_NAME, encode_document(_manifest(step, metas)))
    progress("write", done, total)


def _divide(tensors: Sequence[Wanted], shard_bytes: int) -> list[list[Wanted]]:
    groups: list[list[Wanted]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if groups[-1] and size_bytes + tensor.size_bytes > shard_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.size_bytes
    # Larger elements first, so that every tensor starts on a multiple of its element's size.
    return [sorted(group, key=lambda tensor: -tensor.dtype.itemsize) for group in groups]


def _slice(tensor: Wanted) -> TensorSlice:
    offsets = (0,) * len(tensor.shape)
    return TensorSlice(
        tensor.name, DTYPES[tensor.dtype], tensor.shape, offsets, tensor.shape, 0, tensor.size_bytes
    )  # fmt: skip


def _write(stream: StreamedFile, tensor: Wanted, value: Tensor | None) -> None:
    if value is None:
        stream.write_zeros(tensor.size_bytes)
        return
    if tuple(value.shape) != tensor.shape:
        raise ValueError(
            f"{tensor.name} has shape {list(value.shape)} in the source, {list(tensor.shape)} in this job's model; "
            "set [model] to the model that the source is of"
        )
    stream.write_tensor(value.to(tensor.dtype))


def _describe(plan: ShardPlan, snapshot: SnapshotMeta, stream: StreamedFile, rank: int) -> ShardMeta:
    assert stream.size_bytes == plan.size_bytes
    name = shard_file_name(_GENERATION, rank)
    return parse_header(plan.header(snapshot), plan.size_bytes, stream.checksum(), name)


def _manifest(step: int, metas: list[ShardMeta]) -> Manifest:
    return Manifest(
        version=VERSION,
        step=step,
        generation=_GENERATION,
        world_size=len(metas),
        mesh=MESH,
        t_wall_s=time.time(),
        shards=tuple(meta.shard for meta in metas),
    )
