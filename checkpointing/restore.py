"""Reading a snapshot into live tensors: what is needed of which file, and the copying once the files are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from checkpointing.blocks import BlockDigests, Reader, VerifiedReader
from checkpointing.checksum import CHUNK_BYTES
from checkpointing.flatten import LocalTensor
from checkpointing.layout import Manifest, Shard, SnapshotDamagedError, step_dir_name
from checkpointing.reshard import NotCoveredError, Read, plan_reads


class DiskCandidate:
    """What this rank needs of one committed snapshot. Built by `plan_candidate`; the caller verifies the files."""

    def __init__(self, manifest: Manifest, reads: Sequence[Read], rank: int, world_size: int) -> None:
        self.manifest = manifest
        self._reads = reads
        self._own = rank if world_size == manifest.world_size else 0

    @property
    def files(self) -> list[int]:
        """Numbers of the shards that are read."""
        return sorted({read.shard for read in self._reads})

    @property
    def scalars(self) -> dict[str, Any]:
        """The caller's values: this rank's own if it was there, else rank 0's."""
        return decode_values(self.manifest.shards[self._own].scalars)

    def leaf(self, name: str) -> Any:
        """A plain value of the state: this rank's own if it was there, else the first rank's that has it."""
        shards = self.manifest.shards
        holders = (shard.leaves[name] for shard in (shards[self._own], *shards) if name in shard.leaves)
        return msgspec.json.decode(next(holders))

    def copy_into(
        self, tensors: Sequence[LocalTensor], paths: Mapping[int, Path], digests: Mapping[Path, BlockDigests]
    ) -> None:
        """Fill the live tensors from verified files, by their numbers. Beside them some rows of one file are in memory.

        OSError if a file is not what was verified any more, or its file system fails: the state is then worthless.
        """
        for index in self.files:
            with VerifiedReader(paths[index], digests[paths[index]]) as reader:
                for read in self._reads:
                    if read.shard == index:
                        copy_box(reader, self.manifest.shards[index], read, tensors[read.target])


def plan_candidate(
    manifest: Manifest, needed: Sequence[LocalTensor], leaf_names: frozenset[str], rank: int, world_size: int
) -> DiskCandidate:
    """Work out what to read of a snapshot. SnapshotDamagedError, in one line, if it lacks anything."""
    name = step_dir_name(manifest.step)
    parts = [local.part for local in needed]
    preferred = rank % manifest.world_size
    try:
        reads = plan_reads(parts, [shard.tensors for shard in manifest.shards], preferred)
    except NotCoveredError as error:
        raise SnapshotDamagedError(f"{name}: {error}") from error
    known = set().union(*(shard.leaves for shard in manifest.shards))
    if missing := sorted(leaf_names - known):
        raise SnapshotDamagedError(f"{name}: has no value for {missing[0]}")
    return DiskCandidate(manifest, reads, rank, world_size)


def decode_values(values: dict[str, msgspec.Raw]) -> dict[str, Any]:
    """JSON values by name, as Python values."""
    return {name: msgspec.json.decode(value) for name, value in values.items()}


def copy_box(reader: Reader, shard: Shard, read: Read, local: LocalTensor) -> None:
    """Read the rows of a stored slice that the box touches, some at a time, and put the box where it belongs."""
    part, box, target = read.part, read.box, local.tensor
    if not part.sizes:
        target.copy_(
            _read_rows(reader, shard.data_start_bytes + part.start_bytes, torch.empty_like(target, device="cpu"))
        )
        return
    row_bytes = (part.end_bytes - part.start_bytes) // part.sizes[0]
    first = box.offsets[0] - part.offsets[0]
    start = shard.data_start_bytes + part.start_bytes + first * row_bytes
    window = target
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        window = window.narrow(dim, offset - local.part.offsets[dim], size)
    whole_rows = box.sizes[1:] == part.sizes[1:]
    if whole_rows and window.is_contiguous() and window.device.type == "cpu":
        _read_rows(reader, start, window)
        return
    buffer = torch.empty((min(box.sizes[0], max(1, CHUNK_BYTES // row_bytes)), *part.sizes[1:]), dtype=target.dtype)
    for done in range(0, box.sizes[0], len(buffer)):
        rows = _read_rows(reader, start + done * row_bytes, buffer[: box.sizes[0] - done])
        for dim in range(1, len(box.sizes)):
            rows = rows.narrow(dim, box.offsets[dim] - part.offsets[dim], box.sizes[dim])
        window[done : done + len(rows)].copy_(rows)


def _read_rows(reader: Reader, start_bytes: int, into: torch.Tensor) -> torch.Tensor:
    reader.read_into(into.view(-1).view(torch.uint8).numpy().data, start_bytes)
    return into
