"""What is kept: the newest, every n-th, and the best by validation loss."""

from __future__ import annotations

import math
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.keep import VALIDATION_LOSS, KeptInfo, kept_info, kept_steps
from checkpointing.layout import Manifest, Shard

LOSSES = st.none() | st.sampled_from([1.0, 2.0, 3.0]) | st.floats()
SNAPSHOTS = st.lists(
    st.builds(KeptInfo, step=st.integers(1, 200), generation=st.integers(1, 4), validation_loss=LOSSES),
    unique_by=lambda info: info.step,
    max_size=12,
)
LAST = st.integers(1, 5)
EVERY = st.integers(0, 30)
BEST = st.integers(0, 6)


def measured(snapshots: list[KeptInfo]) -> list[KeptInfo]:
    return [info for info in snapshots if info.validation_loss is not None and math.isfinite(info.validation_loss)]


@given(SNAPSHOTS, LAST, EVERY, BEST)
def test_the_newest_always_stay(snapshots: list[KeptInfo], last: int, every: int, best: int) -> None:
    """The keep_last newest stay whatever else does: nothing that stays is older than a newest one that goes."""
    kept = kept_steps(snapshots, last, every, best)
    newest = sorted(snapshots, key=lambda info: (info.generation, info.step))[-last:]
    assert {info.step for info in newest} <= kept
    assert kept <= {info.step for info in snapshots}
    assert bool(kept) == bool(snapshots)


@given(SNAPSHOTS, LAST, EVERY, BEST)
def test_every_nth_stays_for_ever(snapshots: list[KeptInfo], last: int, every: int, best: int) -> None:
    """A step that keep_every_steps names stays, and keep_every_steps = 0 names none."""
    kept = kept_steps(snapshots, last, every, best)
    if every:
        assert {info.step for info in snapshots if info.step % every == 0} <= kept
    else:
        assert len(kept) <= last + best


@given(SNAPSHOTS, LAST, EVERY, BEST)
def test_the_best_stay(snapshots: list[KeptInfo], last: int, every: int, best: int) -> None:
    """As many of the lowest losses stay as were asked for: of those that go, none beats one of them."""
    kept = kept_steps(snapshots, last, every, best)
    candidates = measured(snapshots)
    staying = [info for info in candidates if info.step in kept]
    assert len(staying) >= min(best, len(candidates))
    for gone in (info for info in candidates if info.step not in kept):
        better = [
            info
            for info in staying
            if (info.validation_loss, -info.generation, -info.step)
            < (gone.validation_loss, -gone.generation, -gone.step)
        ]
        assert len(better) >= best


@given(SNAPSHOTS, LAST, EVERY, BEST)
def test_asking_for_more_never_removes(snapshots: list[KeptInfo], last: int, every: int, best: int) -> None:
    """keep_last and keep_best only ever add."""
    kept = kept_steps(snapshots, last, every, best)
    assert kept <= kept_steps(snapshots, last, every, best + 1)
    assert kept <= kept_steps(snapshots, last + 1, every, best)


@given(SNAPSHOTS, LAST, EVERY, BEST, st.randoms(use_true_random=False))
def test_the_order_of_listing_does_not_matter(
    snapshots: list[KeptInfo], last: int, every: int, best: int, order: random.Random
) -> None:
    """Two nodes that list the same snapshots decide the same."""
    shuffled = list(snapshots)
    order.shuffle(shuffled)
    assert kept_steps(shuffled, last, every, best) == kept_steps(snapshots, last, every, best)


def test_ties_missing_and_broken_losses() -> None:
    """Of equal losses the newer is best; without a finite loss a snapshot is never best."""
    old, new = (KeptInfo(step=step, generation=1, validation_loss=2.0) for step in (10, 20))
    others = [
        KeptInfo(step=1, generation=1),
        KeptInfo(step=2, generation=1, validation_loss=math.nan),
        KeptInfo(step=3, generation=1, validation_loss=-math.inf),
        KeptInfo(step=30, generation=1, validation_loss=5.0),
    ]
    assert kept_steps([old, new, *others], keep_last=1, keep_every_steps=0, keep_best=1) == {20, 30}
    assert kept_steps([old, new, *others], keep_last=1, keep_every_steps=0, keep_best=9) == {10, 20, 30}


def test_what_the_rule_knows_comes_from_the_manifest() -> None:
    """The loss is rank 0's scalar; without one, or with null or nonsense in its place, it was not measured."""
    for text, loss in ((b"2.5", 2.5), (b"3", 3.0), (b"null", None), (b'"low"', None), (None, None)):
        scalars = {"tokens_seen": msgspec.Raw(b"7")} | ({} if text is None else {VALIDATION_LOSS: msgspec.Raw(text)})
        shard = Shard(
            rank=0, file="g2-rank00000.safetensors", size_bytes=8, checksum="", data_start_bytes=8, tensors=(),
            scalars=scalars, leaves={},
        )  # fmt: skip
        manifest = Manifest(version=1, step=40, generation=2, world_size=1, mesh={}, t_wall_s=0.0, shards=(shard,))
        assert kept_info(manifest) == KeptInfo(step=40, generation=2, validation_loss=loss)
