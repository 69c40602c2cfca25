"""Two snapshots, tensor by tensor, whatever their layouts: read piece by piece, so that memory is bounded."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from checkpointing import disk
from checkpointing.blocks import PlainReader
from checkpointing.flatten import DTYPES, LocalTensor
from checkpointing.layout import Manifest, SnapshotDamagedError, TensorSlice, step_dir_name
from checkpointing.repair import Progress
from checkpointing.reshard import NotCoveredError, plan_reads
from checkpointing.restore import copy_box

PIECE_BYTES = 64 * 2**20
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Finding(enum.StrEnum):
    """What a comparison of one tensor found."""

    EQUAL = "equal"
    DIFFER = "differ"
    OTHER_KIND = "other dtype or shape"
    ONLY_A = "only in the first"
    ONLY_B = "only in the second"


class TensorDiff(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor. differing: elements whose bits differ; max_abs: the largest difference, None if it has no size."""

    name: str
    finding: Finding
    differing: int = 0
    elements: int = 0
    max_abs: float | None = None


class _Side:
    """One snapshot, its files verified and open."""

    def __init__(self, run_dir: Path, step: int, progress: Progress, stack: ExitStack) -> None:
        self.manifest: Manifest = disk.read_manifest(run_dir, step)
        self.parts: dict[str, list[list[TensorSlice]]] = {}
        folder = disk.step_dir(run_dir, step)
        self._fds = []
        for number, shard in enumerate(self.manifest.shards):
            progress.expect(shard.size_bytes)
            if problem := disk.file_problem(folder / shard.file, shard, progress.add):
                raise SnapshotDamagedError(problem)
            self._fds.append(os.open(folder / shard.file, os.O_RDONLY))
            stack.callback(os.close, self._fds[-1])
            for part in shard.tensors:
                self.parts.setdefault(part.name, [[] for _ in self.manifest.shards])[number].append(part)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of a tensor."""
        part = next(part for parts in self.parts[name] for part in parts)
        return part.dtype, part.global_shape

    def read(self, piece: TensorSlice) -> Tensor:
        """A box of a logical tensor."""
        local = LocalTensor(torch.empty(piece.sizes, dtype=_TORCH_DTYPES[piece.dtype]), piece)
        try:
            reads = plan_reads([piece], self.parts[piece.name])
        except NotCoveredError as error:
            raise SnapshotDamagedError(f"{step_dir_name(self.manifest.step)}: {error}") from error
        for read in reads:
            copy_box(PlainReader(self._fds[read.shard]), self.manifest.shards[read.shard], read, local)
        return local.tensor


def compare_snapshots(
    a: tuple[Path, int], b: tuple[Path, int], progress: Callable[[int, int], None], piece_bytes: int = PIECE_BYTES
) -> Iterator[TensorDiff]:
    """Every tensor of two snapshots (run directory, step), by name. progress: bytes verified.

    Memory: a piece of each side (piece_bytes, or one row where that is more) and what comparing them takes.

    Raises:
        SnapshotDamagedError: if one of them must not be used. OSError if a verified file fails after all.
    """
    with ExitStack() as stack:
        count = Progress(progress)
        first, second = _Side(*a, count, stack), _Side(*b, count, stack)
        for name in sorted(first.parts.keys() | second.parts.keys()):
            if name not in second.parts:
                yield TensorDiff(name=name, finding=Finding.ONLY_A)
            elif name not in first.parts:
                yield TensorDiff(name=name, finding=Finding.ONLY_B)
            elif first.kind(name) != second.kind(name):
                yield TensorDiff(name=name, finding=Finding.OTHER_KIND)
            else:
                yield _compare(name, first, second, piece_bytes)


def _compare(name: str, first: _Side, second: _Side, piece_bytes: int) -> TensorDiff:
    dtype, shape = first.kind(name)
    differing, max_abs = 0, None
    for piece in pieces(name, dtype, shape, piece_bytes):
        a, b = first.read(piece), second.read(piece)
        unequal = _unequal(a, b)
        if count := int(unequal.sum()):
            differing += count
            if a.dtype is not torch.bool:
                gap = float((a[unequal].double() - b[unequal].double()).abs().max())
                max_abs = gap if max_abs is None or gap > max_abs or math.isnan(gap) else max_abs
    return TensorDiff(
        name=name,
        finding=Finding.DIFFER if differing else Finding.EQUAL,
        differing=differing,
        elements=math.prod(shape),
        max_abs=max_abs,
    )


def pieces(name: str, dtype: str, shape: Sequence[int], piece_bytes: int) -> Iterator[TensorSlice]:
    """Cut a tensor into boxes of whole rows, of at most piece_bytes unless a single row has more."""
    itemsize = _TORCH_DTYPES[dtype].itemsize
    whole = tuple(shape)
    if not whole:
        yield TensorSlice(name, dtype, (), (), (), 0, itemsize)
        return
    row_bytes = itemsize * math.prod(whole[1:])
    rows = max(1, piece_bytes // max(row_bytes, 1))
    for first in range(0, whole[0], rows):
        count = min(rows, whole[0] - first)
        offsets, sizes = (first, *(0,) * (len(whole) - 1)), (count, *whole[1:])
        yield TensorSlice(name, dtype, whole, offsets, sizes, 0, count * row_bytes)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where the bits differ: two NaNs of the same bits are equal, 0.0 and -0.0 are not."""
    if not a.numel():
        return torch.zeros(a.shape, dtype=torch.bool)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return a.view(bits) != b.view(bits)
