"""The run directory's fence: whoever has not heard of the newest generation commits nothing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing import disk
from checkpointing.fence import FENCE_NAME, fenced_below, raise_fence
from checkpointing.persister import Persister
from checkpointing.store import StoreEvent, StoreEventKind
from checkpointing.verify import list_snapshots
from cluster import events
from cluster.fencing import FenceWatcher
from tests.checkpoint_helpers import OneRank


def committed(found: list[StoreEvent]) -> bool:
    return StoreEventKind.COMMITTED in [event.kind for event in found]


def on_a_node_of_its_own(tmp_path: Path, name: str, generation: int) -> OneRank:
    """A rank with its node's own memory; all share a run directory."""
    (tmp_path / name).mkdir()
    (tmp_path / "shared").mkdir(exist_ok=True)
    (tmp_path / name / "run").symlink_to(tmp_path / "shared")
    rank = OneRank(tmp_path / name, seed=generation, generation=generation)
    rank.store.follow(generation)
    return rank


def test_an_orphan_commits_nothing_after_a_newer_generation_was_planned(tmp_path: Path) -> None:
    """Promise: it may write its shards; a snapshot never comes of them, and its successor's does."""
    orphan = on_a_node_of_its_own(tmp_path, "orphan", 3)
    raise_fence(tmp_path / "shared", 4)
    assert not committed(orphan.persist(10))
    assert not committed(orphan.store.commit_pending()), "nor later"
    assert list_snapshots(tmp_path / "shared") == []
    successor = on_a_node_of_its_own(tmp_path, "successor", 4)
    assert committed(successor.persist(10))
    assert not committed(orphan.store.commit_pending())
    assert disk.read_generation(tmp_path / "shared", 10) == 4


def test_a_node_that_hears_of_the_generation_commits_what_it_had(tmp_path: Path) -> None:
    """Promise: a snapshot that was whole when its generation ended is not lost, only late."""
    run = OneRank(tmp_path, seed=1, generation=3)
    run.store.follow(3)
    raise_fence(run.run_dir, 4)
    assert not committed(run.persist(10))
    assert run.store.pending()
    run.store.follow(4)
    assert committed(run.store.commit_pending())
    assert disk.read_generation(run.run_dir, 10) == 3


def test_one_that_is_held_up_between_the_look_and_the_link_takes_its_manifest_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OneRank(tmp_path, seed=1, generation=3)
    run.store.follow(3)
    create = disk.create_atomic

    def held_up(path: Path, data: bytes) -> bool:
        raise_fence(run.run_dir, 4)
        return create(path, data)

    monkeypatch.setattr(disk, "create_atomic", held_up)
    assert not committed(run.persist(10))
    assert list_snapshots(run.run_dir) == []


def test_a_store_that_was_fenced_writes_nothing_more(tmp_path: Path) -> None:
    """Promise: from the moment a node knows that it was given up, its slots stay in its memory."""
    run = OneRank(tmp_path, seed=1)
    run.stage(10, persist=True)
    persister = Persister(run.store, lambda event: None).start()
    persister.end()
    run.store.fence()
    assert run.store.persist_pending() == []
    assert run.store.commit_pending() == []
    assert run.store.verify_pending() == []
    assert persister.stop()


def test_a_fence_is_never_lowered_and_damage_keeps_nobody_out(tmp_path: Path) -> None:
    assert fenced_below(tmp_path) == -1
    raise_fence(tmp_path, 4)
    raise_fence(tmp_path, 2)
    assert fenced_below(tmp_path) == 4
    for data in (b"", b"{", b'{"generation": "x"}', b"\xff\xfe", b"[" * 10000):
        (tmp_path / FENCE_NAME).write_bytes(data)
        assert fenced_below(tmp_path) == -1


def test_the_fence_is_raised_by_the_plan_and_by_nothing_else(tmp_path: Path) -> None:
    raised: list[int] = []
    watcher = FenceWatcher(raised.append)
    watcher.on_event(events.NodeEvicted(t_wall_s=0.0, t_mono_s=0.0, node="node1", reason="r"))
    assert raised == []
    watcher.on_event(
        events.GenerationPlanned(
            t_wall_s=0.0, t_mono_s=0.0, generation=5, nodes=("node0",), ranks_per_node=1, store_host="h", store_port=1,
            ram_step=-1, reason="start",
        )
    )  # fmt: skip
    assert raised == [5]

    def full(generation: int) -> None:
        raise OSError(28, "No space left on device")

    FenceWatcher(full).on_event(
        events.GenerationPlanned(
            t_wall_s=0.0, t_mono_s=0.0, generation=6, nodes=("node0",), ranks_per_node=1, store_host="h", store_port=1,
            ram_step=-1, reason="start",
        )
    )  # fmt: skip
