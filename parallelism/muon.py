"""Muon on a sharded model: momentum on local shards, each whole matrix orthogonalised by one rank of its stage.

The update is that of torch.optim.Muon, which knows one device only. Matrices of experts are taken one by one, and a
fused query-key-value projection as the three matrices that it is, so that no layout and no fusing changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import OptimizerConfig
from parallelism.exchange import gather_ints
from parallelism.muon_plan import Box, Matrix, Piece, Round, plan_rounds, travels

# Of the quintic whose iteration drives singular values towards 1; as in torch.optim.Muon.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_Key = tuple[int, int | None]


@dataclass(frozen=True)
class FusedHeads:
    """How rows of a fused projection are ordered: for each key/value head its query heads, its key, its value."""

    queries_per_key: int
    head_dim: int

    def split(self, whole: Tensor) -> list[Tensor]:
        """Query, key and value projection of [..., rows, columns]."""
        grouped = whole.unflatten(-2, (-1, self.queries_per_key + 2, self.head_dim))
        parts = grouped.split([self.queries_per_key, 1, 1], dim=-3)
        return [part.flatten(-4, -2) for part in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        sizes = (self.queries_per_key, 1, 1)
        grouped = [part.unflatten(-2, (-1, size, self.head_dim)) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(grouped, dim=-3).flatten(-4, -2)


@dataclass(frozen=True)
class MuonSlot:
    """One parameter: its local shard and that of its momentum. decay: weight decay. fused: None for one matrix."""

    parameter: nn.Parameter
    local: Tensor
    momentum: Tensor
    decay: float
    fused: FusedHeads | None


class Muon:
    """Updates this rank's shards of matrices. All ranks of a stage call `step` together.

    stage: the ranks that the parameters are spread over, by number in the world. group: theirs; None for the world.
    dtype: what is orthogonalised in, and sent.
    """

    def __init__(
        self, config: OptimizerConfig, slots: Sequence[MuonSlot], stage: Sequence[int],
        group: dist.ProcessGroup | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Collective over the world: ranks tell each other what they hold."""
        self._config = config
        self._slots = slots
        self._group = group
        self._dtype = dtype
        self._me = stage.index(dist.get_rank())
        self._members = range(len(stage))
        boxes = [_box(slot.parameter) for slot in slots]
        rows = gather_ints([number for box in boxes for number in (*box.offsets, *box.sizes)])
        shapes = [tuple(slot.parameter.shape) for slot in slots]
        self._held = [list(_boxes(rows[rank], shapes)) for rank in stage]
        self._rounds = plan_rounds(shapes, self._held)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate lr. Collective over the stage."""
        if not self._rounds:
            return
        rate = lr * self._config.muon_lr_ratio
        wanted = self._momentum_step()
        for slot in self._slots:
            if slot.decay:
                slot.local.mul_(1.0 - rate * slot.decay)
        gathering = self._gather(self._rounds[0], wanted)
        for matrices, following in zip(self._rounds, [*self._rounds[1:], ()], strict=True):
            wholes = self._assemble(matrices, gathering.result())
            # The next matrices travel while these are computed.
            gathering = self._gather(following, wanted)
            self._apply(matrices, self._scatter(matrices, self._orthogonal(wholes)).result(), rate)

    def _momentum_step(self) -> list[Tensor]:
        """Move the momenta; returns what is to be orthogonalised, by slot."""
        wanted = []
        for slot in self._slots:
            gradient = slot.parameter.grad
            local = torch.zeros_like(slot.local) if gradient is None else _local(gradient)
            slot.momentum.lerp_(local, 1.0 - self._config.muon_momentum)
            nesterov = self._config.muon_nesterov
            wanted.append(local.lerp(slot.momentum, self._config.muon_momentum) if nesterov else slot.momentum)
        return wanted

    # Moving -------------------------------------------------------------------------------------------------------

    def _gather(self, matrices: Round, wanted: Sequence[Tensor]) -> _Exchange:
        """Begin to bring the pieces of each matrix to its owner."""
        out: list[list[Tensor]] = [[] for _ in self._members]
        due = [0 for _ in self._members]
        for matrix in matrices:
            for piece, holders in matrix.pieces:
                sender = matrix.sender(holders)
                if sender == self._me:
                    out[matrix.owner].append(self._part(matrix, wanted[matrix.parameter]).to(self._dtype))
                if matrix.owner == self._me:
                    due[sender] += piece.elements
        return self._exchange(out, due, travels(matrices))

    def _assemble(self, matrices: Round, arrived: Sequence[Tensor]) -> list[tuple[Matrix, Tensor]]:
        """The whole matrices that this rank owns."""
        cursors = [_Cursor(flat) for flat in arrived]
        wholes = []
        for matrix in (matrix for matrix in matrices if matrix.owner == self._me):
            whole = arrived[0].new_empty(matrix.rows, matrix.columns)
            for piece, holders in matrix.pieces:
                _within(whole, piece).copy_(cursors[matrix.sender(holders)].take(piece))
            wholes.append((matrix, whole))
        return wholes

    def _scatter(self, matrices: Round, updates: Mapping[_Key, Tensor]) -> _Exchange:
        """Begin to bring each piece of the updates to all who hold it."""
        out: list[list[Tensor]] = [[] for _ in self._members]
        due = [0 for _ in self._members]
        for matrix in matrices:
            for piece, holders in matrix.pieces:
                for holder in holders:
                    if matrix.owner == self._me:
                        out[holder].append(_within(updates[_key(matrix)], piece))
                    if holder == self._me:
                        due[matrix.owner] += piece.elements
        return self._exchange(out, due, travels(matrices))

    def _apply(self, matrices: Round, arrived: Sequence[Tensor], rate: float) -> None:
        cursors = [_Cursor(flat) for flat in arrived]
        for matrix in matrices:
            for piece, holders in matrix.pieces:
                if self._me in holders:
                    update = cursors[matrix.owner].take(piece)
                    self._part(matrix, self._slots[matrix.parameter].local).add_(update, alpha=-rate)

    def _exchange(self, out: Sequence[Sequence[Tensor]], due: Sequence[int], travels: bool) -> _Exchange:
        sent = [sum(part.numel() for part in parts) for parts in out]
        flat = [part.reshape(-1) for parts in out for part in parts]
        device = self._slots[0].local.device
        outbox = torch.cat(flat) if flat else torch.empty(0, dtype=self._dtype, device=device)
        if not travels:
            return _Exchange(outbox, due, None)
        inbox = torch.empty(sum(due), dtype=self._dtype, device=device)
        work = dist.all_to_all_single(inbox, outbox, list(due), sent, group=self._group, async_op=True)
        assert work is not None
        return _Exchange(inbox, due, work, outbox)

    def _part(self, matrix: Matrix, local: Tensor) -> Tensor:
        """What this rank has of a matrix, in a tensor laid out like the parameter's local shard."""
        if matrix.expert is None:
            return local
        return local[matrix.expert - self._held[self._me][matrix.parameter].offsets[0]]

    # Computing ----------------------------------------------------------------------------------------------------

    def _orthogonal(self, wholes: Sequence[tuple[Matrix, Tensor]]) -> dict[_Key, Tensor]:
        """The update of each matrix, scaled; those of one parameter's experts in one batch."""
        updates: dict[_Key, Tensor] = {}
        for batch in _alike(wholes):
            fused = self._slots[batch[0][0].parameter].fused
            stacked = torch.stack([whole for _, whole in batch])
            parts = fused.split(stacked) if fused else [stacked]
            done = [orthogonalise(part, self._config.muon_iterations) * self._scale(part) for part in parts]
            joined = fused.join(done) if fused else done[0]
            updates |= {_key(matrix): update for (matrix, _), update in zip(batch, joined, strict=True)}
        return updates

    def _scale(self, matrix: Tensor) -> float:
        rows, columns = matrix.shape[-2:]
        if self._config.muon_scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))


