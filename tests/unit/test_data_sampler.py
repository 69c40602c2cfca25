"""The order of samples: exactly once an epoch, the same for every layout, proportions kept at every moment."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.sampler import Blend, epoch_order, step_samples, windows_per_epoch

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def window_starts(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """For each position of the epoch the (document, offset) of each of its tokens."""
    order = epoch_order(lengths, seq_len, seed, 0, epoch)
    return [
        [(piece.document, piece.offset + i) for piece in order.pieces(position) for i in range(piece.length)]
        for position in range(len(order.windows))
    ]


@given(lengths=lengths_lists, seq_len=st.integers(1, 20), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_an_epoch_predicts_every_token_once(lengths: list[int], seq_len: int, seed: int, epoch: int) -> None:
    """Windows overlap in one token only: each token is a label at most once, and fewer than seq_len are left out."""
    sizes = np.array(lengths, dtype=np.int64)
    samples = window_starts(sizes, seq_len, seed, epoch)
    assert len(samples) == windows_per_epoch(sum(lengths), seq_len)
    assert all(len(sample) == seq_len + 1 for sample in samples)
    labels = [token for sample in samples for token in sample[1:]]
    assert len(set(labels)) == len(labels)
    assert sum(lengths) - 1 - len(labels) < seq_len
    assert all(0 <= offset < lengths[document] for document, offset in labels)


@given(lengths=lengths_lists, seq_len=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_windows_are_contiguous_text(lengths: list[int], seq_len: int, seed: int) -> None:
    """Within a sample a document goes on where it was, or ends and the next one starts at its beginning."""
    for sample in window_starts(np.array(lengths, dtype=np.int64), seq_len, seed, 0):
        for (document, offset), (next_document, next_offset) in pairwise(sample):
            if next_document == document:
                assert next_offset == offset + 1
            else:
                assert (offset + 1, next_offset) == (lengths[document], 0)


def test_empty_documents_are_stepped_over() -> None:
    """A document without tokens, wherever the shuffle puts it, breaks no sample."""
    sizes = np.array([0, 5, 0, 0, 7, 0], dtype=np.int64)
    for epoch in range(20):
        for sample in window_starts(sizes, 3, 1, epoch):
            assert len(sample) == 4


def test_epochs_seeds_and_sets_shuffle_differently() -> None:
    """No order is used twice: epochs, seeds and sets each have their own."""
    sizes = np.full(100, 10, dtype=np.int64)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]
    orders = {epoch_order(sizes, 9, *key).documents.tobytes() for key in keys}
    orders |= {epoch_order(sizes, 9, *key).windows.tobytes() for key in keys}
    assert len(orders) == 2 * len(keys)


def test_the_order_never_changes() -> None:
    """Golden order: a run resumed by another version of this project or of numpy reads on where it stopped."""
    order = epoch_order(np.array([3, 9, 4, 1, 5, 8], dtype=np.int64), 4, 1234, 1, 7)
    assert order.documents.tolist() == [1, 5, 3, 4, 2, 0]
    assert order.windows.tolist() == [3, 4, 2, 0, 6, 1, 5]


@given(
    local=st.integers(1, 6),
    dp_degree=st.sampled_from([1, 2, 3, 4, 8]),
    first=st.integers(1, 50),
    steps=st.integers(1, 9),
)
def test_layouts_read_the_same_samples_in_the_same_order(local: int, dp_degree: int, first: int, steps: int) -> None:
    """Ranks side by side read what one rank alone reads, and steps follow each other without gap or overlap."""
    global_batch = local * dp_degree
    together = [
        sample
        for step in range(first, first + steps)
        for dp_rank in range(dp_degree)
        for sample in step_samples(step, global_batch, dp_rank, dp_degree)
    ]
    alone = [sample for step in range(first, first + steps) for sample in step_samples(step, global_batch, 0, 1)]
    assert together == alone == list(range((first - 1) * global_batch, (first - 1 + steps) * global_batch))


weights_lists = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(weights=weights_lists, period=st.sampled_from([12, 97, 1000]), cycles=st.integers(1, 3))
def test_blend_keeps_every_prefix_within_one_sample(weights: list[float], period: int, cycles: int) -> None:
    """At no time is a set a whole sample ahead of or behind its share, over any number of cycles."""
    blend = Blend(weights, period)
    drawn = np.array([blend.locate(n).set_index for n in range(blend.period * cycles)])
    for set_index, count in enumerate(blend.counts):
        so_far = np.cumsum(drawn == set_index)
        share = np.arange(1, len(drawn) + 1) * count
        assert (np.abs(so_far * blend.period - share) < blend.period).all()
        assert so_far[-1] == count * cycles


@settings(max_examples=50, deadline=None)
@given(weights=weights_lists)
def test_blend_numbers_each_sets_samples_without_gaps(weights: list[float]) -> None:
    """A set's samples are 0, 1, 2, ... in the order of the blend: none skipped, none twice."""
    blend = Blend(weights, 100)
    seen = [0] * len(weights)
    for n in range(2 * blend.period + 7):
        draw = blend.locate(n)
        assert draw.number == seen[draw.set_index]
        seen[draw.set_index] += 1


@given(weights=weights_lists)
@settings(max_examples=50, deadline=None)
def test_blend_weights_are_exact_to_the_period(weights: list[float]) -> None:
    """Each set's part is its weight's, but for one draw in the period and the one draw that tiny sets are given."""
    blend = Blend(weights, 10_000)
    for weight, count in zip(weights, blend.counts, strict=True):
        share = count / blend.period
        assert abs(share - weight / sum(weights)) <= (1 + len(weights)) / 10_000
        assert count >= 1


def test_equal_weights_alternate() -> None:
    """The pattern of simple proportions is short: 1:1 alternates, 3:1 draws the second once in four."""
    assert [Blend([1, 1]).locate(n).set_index for n in range(4)] in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert Blend([3, 1]).period == 4


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_bad_weights_are_named(weights: list[float]) -> None:
    """A blend that cannot be mixed is refused in words."""
    with pytest.raises(ValueError, match="weights must be positive"):
        Blend(weights)
