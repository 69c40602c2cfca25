"""Who orthogonalises which matrix: pure arithmetic, the same answer on every rank of a pipeline stage.

A rank holds a box of each parameter, whatever the layout cut it by. A matrix whose rank holds it whole is done there;
any other goes, box by box, to one rank, so that the work is spread and no rank needs more than a few whole matrices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The most that one rank gathers at a time, unless a single matrix has more.
ROUND_ELEMENTS = 1 << 24


class Box(NamedTuple):
    """A rank's part of a parameter, in global coordinates."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Piece(NamedTuple):
    """A part of a matrix: where it begins, and how much it is."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Of the piece."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Matrix:
    """One matrix. parameter: whose it is; expert: which of its matrices, None if it has one only.

    pieces: the different pieces there are, and which members of the stage hold each. owner: who orthogonalises it.
    """

    parameter: int
    expert: int | None
    rows: int
    columns: int
    pieces: tuple[tuple[Piece, tuple[int, ...]], ...]
    owner: int

    def sender(self, holders: Sequence[int]) -> int:
        """Of all who hold a piece, the one that sends it: the owner to itself, otherwise each has its share of work."""
        return self.owner if self.owner in holders else holders[self.owner % len(holders)]


Round = tuple[Matrix, ...]


def plan_rounds(shapes: Sequence[tuple[int, ...]], held: Sequence[Sequence[Box]]) -> list[Round]:
    """What is orthogonalised together, largest first; every matrix in exactly one round.

    Args:
        shapes: of each parameter, a matrix or a stack of one for each expert.
        held: by member of the stage, its box of each parameter.
    """
    loads = [0] * len(held)
    queues: list[deque[Matrix]] = [deque() for _ in held]
    for parameter, expert in sorted(_units(shapes), key=lambda unit: -_work(shapes[unit[0]])):
        rows, columns = shapes[parameter][-2:]
        pieces = _pieces(parameter, expert, held)
        whole = [member for piece, holders in pieces if piece.elements == rows * columns for member in holders]
        owner = min(whole or range(len(held)), key=lambda member: (loads[member], member))
        loads[owner] += _work(shapes[parameter])
        queues[owner].append(Matrix(parameter, expert, rows, columns, pieces, owner))
    rounds = []
    while any(queues):
        rounds.append(tuple(matrix for queue in queues for matrix in _next(queue)))
    return rounds


def travels(matrices: Round) -> bool:
    """Whether any piece of a round is needed by another member than the one that has it."""
    return any(holders != (matrix.owner,) for matrix in matrices for _, holders in matrix.pieces)


def _units(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int | None]]:
    found: list[tuple[int, int | None]] = []
    for parameter, shape in enumerate(shapes):
        found += [(parameter, None)] if len(shape) == 2 else [(parameter, expert) for expert in range(shape[0])]
    return found


def _work(shape: tuple[int, ...]) -> int:
    """What the products of a Newton-Schulz step cost, up to a factor."""
    rows, columns = shape[-2:]
    return rows * columns * min(rows, columns)


def _pieces(
    parameter: int, expert: int | None, held: Sequence[Sequence[Box]]
) -> tuple[tuple[Piece, tuple[int, ...]], ...]:
    found: dict[Piece, list[int]] = {}
    for member, boxes in enumerate(held):
        offsets, sizes = boxes[parameter]
        has_it = expert is None or offsets[0] <= expert < offsets[0] + sizes[0]
        piece = Piece(*offsets[-2:], *sizes[-2:])
        if has_it and piece.elements:
            found.setdefault(piece, []).append(member)
    return tuple((piece, tuple(found[piece])) for piece in sorted(found))


def _next(queue: deque[Matrix]) -> list[Matrix]:
    taken: list[Matrix] = []
    elements = 0
    while queue and (not taken or elements + queue[0].rows * queue[0].columns <= ROUND_ELEMENTS):
        taken.append(queue.popleft())
        elements += taken[-1].rows * taken[-1].columns
    return taken