class _Exchange:
    """Pieces on their way: what arrives from each member, when it has."""

    def __init__(self, flat: Tensor, due: Sequence[int], work: dist.Work | None, kept: Tensor | None = None) -> None:
        """kept: what is being sent, which must live as long."""
        self._flat, self._due, self._work, self._kept = flat, due, work, kept

    def result(self) -> list[Tensor]:
        """Wait; returns one flat tensor for each member."""
        if self._work is not None:
            self._work.wait()
            self._work = self._kept = None
        return list(self._flat.split(list(self._due)))


class _Cursor:
    """Reads pieces from a flat tensor, one behind the other."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat
        self._at = 0

    def take(self, piece: Piece) -> Tensor:
        """The next one."""
        found = self._flat[self._at : self._at + piece.elements].view(piece.rows, piece.columns)
        self._at += piece.elements
        return found


def orthogonalise(matrices: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz on [n, rows, columns]: the same singular vectors, all singular values about 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(iterations):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def _alike(wholes: Sequence[tuple[Matrix, Tensor]]) -> Iterator[list[tuple[Matrix, Tensor]]]:
    batch: list[tuple[Matrix, Tensor]] = []
    for each in wholes:
        if batch and (each[0].expert is None or each[0].parameter != batch[0][0].parameter):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _key(matrix: Matrix) -> _Key:
    return matrix.parameter, matrix.expert


def _within(whole: Tensor, piece: Piece) -> Tensor:
    return whole[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _box(parameter: nn.Parameter) -> Box:
    if not isinstance(parameter, DTensor):
        return Box((0,) * parameter.ndim, tuple(parameter.shape))
    (chunk,) = parameter.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _boxes(numbers: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Iterator[Box]:
    at = 0
    for shape in shapes:
        dims = len(shape)
        yield Box(tuple(numbers[at : at + dims]), tuple(numbers[at + dims : at + 2 * dims]))
        at += 2 * dims
