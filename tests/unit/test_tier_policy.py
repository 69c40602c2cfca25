"""When each tier is fed."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.policy import TierPolicy
from checkpointing.segment import PersistTo
from configs.schema import CheckpointConfig
from tests.unit.stories import record
from trainer.canary import differs, logged_record
from trainer.events import append_line

steps = st.integers(1, 500)
intervals = st.integers(1, 20)


@given(steps, intervals, intervals, intervals, st.booleans(), st.booleans(), st.booleans())
def test_each_tier_is_fed_when_its_interval_says_so(
    step: int, ram: int, persist: int, node: int, final: bool, busy: bool, clock: bool
) -> None:
    """Promise: due steps go to their tiers, a busy disk makes snapshots rarer, and the last state is always written."""
    config = CheckpointConfig(
        ram_interval_steps=ram, persist_interval_steps=ram * persist, node_dir="/disk", node_interval_steps=ram * node
    )
    feed = TierPolicy(config).feed(step, final, busy, clock)
    assert bool(feed.persist & PersistTo.RUN) == (final or (not busy and (clock or step % (ram * persist) == 0)))
    assert bool(feed.persist & PersistTo.NODE) == (final or (not busy and step % (ram * node) == 0))
    assert feed.stage >= bool(feed.persist)
    assert feed.stage >= (step % ram == 0)
    assert not feed.stage or step % ram == 0 or feed.persist


def test_no_folder_no_tier() -> None:
    assert TierPolicy(CheckpointConfig(node_interval_steps=1)).feed(1, True, False, False).persist is PersistTo.RUN


def test_minutes_count_only_when_they_are_set() -> None:
    assert not TierPolicy(CheckpointConfig()).clock_due(1e9)
    policy = TierPolicy(CheckpointConfig(persist_interval_minutes=2))
    assert not policy.clock_due(119)
    assert policy.clock_due(120)


def test_copies_are_sent_as_often_as_asked() -> None:
    policy = TierPolicy(CheckpointConfig(peer_interval_steps=3))
    assert [step for step in range(1, 10) if policy.copies(step)] == [3, 6, 9]
    assert not TierPolicy(CheckpointConfig(peer_copies=0)).copies(3)


def test_the_canary_reads_the_row_of_its_own_history(tmp_path: Path) -> None:
    """Promise: a step's loss is found behind later rows and torn lines, and never that of a history given up.

    Generation 2 began anew from before step 7, on another layout, say: what generation 1 had there does not bind it.
    """
    path = tmp_path / "metrics.jsonl"
    assert logged_record(path, 7, 1) is None
    for generation, step in ((1, 6), (1, 7), (1, 8), (2, 7), (2, 9), (3, 9), (3, 8)):
        append_line(path, record(step, generation, 10.0 * step, 1.0, 0.0, 0.0))
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record(7, 3, 1.0, 1.0, 0.0, 0.0))[:40])

    def found(step: int, since_generation: int) -> int | None:
        row = logged_record(path, step, since_generation)
        return None if row is None else row.generation

    assert found(7, 1) == 1
    assert found(7, 2) == 2
    assert found(8, 2) == 3
    assert found(9, 1) == 2
    assert found(6, 2) is None
    assert found(9, 4) is None


@given(st.floats(0.1, 20), st.floats(0, 0.1))
def test_the_canary_sees_what_is_beyond_tolerance(loss: float, tolerance: float) -> None:
    assert not differs(loss, loss, tolerance)
    assert differs(loss, loss * (1 + tolerance) + 1e-3, tolerance)
    assert differs(loss, math.nan, tolerance)
    assert differs(loss, math.inf, tolerance)
