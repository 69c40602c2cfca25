"""Whole logical tensors out of a committed snapshot of the run directory, one at a time, every file verified first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing import disk
from checkpointing.blocks import PlainReader
from checkpointing.flatten import DTYPES, LocalTensor
from checkpointing.layout import Manifest, Shard, SnapshotDamagedError, TensorSlice, step_dir_name
from checkpointing.reshard import NotCoveredError, Read, plan_reads
from checkpointing.restore import copy_box, decode_values

Progress = Callable[[str, int, int], None]
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class SnapshotReader:
    """A snapshot whose files were verified when it was opened. Built by `open_snapshot`; a context manager.

    tensors: dtype and shape of what can be read, by name.
    """

    def __init__(self, folder: Path, manifest: Manifest, wanted: list[TensorSlice], reads: list[Read]) -> None:
        self.manifest = manifest
        self.tensors = {part.name: (_TORCH_DTYPES[part.dtype], part.global_shape) for part in wanted}
        self._wanted = {part.name: part for part in wanted}
        self._reads: dict[str, list[Read]] = {part.name: [] for part in wanted}
        for read in reads:
            self._reads[read.part.name].append(read)
        self._stack = ExitStack()
        self._files = {
            index: self._stack.enter_context((folder / manifest.shards[index].file).open("rb", buffering=0))
            for index in {read.shard for read in reads}
        }

    @property
    def scalars(self) -> dict[str, Any]:
        """The values that rank 0 kept beside its tensors."""
        return decode_values(self.manifest.shards[0].scalars)

    def read(self, name: str) -> Tensor:
        """One whole tensor, in memory of its own: nothing else of the snapshot is held.

        OSError if a file fails after all. Plain reads and no mapping: there, a failing medium ends the process.
        """
        dtype, shape = self.tensors[name]
        whole = LocalTensor(torch.empty(shape, dtype=dtype), self._wanted[name])
        for read in self._reads[name]:
            copy_box(PlainReader(self._files[read.shard].fileno()), self.manifest.shards[read.shard], read, whole)
        return whole.tensor

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()


def open_snapshot(run_dir: Path, step: int, names: Iterable[str], progress: Progress) -> SnapshotReader:
    """Read and verify every file of a snapshot that holds something of `names`; names no shard has are left out.

    Raises:
        SnapshotDamagedError: in one line that names the file, if it must not be used.
    """
    manifest = disk.read_manifest(run_dir, step)
    wanted = _wanted(manifest, frozenset(names))
    try:
        reads = plan_reads(wanted, [shard.tensors for shard in manifest.shards])
    except NotCoveredError as error:
        raise SnapshotDamagedError(f"{step_dir_name(step)}: {error}") from error
    files = [manifest.shards[index] for index in sorted({read.shard for read in reads})]
    _verify(run_dir, step, files, progress)
    return SnapshotReader(disk.step_dir(run_dir, step), manifest, wanted, reads)


def _wanted(manifest: Manifest, names: frozenset[str]) -> list[TensorSlice]:
    """Each tensor once and whole, its size as end_bytes - start_bytes."""
    found: dict[str, TensorSlice] = {}
    for part in (part for shard in manifest.shards for part in shard.tensors):
        if part.name not in names or part.name in found:
            continue
        sizes = part.global_shape
        size_bytes = _TORCH_DTYPES[part.dtype].itemsize * torch.Size(sizes).numel()
        found[part.name] = TensorSlice(part.name, part.dtype, sizes, (0,) * len(sizes), sizes, 0, size_bytes)
    return list(found.values())


def _verify(run_dir: Path, step: int, files: list[Shard], progress: Progress) -> None:
    total, done = sum(shard.size_bytes for shard in files), 0
    for shard in files:
        progress("verify", done, total)
        if problem := disk.shard_problem(run_dir, step, shard):
            raise SnapshotDamagedError(problem)
        done += shard.size_bytes
    progress("verify", done, total)
