"""A snapshot that only nodes hold becomes one in the run directory like any other, whoever holds its shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpointing.copies import CopyStore, Located
from checkpointing.disk import step_dir
from checkpointing.layout import ShardRef
from checkpointing.segment import CONTROL_BYTES
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from checkpointing.verify import committed_generation, verify_snapshot
from tests.checkpoint_helpers import OneRank, flip_byte


class Survivor:
    """A node with rank 0's shard of step 7 in a slot, and rank 1's, whose node is gone, among its copies or on disk."""

    def __init__(self, tmp_path: Path, where: str = "copy") -> None:
        self.own = OneRank(tmp_path, seed=1, rank=0, world_size=2)
        lost = OneRank(tmp_path, seed=1, rank=1, world_size=2)
        for rank in (self.own, lost):
            rank.stage(7)
        slot = lost.store.find(ShardRef(1, 7, 1))
        assert slot is not None
        self.copies = CopyStore(tmp_path / "copies")
        self.store = NodeStore(self.own.ram_dir, self.own.run_dir, node_dir=tmp_path / "disk")
        if where == "copy":
            shutil.copy(slot.path, self.copies.dir / "copy-1-1-7.seg")
        else:
            assert self.store.node_disk is not None
            with slot.path.open("rb") as file:
                self.store.node_disk.write(file.fileno(), slot.control)

    def find(self, rank: int) -> Located:
        found = self.copies.find(ShardRef(1, 7, rank)) or self.store.find(ShardRef(1, 7, rank))
        assert found is not None
        return found

    def rescue(self) -> list[StoreEvent]:
        for rank in (0, 1):
            self.store.rescue(self.find(rank))
        assert self.store.pending()
        return [*self.store.persist_pending(), *self.store.verify_pending(), *self.store.commit_pending()]


@pytest.mark.parametrize("where", ["copy", "disk"])
def test_a_survivor_commits_what_it_and_its_copies_hold(where: str, tmp_path: Path) -> None:
    """Promise: every byte is verified on the way, and another layout loads it."""
    node = Survivor(tmp_path, where)
    kinds = [event.kind for event in node.rescue()]
    assert kinds == [StoreEventKind.PERSISTED, StoreEventKind.PERSISTED, StoreEventKind.COMMITTED]
    assert committed_generation(node.own.run_dir, 7) == 1
    assert verify_snapshot(node.own.run_dir, 7) == []
    (tmp_path / "later").mkdir()
    shutil.move(node.own.run_dir, tmp_path / "later" / "run")
    alone = OneRank(tmp_path / "later", seed=2, generation=2)
    loaded = alone.load()
    assert loaded is not None
    assert loaded.step == 7
    assert alone.equals(1)


def test_a_copy_that_rotted_is_not_committed(tmp_path: Path) -> None:
    node = Survivor(tmp_path)
    flip_byte(node.find(1).path, CONTROL_BYTES + 4000)
    events = node.rescue()
    assert StoreEventKind.COMMITTED not in [event.kind for event in events]
    (failed,) = [event for event in events if event.kind is StoreEventKind.FAILED]
    assert (failed.step, failed.generation, failed.rank) == (7, 1, 1)
    assert "changed since they were staged" in failed.detail


def test_a_node_that_was_given_up_rescues_nothing(tmp_path: Path) -> None:
    node = Survivor(tmp_path)
    node.store.fence()
    assert node.rescue() == []
    assert committed_generation(node.own.run_dir, 7) == -1


@pytest.mark.parametrize("when", ["nothing is written", "all is written"])
def test_what_is_not_wanted_any_more_is_not_committed(when: str, tmp_path: Path) -> None:
    """Promise: the job has gone on without it, and a late commit of an older history would lie beside its own."""
    node = Survivor(tmp_path)
    for rank in (0, 1):
        node.store.rescue(node.find(rank))
    if when == "all is written":
        node.store.persist_pending()
    node.store.drop_rescues()
    node.store.persist_pending()
    assert node.store.commit_pending() == []
    assert committed_generation(node.own.run_dir, 7) == -1
    assert StoreEventKind.COMMITTED in [event.kind for event in node.rescue()], "asked for again, it is"


def test_two_nodes_may_write_one_shard(tmp_path: Path) -> None:
    """Promise: what the other has half written is not touched, and what it has put in place stays if we cannot."""
    node = Survivor(tmp_path)
    folder = step_dir(node.own.run_dir, 7)
    folder.mkdir(parents=True)
    theirs = folder / "g1-rank00000.safetensors.tmp"
    theirs.write_bytes(b"half")
    node.rescue()
    assert theirs.read_bytes() == b"half"


def test_what_another_put_in_place_outlives_our_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Survivor(tmp_path)
    node.rescue()
    shard = step_dir(node.own.run_dir, 7) / "g1-rank00000.safetensors"
    shard.with_suffix(".json").unlink()  # its sidecar is not written yet

    def refuse(_: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    node.rescue()
    assert shard.exists()
