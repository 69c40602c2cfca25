"""Promise: every matrix is orthogonalised once, by one rank, which gets every element of it from exactly one sender."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallelism.muon import FusedHeads, orthogonalise
from parallelism.muon_plan import ROUND_ELEMENTS, Box, plan_rounds, travels


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[Box]]]:
    """Parameters, each cut along up to two dims over members of a stage; some hold the same."""
    a, b, copies = (draw(st.integers(1, 3)) for _ in range(3))
    shapes, held = [], [[] for _ in range(a * b * copies)]
    for _ in range(draw(st.integers(1, 4))):
        dims = draw(st.sampled_from([2, 3]))
        shape = tuple(draw(st.integers(1, 7)) for _ in range(dims))
        cuts = draw(st.permutations(range(dims)))[:2]
        shapes.append(shape)
        for member, boxes in enumerate(held):
            offsets, sizes = [0] * dims, list(shape)
            for dim, parts, place in ((cuts[0], a, member % a), (cuts[1], b, member // a % b)):
                step = -(-shape[dim] // parts)
                offsets[dim] = min(place * step, shape[dim])
                sizes[dim] = min(step, shape[dim] - offsets[dim])
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return shapes, held


@given(layouts())
def test_each_matrix_is_gathered_whole_by_one_member(case: tuple[list[tuple[int, ...]], list[list[Box]]]) -> None:
    shapes, held = case
    rounds = plan_rounds(shapes, held)
    matrices = [matrix for each in rounds for matrix in each]
    wanted = {(p, e) for p, s in enumerate(shapes) for e in (range(s[0]) if len(s) == 3 else [None])}
    assert sorted(matrices, key=str) == sorted(set(matrices), key=str)
    assert {(matrix.parameter, matrix.expert) for matrix in matrices} == wanted
    for matrix in matrices:
        covered = torch.zeros(matrix.rows, matrix.columns)
        for piece, holders in matrix.pieces:
            covered[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns] += 1
            assert matrix.sender(holders) in holders
        assert covered.eq(1).all()
    for each in rounds:
        for owner in {matrix.owner for matrix in each}:
            sizes = [matrix.rows * matrix.columns for matrix in each if matrix.owner == owner]
            assert len(sizes) == 1 or sum(sizes) <= ROUND_ELEMENTS


def test_work_is_spread_and_what_is_whole_stays_where_it_is() -> None:
    """Eight matrices cut over four ranks: two each. Experts that ranks hold whole never travel."""
    cut = [[Box((2 * member, 0), (2, 8))] * 8 for member in range(4)]
    owners = [matrix.owner for each in plan_rounds([(8, 8)] * 8, cut) for matrix in each]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
    experts = [[Box((2 * member, 0, 0), (2, 8, 4))] for member in range(4)]
    rounds = plan_rounds([(8, 8, 4)], experts)
    assert all(matrix.owner == matrix.expert // 2 for each in rounds for matrix in each if matrix.expert is not None)
    assert not any(travels(each) for each in rounds)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    """As torch.optim.Muon's, which computes the same in bf16 on one matrix."""
    for rows, columns in ((24, 40), (40, 24)):
        matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
        found = orthogonalise(matrices, 5)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ found @ vh.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
        assert float((inner - torch.diag_embed(values)).abs().max()) < 1e-4
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        weight.grad = matrices[0]
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="original").step()
        expected = -(max(1.0, rows / columns) ** 0.5) * found[0]
        assert float((weight.detach() - expected).norm() / expected.norm()) < 0.02


def test_a_fused_projection_is_split_into_the_three_that_it_is() -> None:
    """Rows by key/value head: two query heads, a key, a value; and back again."""
    heads = FusedHeads(queries_per_key=2, head_dim=3)
    whole = torch.arange(2 * 4 * 3 * 5).float().view(1, 24, 5)
    query, key, value = heads.split(whole)
    assert [each.shape[-2] for each in (query, key, value)] == [12, 6, 6]
    assert torch.equal(query[0], torch.cat([whole[0, 0:6], whole[0, 12:18]]))
    assert torch.equal(key[0], torch.cat([whole[0, 6:9], whole[0, 18:21]]))
    assert torch.equal(value[0], torch.cat([whole[0, 9:12], whole[0, 21:24]]))
    assert torch.equal(heads.join([query, key, value]), whole)
