"""Promise: what is left out is never read, all else is read once and in order, and given-up snapshots stay refused."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trainer.history import Refused, batch_of, batches_of, passed_over, union

RANGES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), max_size=6)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {first + i for first, count in ranges for i in range(count)}


@given(RANGES, RANGES)
def test_a_union_holds_what_any_holds(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    """In order, apart from each other, and the same whichever came first."""
    joined = union(left, right)
    assert members(list(joined)) == members(left) | members(right)
    assert joined == union(right, left) == union(joined)
    assert all(first + count < later for (first, count), (later, _) in itertools.pairwise(joined))


@given(RANGES)
def test_steps_read_what_remains_in_order(ranges: list[tuple[int, int]]) -> None:
    """Step s reads the s-th batch that is not left out; what lies between two steps was passed over, once."""
    left_out = union(ranges)
    remaining = [batch for batch in range(1, 200) if batch not in members(ranges)]
    assert [batch_of(step, left_out) for step in range(1, 100)] == remaining[:99]
    passed = [each for step in range(1, 101) for each in passed_over(step, left_out)]
    assert passed == list(left_out)


@given(RANGES, st.integers(1, 50), st.integers(0, 10))
def test_leaving_steps_out_moves_the_next_ones_up(ranges: list[tuple[int, int]], first: int, more: int) -> None:
    """After the batches of some steps are left out, the first of them reads what came after the last."""
    left_out = union(ranges)
    now = union(left_out, batches_of(first, first + more, left_out))
    assert batch_of(first, now) == batch_of(first + more + 1, left_out)
    assert [batch_of(step, now) for step in range(1, first)] == [batch_of(step, left_out) for step in range(1, first)]


def test_a_history_that_was_given_up_stays_so() -> None:
    """Nothing that this or an earlier generation made after the step, all that a later one makes."""
    refused = Refused(ages=((2, 5),), abandoned=((3, 7),))
    assert (2, 5) in refused
    assert (3, 8) in refused
    assert (1, 9) in refused
    assert (3, 7) not in refused
    assert (4, 8) not in refused
    assert "words" not in refused
