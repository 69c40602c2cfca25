"""The snapshots with the lowest validation loss stay in the run directory."""

from __future__ import annotations

from pathlib import Path

from checkpointing import disk
from checkpointing.keep import VALIDATION_LOSS
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore
from checkpointing.verify import verify_snapshot
from tests.checkpoint_helpers import OneRank


def persist(run: OneRank, step: int, loss: float | None) -> None:
    """A snapshot with a validation loss, whole and read back."""
    run.manager.stage(step, PersistTo.RUN, {"tokens_seen": step, VALIDATION_LOSS: loss})
    run.manager.wait()
    for work in (run.store.persist_pending, run.store.commit_pending, run.store.verify_pending):
        work()


def test_the_best_outlive_the_newest(tmp_path: Path) -> None:
    """Losses come from the snapshots themselves; one that was not measured is only ever among the newest."""
    run = OneRank(tmp_path, seed=1)
    run.store = NodeStore(run.ram_dir, run.run_dir, keep_last=2, keep_best=2)
    for step, loss in ((10, 3.0), (20, 1.5), (30, None), (40, 2.0), (50, 2.5), (60, 2.75), (70, None)):
        persist(run, step, loss)
    assert disk.committed_steps(run.run_dir) == [70, 60, 40, 20]
    persist(run, 80, 1.0)
    persist(run, 90, 4.0)
    assert disk.committed_steps(run.run_dir) == [90, 80, 20]
    assert [verify_snapshot(run.run_dir, step) for step in (90, 80, 20)] == [[], [], []]


def test_a_loss_fits_behind_a_step_without_one(tmp_path: Path) -> None:
    """The room for scalars is reserved at the first snapshot, whose loss may be null: a long one fits later."""
    run = OneRank(tmp_path, seed=1)
    for step, loss in ((1, None), (2, 1.2345678901234567e-300)):
        persist(run, step, loss)
    assert disk.committed_steps(run.run_dir) == [2, 1]
