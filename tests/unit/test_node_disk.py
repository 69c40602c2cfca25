"""Promises of the node's own disk: verified or not there, the last good shard stays, and it hinders nobody."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointing import disk
from checkpointing.layout import HeldShard, ShardRef, Tier
from checkpointing.node_disk import NodeDisk
from checkpointing.segment import CONTROL_BYTES, PersistTo, SlotState, open_segment, segment_name
from checkpointing.sources import SourceError
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from checkpointing.verify import verify_snapshot
from tests.checkpoint_helpers import OneRank, flip_byte


def node_run(tmp_path: Path, generation: int = 1) -> OneRank:
    run = OneRank(tmp_path, seed=1, generation=generation)
    run.store = NodeStore(run.ram_dir, run.run_dir, node_dir=tmp_path / "node")
    return run


def write(run: OneRank, step: int, to: PersistTo) -> list[StoreEvent]:
    run.manager.stage(step, to, {"step": step, "tokens": step})
    run.manager.wait()
    return run.store.persist_pending() + run.store.commit_pending() + run.store.verify_pending()


def on_node(run: OneRank) -> list[HeldShard]:
    return [shard for shard in run.store.inventory() if shard.tier is Tier.NODE]


def node_file(tmp_path: Path, step: int) -> Path:
    return tmp_path / f"node/step-{step}/g1-rank00000.safetensors"


def test_a_slot_goes_to_the_tiers_it_asks_for(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    assert [(e.kind, e.tier) for e in write(run, 5, PersistTo.NODE)] == [(StoreEventKind.PERSISTED, Tier.NODE)]
    assert not (run.run_dir / "checkpoints/step-5").exists()
    events = write(run, 10, PersistTo.NODE | PersistTo.RUN)
    assert [(e.kind, e.tier) for e in events[:2]] == [
        (StoreEventKind.PERSISTED, Tier.NODE), (StoreEventKind.PERSISTED, Tier.RUN)
    ]  # fmt: skip
    assert verify_snapshot(run.run_dir, 10) == []
    layout = run.manager._plan.digest
    assert [(s.step, s.rank, s.generation, s.world_size, s.layout) for s in on_node(run)] == [
        (5, 0, 1, 1, layout), (10, 0, 1, 1, layout)
    ]  # fmt: skip
    assert not list((tmp_path / "node").rglob("manifest.json"))
    assert not run.manager.persist_busy


def test_without_such_a_disk_only_the_run_directory_is_written(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    assert write(run, 5, PersistTo.NODE) == []
    assert not run.manager.persist_busy
    assert [e.kind for e in write(run, 10, PersistTo.NODE | PersistTo.RUN)] == [
        StoreEventKind.PERSISTED, StoreEventKind.COMMITTED
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "cut", "sidecar", "missing"])
def test_a_damaged_file_is_not_in_the_inventory(tmp_path: Path, damage: str) -> None:
    run = node_run(tmp_path)
    write(run, 5, PersistTo.NODE)
    write(run, 6, PersistTo.NODE)
    path = node_file(tmp_path, 6)
    if damage == "flip":
        flip_byte(path, path.stat().st_size - 1)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "sidecar":
        path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:50])
    else:
        path.unlink()
    assert [s.step for s in on_node(run)] == [5]


def test_the_newest_two_stay_and_newest_goes_by_generation(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    for step in (40, 50):
        write(run, step, PersistTo.NODE)
    again = node_run(tmp_path, generation=2)
    write(again, 35, PersistTo.NODE)
    assert [(s.generation, s.step) for s in on_node(again)] == [(1, 50), (2, 35)]
    write(again, 36, PersistTo.NODE)
    assert [(s.generation, s.step) for s in on_node(again)] == [(2, 35), (2, 36)]
    assert sorted(p.name for p in (tmp_path / "node").iterdir()) == ["step-35", "step-36"]


def test_another_ranks_shards_are_counted_apart(tmp_path: Path) -> None:
    """A node that took over another's rank keeps what it has of its own."""
    for rank in range(2):
        run = OneRank(tmp_path, seed=1, rank=rank, world_size=2)
        run.store = NodeStore(run.ram_dir, run.run_dir, node_dir=tmp_path / "node")
        for step in (1, 2, 3):
            write(run, step, PersistTo.NODE)
    assert [(s.rank, s.step) for s in on_node(run)] == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_a_failing_disk_is_an_event_and_hinders_nothing(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    (tmp_path / "node").write_text("not a folder")
    events = write(run, 10, PersistTo.NODE | PersistTo.RUN)
    assert [(e.kind, e.tier) for e in events] == [
        (StoreEventKind.FAILED, Tier.NODE), (StoreEventKind.PERSISTED, Tier.RUN), (StoreEventKind.COMMITTED, Tier.RUN)
    ]  # fmt: skip
    assert events[0].detail.startswith("shard not persisted on the node's disk: ")
    assert "\n" not in events[0].detail
    assert verify_snapshot(run.run_dir, 10) == []
    assert on_node(run) == []


def test_a_full_disk_keeps_the_last_good_shard_and_makes_room(tmp_path: Path, small_disk: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.store = NodeStore(run.ram_dir, run.run_dir, node_dir=small_disk)
    size_bytes = run.manager._plan.size_bytes
    write(run, 1, PersistTo.NODE)
    write(run, 2, PersistTo.NODE)
    (small_disk / "hog").write_bytes(b"x" * (small_disk_free(small_disk) - size_bytes // 2))
    events = write(run, 3, PersistTo.NODE)
    assert [e.kind for e in events] == [StoreEventKind.FAILED]
    assert "No space left" in events[0].detail
    assert [s.step for s in on_node(run)] == [2]
    assert [e.kind for e in write(run, 4, PersistTo.NODE)] == [StoreEventKind.PERSISTED]
    assert [s.step for s in on_node(run)] == [2, 4]


def small_disk_free(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def test_memory_that_rotted_reaches_neither_disk(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    run.manager.stage(10, PersistTo.NODE | PersistTo.RUN, {})
    run.manager.wait()
    slot = next(s for s in run.manager._slots if s.segment.state is SlotState.TO_PERSIST)
    flip_byte(slot.segment.path, CONTROL_BYTES + 20_000)
    assert [e.kind for e in run.store.persist_pending()] == [StoreEventKind.FAILED, StoreEventKind.FAILED]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert run.manager.newest_complete is None


def test_a_shard_is_found_in_memory_before_the_disk_and_nowhere_if_unknown(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    write(run, 10, PersistTo.NODE)
    in_memory = run.store.find(ShardRef(1, 10, 0))
    assert in_memory is not None
    assert (in_memory.path.suffix, in_memory.start_bytes, in_memory.control.step) == (".seg", CONTROL_BYTES, 10)
    run.store.close()
    on_disk = run.store.find(ShardRef(1, 10, 0))
    assert on_disk is not None
    assert (on_disk.path, on_disk.start_bytes) == (node_file(tmp_path, 10), 0)
    assert on_disk.control.layout == in_memory.control.layout
    assert on_disk.control.checksum == in_memory.control.checksum
    assert run.store.find(ShardRef(2, 10, 0)) is None
    assert run.store.find(ShardRef(1, 11, 0)) is None


def test_the_disk_as_a_source_gives_what_it_has_and_says_what_it_has_not(tmp_path: Path) -> None:
    run = node_run(tmp_path)
    write(run, 10, PersistTo.NODE | PersistTo.RUN)
    shard = disk.read_manifest(run.run_dir, 10).shards[0]
    NodeDisk(tmp_path / "node").fetch(10, 1, shard, tmp_path / "fetched")
    assert disk.file_problem(tmp_path / "fetched", shard) is None
    with pytest.raises(SourceError, match="No such file"):
        NodeDisk(tmp_path / "node").fetch(11, 1, shard, tmp_path / "again")


def adopted(tmp_path: Path, run: OneRank, step: int) -> Path:
    """A segment as it comes from a peer: the bytes of `step`, made by another rank 0."""
    other = OneRank(tmp_path / "other", seed=3, generation=1)
    other.stage(step)
    path = next(s.segment.path for s in other.manager._slots if s.segment.control)
    target = tmp_path / "fetched.seg"
    target.write_bytes(path.read_bytes())
    return target


def test_an_adopted_segment_takes_a_slot_that_is_neither_the_newest_nor_to_persist(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    run = OneRank(tmp_path, seed=1)
    run.stage(10, persist=True)
    run.stage(11)
    run.stage(12)
    segment = adopted(tmp_path, run, 9)
    control = open_segment(segment, run.manager._plan.size_bytes).control
    assert control is not None
    run.store.adopt(segment, control, 0)
    assert sorted(s.step for s in run.store.inventory()) == [9, 10, 12]
    again = OneRank(tmp_path, seed=2, generation=2)
    loaded = again.load(ram_step=9)
    assert loaded is not None
    assert (loaded.step, loaded.tier) == (9, "ram")
    assert again.equals(seed=3)


def test_an_adopted_segment_replaces_a_damaged_slot_of_the_same_shard(tmp_path: Path) -> None:
    """Else the damaged one could be found first."""
    (tmp_path / "other").mkdir()
    run = OneRank(tmp_path, seed=1)
    run.stage(9)
    flip_byte(next(s.segment.path for s in run.manager._slots if s.segment.control), CONTROL_BYTES + 20_000)
    segment = adopted(tmp_path, run, 9)
    control = open_segment(segment, run.manager._plan.size_bytes).control
    assert control is not None
    run.store.adopt(segment, control, 0)
    assert [s.step for s in run.store.inventory()] == [9]
    assert len([p for p in run.ram_dir.iterdir() if open_segment(p, run.manager._plan.size_bytes).control]) == 1
    assert OneRank(tmp_path, seed=2, generation=2).load(ram_step=9) is not None


def test_a_file_that_is_not_what_it_is_said_to_be_is_not_adopted(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(9)
    path = run.ram_dir / segment_name(0, 0)
    control = open_segment(path, run.manager._plan.size_bytes).control
    assert control is not None
    empty = tmp_path / "empty.seg"
    open_segment(empty, run.manager._plan.size_bytes).close()
    with pytest.raises(ValueError, match="not a whole segment of step 9, rank 0"):
        run.store.adopt(empty, control, 0)
