"""Promises of retention: the last good snapshot never goes before a newer one was read back from the disk, whole."""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, mark_name
from checkpointing.retention import Keep, Retention, remove_uncommitted_shards
from checkpointing.store import NodeStore, StoreEventKind
from checkpointing.verify import list_snapshots, verify_snapshot
from tests.checkpoint_helpers import OneRank, flip_byte


def shard(run: OneRank, step: int, generation: int = 1) -> Path:
    return disk.step_dir(run.run_dir, step) / f"g{generation}-rank{run.manager.rank:05d}.safetensors"


def flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 1)


def commit(run: OneRank, step: int) -> None:
    """Persisted and committed, but not read back."""
    run.stage(step, persist=True)
    assert [e.kind for e in run.store.persist_pending()] == [StoreEventKind.PERSISTED]
    run.store.commit_pending()


def restarted(tmp_path: Path, run: OneRank) -> OneRank:
    """New workers, the same agent."""
    again = OneRank(tmp_path, seed=1, generation=run.manager.generation)
    again.store = run.store
    return again


def test_nothing_goes_before_the_newer_ones_are_read_back(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    for step in (10, 20, 30, 40):
        commit(run, step)
    assert disk.committed_steps(run.run_dir) == [40, 30, 20, 10]
    assert not any(info.verified for info in list_snapshots(run.run_dir))
    assert run.store.pending()
    assert run.store.verify_pending() == []
    assert not run.store.pending()
    assert [(info.step, info.verified) for info in list_snapshots(run.run_dir)] == [(40, True), (30, True)]


def test_what_waits_for_the_disk_comes_before_reading_back(tmp_path: Path) -> None:
    """Promise: reading back never makes a snapshot wait for the disk, and its turn comes all the same."""
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    run.stage(20, persist=True)
    assert run.store.verify_pending() == []
    assert [info.verified for info in list_snapshots(run.run_dir)] == [False]
    assert run.store.pending()
    run.store.persist_pending()
    run.store.commit_pending()
    run.store.verify_pending()
    assert [info.verified for info in list_snapshots(run.run_dir)] == [True, True]


def test_a_disk_that_is_never_idle_is_read_back_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: however busy the disk is, the last good snapshots are known before long, and old ones can go."""
    monkeypatch.setattr("checkpointing.readback._PATIENCE_S", 0.0)
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    run.stage(20, persist=True)
    run.store.verify_pending()
    assert [info.verified for info in list_snapshots(run.run_dir)] == [True]


def test_a_shard_that_the_disk_did_not_keep_is_written_again_from_memory(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    flip(shard(run, 10))
    assert run.store.verify_pending() == []
    assert verify_snapshot(run.run_dir, 10) == []


def test_a_damaged_snapshot_never_makes_a_good_one_go(tmp_path: Path) -> None:
    """The disk flips a bit in every snapshot from 30 on: 20 and 10 stay, and each damage is said once."""
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    run.persist(20)
    for step in (30, 40, 50):
        commit(run, step)
        run.store.close()  # memory is gone as well
        flip(shard(run, step))
        [event] = run.store.verify_pending()
        assert (event.kind, event.step) == (StoreEventKind.FAILED, step)
        assert event.detail.startswith(f"step-{step}/g1-rank00000.safetensors: checksum")
        run = restarted(tmp_path, run)
    assert disk.committed_steps(run.run_dir) == [50, 40, 30, 20, 10]
    assert verify_snapshot(run.run_dir, 20) == verify_snapshot(run.run_dir, 10) == []
    run.persist(60)
    assert disk.committed_steps(run.run_dir) == [60, 50, 40, 30, 20]
    run.persist(70)
    assert disk.committed_steps(run.run_dir) == [70, 60]


def test_a_snapshot_waits_for_the_marks_of_all_nodes(tmp_path: Path) -> None:
    ranks = [OneRank(tmp_path, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for step in (10, 20, 30):
        commit(ranks[1], step)
        commit(ranks[0], step)
        assert ranks[0].store.verify_pending() == []
    assert disk.committed_steps(ranks[0].run_dir) == [30, 20, 10]
    ranks[1].store.verify_pending()
    ranks[0].store.verify_pending()
    assert disk.committed_steps(ranks[0].run_dir) == [30, 20]


def test_snapshots_without_marks_do_not_stay_for_ever(tmp_path: Path) -> None:
    """Made before there were marks, or by nodes that died: they are read in their place by then."""
    run = OneRank(tmp_path, seed=1)
    for step in (10, 20, 30):
        commit(run, step)
    run.store = NodeStore(run.ram_dir, run.run_dir)
    flip(shard(run, 30))
    run.persist(40)
    assert [(info.step, info.verified) for info in list_snapshots(run.run_dir)] == [
        (40, True), (30, False), (20, True)
    ]  # fmt: skip
    run.persist(50)
    assert disk.committed_steps(run.run_dir) == [50, 40]


def test_a_snapshot_is_not_replaced_before_its_successor_has_verified(tmp_path: Path) -> None:
    """The same step made again in a later generation: the old manifest stays until the new shard was read back."""
    OneRank(tmp_path, seed=1).persist(10)
    again = OneRank(tmp_path, seed=2, generation=2)
    again.stage(10, persist=True)
    again.store.persist_pending()
    again.store.commit_pending()
    assert disk.read_generation(again.run_dir, 10) == 1
    assert verify_snapshot(again.run_dir, 10) == []
    again.store.close()
    flip(shard(again, 10, 2))
    [event] = again.store.verify_pending()
    assert event.kind is StoreEventKind.FAILED
    again.store.commit_pending()
    assert disk.read_generation(again.run_dir, 10) == 1
    assert verify_snapshot(again.run_dir, 10) == []
    again = restarted(tmp_path, again)
    again.persist(10)
    assert disk.read_generation(again.run_dir, 10) == 2
    assert verify_snapshot(again.run_dir, 10) == []
    assert {path.name for path in disk.step_dir(again.run_dir, 10).iterdir()} == {
        "manifest.json", "g2-rank00000.safetensors", "g2-rank00000.json", mark_name(2, 0)
    }  # fmt: skip


def test_marks_are_no_snapshot_and_go_with_their_own(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1, rank=0, world_size=2)
    for step in (10, 20, 30):
        run.stage(step, persist=True)
        run.store.persist_pending()
        run.store.verify_pending()
    left = {str(path.relative_to(run.run_dir)) for path in run.run_dir.rglob("*.verified")}
    assert left == {f"checkpoints/step-{step}/{mark_name(1, 0)}" for step in (20, 30)}
    assert disk.committed_steps(run.run_dir) == []


def test_a_shard_under_way_in_an_older_step_is_left_alone(tmp_path: Path) -> None:
    """Generation 2 writes step 15 while 30 of generation 1 is the newest: that is no leftover."""
    run = OneRank(tmp_path, seed=1)
    for step in (10, 20, 30):
        run.persist(step)
    again = OneRank(tmp_path, seed=2, generation=2)
    again.stage(15, persist=True)
    again.store.persist_pending()
    Retention(run.run_dir, Keep(2, 0, 0)).apply()
    assert shard(again, 15, 2).exists()


class History:
    """Snapshots of random ages, each with its shard whole or not and marked or not, in a folder of their own."""

    def __init__(self, folder: Path, snapshots: dict[int, tuple[int, bool, bool]]) -> None:
        self.run_dir = folder / "run"
        for step, (generation, whole, marked) in snapshots.items():
            run = OneRank(folder, seed=1, generation=generation)
            commit(run, step)
            if marked:
                run.store.readback.retention.keep = Keep(99, 0, 0)
                run.store.verify_pending()
            if not whole:
                flip(shard(run, step, generation))
            run.store.close()
            run.manager.close()


@settings(max_examples=25, deadline=None)
@given(
    snapshots=st.dictionaries(
        st.integers(1, 9), st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=5
    ),
    keep_last=st.integers(2, 3),
)
def test_what_is_good_and_newest_stays_whatever_happened(
    snapshots: dict[int, tuple[int, bool, bool]], keep_last: int
) -> None:
    """Of any history: what verified and is newest by (generation, step) stays, and nothing goes if nothing verified.

    A mark is believed; whoever damages a file after it was marked is noticed by loading, which takes the mark away.
    """
    ages = {step: (generation, step) for step, (generation, _, _) in snapshots.items()}
    verified = {step for step, (_, _, marked) in snapshots.items() if marked}
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder), snapshots)
        Retention(history.run_dir, Keep(keep_last, 0, 0)).apply()
        left = set(disk.committed_steps(history.run_dir))
    if not verified:
        assert left == set(snapshots)
        return
    newest = max(ages[step] for step in verified)
    trusted = verified | {step for step, (_, whole, _) in snapshots.items() if whole and ages[step] < newest}
    must_stay = sorted(trusted, key=lambda step: ages[step], reverse=True)[:keep_last]
    assert set(must_stay) <= left
    assert {step for step in snapshots if ages[step] > newest} <= left, "what may yet verify stays"


def test_the_best_and_every_nth_are_read_before_anything_else_goes(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.store = NodeStore(run.ram_dir, run.run_dir, keep_last=2, keep_every_steps=30, keep_best=1)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, 5.0), (60, 6.0), (70, None)):
        run.manager.stage(step, True, {"validation_loss": loss})  # type: ignore[arg-type]
        run.manager.wait()
        run.store.persist_pending()
        run.store.commit_pending()
        run.store.verify_pending()
    assert disk.committed_steps(run.run_dir) == [70, 60, 30, 20]
    assert [info.validation_loss for info in list_snapshots(run.run_dir)] == [None, 6.0, 2.0, 1.0]


def test_a_read_back_that_the_disk_refuses_is_an_event(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    run.store.close()
    path = shard(run, 10)
    path.unlink()
    path.mkdir()
    [event] = run.store.verify_pending()
    assert event.kind is StoreEventKind.FAILED
    assert "\n" not in event.detail
    assert run.store.verify_pending() == [], "it is said once"


def test_strange_names_among_the_snapshots_stop_nothing(tmp_path: Path) -> None:
    """A file with a step's name, a step written another way: they stay, and the rest is persisted and tidied."""
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    folder = disk.checkpoints_dir(run.run_dir)
    (folder / "step-5").write_text("a note")
    (folder / "step-010").mkdir()
    for step in (20, 30, 40):
        commit(run, step)
        assert run.store.verify_pending() == []
    assert disk.committed_steps(run.run_dir) == [40, 30]
    assert (folder / "step-5").is_file()
    assert (folder / "step-010").is_dir()


def test_of_a_snapshot_that_was_moved_away_only_the_link_goes(tmp_path: Path) -> None:
    """Somebody keeps an old one elsewhere: it is not this run directory's to empty."""
    run = OneRank(tmp_path, seed=1)
    commit(run, 10)
    kept = tmp_path / "archive"
    disk.step_dir(run.run_dir, 10).rename(kept)
    disk.step_dir(run.run_dir, 10).symlink_to(kept)
    there = sorted(kept.iterdir())
    for step in (20, 30, 40):
        commit(run, step)
        assert run.store.verify_pending() == []
    assert disk.all_steps(run.run_dir) == [40, 30]
    assert set(there) <= set(kept.iterdir())
    assert (kept / MANIFEST_NAME).is_file()


def test_a_folder_that_another_node_removes_meanwhile_keeps_no_shard_from_the_disk(tmp_path: Path) -> None:
    """Retention runs on one node while all others persist: what is gone already is no failure."""
    folder, done = disk.step_dir(tmp_path, 1), threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            folder.mkdir(parents=True, exist_ok=True)
            folder.rmdir()

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(come_and_go)
        try:
            until = time.monotonic() + 0.7
            while time.monotonic() < until:
                remove_uncommitted_shards(tmp_path, rank=0, before=(1, 9), keep=1)
        finally:
            done.set()
        assert going.exception() is None
