"""Promises of the run directory's tier: whole or not there; damage is named and the snapshot before it is used."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpointing import disk
from checkpointing.layout import encode_document
from checkpointing.manager import NoSnapshotError
from checkpointing.persister import Persister
from checkpointing.retention import commit_pulled
from checkpointing.segment import CONTROL_BYTES, SlotState
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from checkpointing.verify import list_snapshots, verify_snapshot
from tests.checkpoint_helpers import OneRank, flip_byte, same_bits, sample_tensors


@pytest.fixture
def run(tmp_path: Path) -> OneRank:
    """A run with steps 10 (the state of seed 1) and 20 (changed once) committed."""
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    run.change()
    run.persist(20)
    return run


def shard_path(run: OneRank, step: int) -> Path:
    return run.run_dir / f"checkpoints/step-{step}/g1-rank00000.safetensors"


def files(run: OneRank) -> set[str]:
    root = run.run_dir / "checkpoints"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def kinds(events: list[StoreEvent]) -> list[StoreEventKind]:
    return [event.kind for event in events]


def test_a_committed_snapshot_comes_back_bit_for_bit(tmp_path: Path, run: OneRank) -> None:
    again = OneRank(tmp_path, seed=2, generation=2)
    loaded = again.load()
    assert loaded is not None
    assert (loaded.step, loaded.tier, loaded.rejections) == (20, "disk", ())
    assert loaded.scalars == {"step": 20, "tokens": 20480}
    assert all(same_bits(t, run.state.tensors[name]) for name, t in again.state.tensors.items())
    assert again.state.values == {"lr": 0.1, "betas": (0.9, 0.95), "name": "adamw"}


def test_listing_and_verifying_a_whole_run(run: OneRank) -> None:
    listed = list_snapshots(run.run_dir)
    assert [(s.step, s.generation, s.world_size, s.mesh, s.problem) for s in listed] == [
        (20, 1, 1, {"dp_shard": 1}, ""),
        (10, 1, 1, {"dp_shard": 1}, ""),
    ]
    assert [verify_snapshot(run.run_dir, step) for step in (10, 20)] == [[], []]
    assert (run.run_dir / "checkpoints/latest").read_text() == "step-20\n"


def flip_in_shard(run: OneRank) -> str:
    flip_byte(shard_path(run, 20), 20_000)
    return "step-20/g1-rank00000.safetensors: checksum"


def remove_shard(run: OneRank) -> str:
    shard_path(run, 20).unlink()
    return "step-20/g1-rank00000.safetensors: missing"


def cut_shard(run: OneRank) -> str:
    os.truncate(shard_path(run, 20), 5000)
    return "step-20/g1-rank00000.safetensors: 5000 bytes, should be"


def cut_manifest(run: OneRank) -> str:
    os.truncate(run.run_dir / "checkpoints/step-20/manifest.json", 300)
    return "step-20/manifest.json: cut off or garbled"


def empty_manifest(run: OneRank) -> str:
    os.truncate(run.run_dir / "checkpoints/step-20/manifest.json", 0)
    return "step-20/manifest.json: cut off or garbled"


def flip_in_manifest(run: OneRank) -> str:
    path = run.run_dir / "checkpoints/step-20/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"world_size":1', b'"world_size":2'))
    return "step-20/manifest.json: checksum of its contents does not match"


def swap_manifest(run: OneRank) -> str:
    shutil.copy(run.run_dir / "checkpoints/step-10/manifest.json", run.run_dir / "checkpoints/step-20/manifest.json")
    return "step-20/manifest.json: is of step 10"


DAMAGES = [flip_in_shard, remove_shard, cut_shard, cut_manifest, empty_manifest, flip_in_manifest, swap_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_and_the_snapshot_before_is_used(tmp_path: Path, run: OneRank, damage) -> None:  # type: ignore[no-untyped-def]
    words = damage(run)
    again = OneRank(tmp_path, seed=2, generation=2)
    loaded = again.load()
    assert loaded is not None
    assert loaded.step == 10
    assert [(r.step, r.tier) for r in loaded.rejections] == [(20, "disk")]
    assert loaded.rejections[0].reason.startswith(words)
    assert "\n" not in loaded.rejections[0].reason
    assert again.equals(seed=1)
    assert [problem.startswith(words) for problem in verify_snapshot(run.run_dir, 20)] == [True]
    assert verify_snapshot(run.run_dir, 10) == []


def test_with_every_snapshot_damaged_a_person_decides(tmp_path: Path, run: OneRank) -> None:
    for step in (10, 20):
        flip_byte(shard_path(run, step), 20_000)
    again = OneRank(tmp_path, seed=2, generation=2)
    with pytest.raises(NoSnapshotError, match=r"none of the 2 snapshots .* can be loaded .*step-20"):
        again.load()
    assert again.equals(seed=2)


def test_a_step_done_again_replaces_the_damaged_one(tmp_path: Path, run: OneRank) -> None:
    flip_in_shard(run)
    again = OneRank(tmp_path, seed=2, generation=2)
    again.load()
    assert kinds(again.persist(20)) == [StoreEventKind.PERSISTED, StoreEventKind.COMMITTED]
    assert verify_snapshot(run.run_dir, 20) == []
    assert {name for name in files(run) if name.startswith("step-20/")} == {
        "step-20/manifest.json", "step-20/g2-rank00000.safetensors", "step-20/g2-rank00000.json",
        "step-20/g2-rank00000.verified",
    }  # fmt: skip


def test_shards_without_a_manifest_are_no_snapshot(tmp_path: Path) -> None:
    """A torn write, at every stage: half a file under its temporary name, a shard alone, a shard with its sidecar."""
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    run.stage(20, persist=True)
    run.store.persist_pending()
    torn = run.run_dir / "checkpoints/step-30"
    torn.mkdir()
    (torn / "g1-rank00000.safetensors.tmp").write_bytes(shard_path(run, 10).read_bytes()[:5000])
    (torn / "manifest.json.tmp").write_bytes((run.run_dir / "checkpoints/step-10/manifest.json").read_bytes()[:99])
    assert disk.committed_steps(run.run_dir) == [10]
    loaded = OneRank(tmp_path, seed=2, generation=2).load()
    assert loaded is not None
    assert (loaded.step, loaded.rejections) == (10, ())
    run.store.commit_pending()
    run.persist(40)
    assert {name.split("/")[0] for name in files(run)} == {"step-20", "step-40", "latest"}


def test_a_manifest_waits_for_every_rank(tmp_path: Path) -> None:
    """Rank 0's node commits when the other's sidecar is there, not before; the other's node commits nothing."""
    ranks = [OneRank(tmp_path, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert kinds(ranks[0].persist(10)) == [StoreEventKind.PERSISTED]
    assert ranks[0].store.pending()
    assert disk.committed_steps(ranks[0].run_dir) == []
    assert kinds(ranks[1].persist(10)) == [StoreEventKind.PERSISTED]
    assert not ranks[1].store.pending()
    assert kinds(ranks[0].store.commit_pending()) == [StoreEventKind.COMMITTED]
    assert verify_snapshot(ranks[0].run_dir, 10) == []


def test_shards_of_different_generations_never_make_one_snapshot(tmp_path: Path) -> None:
    """Rank 0 persisted step 10, died and did it again; rank 1 only ever persisted the first."""
    OneRank(tmp_path, seed=1, generation=1, rank=0, world_size=2).persist(10)
    OneRank(tmp_path, seed=1, generation=1, rank=1, world_size=2).persist(10)
    again = OneRank(tmp_path, seed=2, generation=2, rank=0, world_size=2)
    assert kinds(again.persist(10)) == [StoreEventKind.PERSISTED]
    assert disk.committed_steps(again.run_dir) == []


def test_a_sidecar_that_is_garbled_or_anothers_stops_the_commit(tmp_path: Path) -> None:
    for step, words in ((10, "cut off or garbled"), (20, "describes another shard")):
        ranks = [OneRank(tmp_path, seed=1, rank=rank, world_size=2) for rank in range(2)]
        ranks[0].persist(step)
        ranks[1].persist(step)
        folder = disk.step_dir(ranks[0].run_dir, step)
        garbage = (folder / "g1-rank00000.json").read_bytes()[: 200 if step == 10 else None]
        (folder / "g1-rank00001.json").write_bytes(garbage)
        events = ranks[0].store.commit_pending()
        assert kinds(events) == [StoreEventKind.FAILED]
        assert words in events[0].detail
    assert disk.committed_steps(ranks[0].run_dir) == []


def test_a_header_that_contradicts_its_control_block_is_not_persisted(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.manager.rank = 1
    assert kinds(run.persist(10)) == [StoreEventKind.FAILED]
    assert files(run) == set()


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.store = NodeStore(run.ram_dir, run.run_dir, keep_last=2, keep_every_steps=30)
    for step in range(10, 80, 10):
        run.persist(step)
    assert disk.committed_steps(run.run_dir) == [70, 60, 30]
    assert disk.all_steps(run.run_dir) == [70, 60, 30]


def test_retention_does_not_count_a_damaged_snapshot(tmp_path: Path, run: OneRank) -> None:
    """keep_last is 2: with 20 visibly damaged, 10 stays beside 30, for it is the only other whole one."""
    remove_shard(run)
    run.persist(30)
    assert verify_snapshot(run.run_dir, 10) == []
    run.persist(40)
    assert disk.committed_steps(run.run_dir) == [40, 30]


def test_what_a_run_went_back_behind_does_not_crowd_out_what_it_saves_now(tmp_path: Path) -> None:
    """Steps 40 and 50 rotted in silence and the run went on from 30: 35 is committed, and must survive that."""
    old = OneRank(tmp_path, seed=1)
    for step in (30, 40, 50):
        old.store = NodeStore(old.ram_dir, old.run_dir, keep_last=5)
        old.persist(step)
    for step in (40, 50):
        path = next(disk.step_dir(old.run_dir, step).glob("*.safetensors"))
        flip_byte(path, path.stat().st_size - 1)
    again = OneRank(tmp_path, seed=2, generation=2)
    again.load()
    again.persist(35)
    again.persist(37)
    assert disk.committed_steps(again.run_dir) == [37, 35]
    assert verify_snapshot(again.run_dir, 37) == verify_snapshot(again.run_dir, 35) == []


def test_a_retry_that_fails_takes_nothing_back(tmp_path: Path) -> None:
    """Another rank's failure makes all persist again: a shard that is committed stays, also when the disk is full."""
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    run.stage(10, persist=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_288, hard))
    try:
        events = run.store.persist_pending()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kinds(events) == [StoreEventKind.FAILED]
    assert verify_snapshot(run.run_dir, 10) == []


def test_memory_that_changed_after_staging_is_not_persisted(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(10, persist=True)
    slot = next(s for s in run.manager._slots if s.segment.state is SlotState.TO_PERSIST)
    flip_byte(slot.segment.path, CONTROL_BYTES + 20_000)
    events = run.store.persist_pending()
    assert kinds(events) == [StoreEventKind.FAILED]
    assert "have changed since they were staged" in events[0].detail
    assert files(run) == set()
    assert not run.manager.persist_busy
    assert run.manager.newest_complete is None


def test_a_garbled_control_block_does_not_block_the_worker(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(10, persist=True)
    slot = next(s for s in run.manager._slots if s.segment.state is SlotState.TO_PERSIST)
    flip_byte(slot.segment.path, 20)
    assert kinds(run.store.persist_pending()) == [StoreEventKind.FAILED]
    assert not run.manager.persist_busy


def test_a_full_disk_is_one_event_and_training_goes_on(tmp_path: Path, small_disk: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.store.run_dir = run.run_dir = run.manager.run_dir = small_disk
    assert kinds(run.persist(10)) == [StoreEventKind.PERSISTED, StoreEventKind.COMMITTED]
    before = files(run)
    (small_disk / "hog").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 8192))
    events = run.persist(20)
    assert kinds(events) == [StoreEventKind.FAILED]
    assert events[0].step == 20
    assert "No space left on device" in events[0].detail
    assert "\n" not in events[0].detail
    assert files(run) == before, "partial files are gone, the good snapshot stays"
    assert not run.manager.persist_busy, "the slot is the worker's again"
    (small_disk / "hog").unlink()
    run.change()
    assert kinds(run.persist(30)) == [StoreEventKind.PERSISTED, StoreEventKind.COMMITTED]
    assert verify_snapshot(small_disk, 30) == []


def test_a_file_size_limit_is_one_event_too(tmp_path: Path) -> None:
    """The same without root: the limit strikes in the middle of the shard."""
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    before = files(run)
    run.stage(20, persist=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_288, hard))
    try:
        events = run.store.persist_pending()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kinds(events) == [StoreEventKind.FAILED]
    assert "File too large" in events[0].detail
    assert files(run) == before
    assert run.manager.newest_complete == 20, "memory still has it"


def test_ranks_that_can_write_do_not_fill_the_disk_for_one_that_cannot(tmp_path: Path) -> None:
    """Rank 1 never persists, so nothing is committed: of rank 0's shards the last two stay."""
    run = OneRank(tmp_path, seed=1, rank=0, world_size=2)
    for step in range(10, 70, 10):
        run.stage(step, persist=True)
        run.store.persist_pending()
    assert {name for name in files(run) if name.endswith(".safetensors")} == {
        "step-50/g1-rank00000.safetensors", "step-60/g1-rank00000.safetensors"
    }  # fmt: skip


def test_the_background_thread_persists_flushes_and_stops(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    events: list[StoreEvent] = []
    persister = Persister(run.store, events.append, poll_interval_s=0.01).start()
    for step in (10, 20, 30):
        run.change()
        run.stage(step, persist=True)
        assert persister.flush(timeout_s=30)
        assert not run.manager.persist_busy
    assert persister.stop()
    assert kinds(events) == [StoreEventKind.PERSISTED, StoreEventKind.COMMITTED] * 3
    assert disk.committed_steps(run.run_dir) == [30, 20]
    run.stage(40, persist=True)
    assert not persister.flush(timeout_s=30), "a stopped thread flushes nothing, and says so at once"


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, run: OneRank) -> None:
    manifest = disk.read_manifest(run.run_dir, 20)
    outside = tmp_path / "secret"
    outside.write_bytes(shard_path(run, 20).read_bytes())
    bad = msgspec.structs.replace(manifest.shards[0], file="../../../secret")
    document = encode_document(msgspec.structs.replace(manifest, shards=(bad,)))
    (run.run_dir / "checkpoints/step-20/manifest.json").write_bytes(document)
    loaded = OneRank(tmp_path, seed=2, generation=2).load()
    assert loaded is not None
    assert loaded.step == 10
    assert "names a file that is not a shard's" in loaded.rejections[0].reason


def test_sample_states_differ() -> None:
    """The comparisons above mean something."""
    a, b = sample_tensors(1), sample_tensors(2)
    assert not any(same_bits(a[name], b[name]) for name in a if a[name].numel())


class _HeldUp(NodeStore):
    """An agent that is stopped right before it writes a manifest, and goes on after `meanwhile`."""

    meanwhile: Callable[[], object]

    def _arrived(self, awaited: Any) -> Any:
        shards = super()._arrived(awaited)
        self.meanwhile()
        return shards


def test_an_orphan_that_wakes_up_cannot_put_its_manifest_over_its_successors(tmp_path: Path) -> None:
    """The successor's commit removes the orphan's shards: the orphan's manifest would leave the step without any."""
    for name in ("orphan", "successor"):
        (tmp_path / name).mkdir()
    orphan = OneRank(tmp_path / "orphan", seed=1)
    successor = OneRank(tmp_path / "successor", seed=2, generation=2)
    successor.run_dir = successor.manager.run_dir = orphan.run_dir
    successor.store = NodeStore(successor.ram_dir, orphan.run_dir)
    held_up = _HeldUp(orphan.ram_dir, orphan.run_dir)
    held_up.meanwhile = lambda: successor.persist(10)
    orphan.stage(10, persist=True)
    held_up.persist_pending()
    [event] = held_up.commit_pending()
    assert event.kind is StoreEventKind.FAILED
    assert "a newer one has committed this step" in event.detail
    assert disk.read_generation(orphan.run_dir, 10) == 2
    assert verify_snapshot(orphan.run_dir, 10) == []


def test_a_pull_does_not_replace_what_a_running_job_commits_meanwhile(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    path = disk.step_dir(run.run_dir, 10) / "manifest.json"
    pulled, data = disk.read_manifest(run.run_dir, 10), path.read_bytes()
    OneRank(tmp_path, seed=2, generation=2).persist(10)
    with pytest.raises(OSError, match="generation 2 has committed it meanwhile"):
        commit_pulled(run.run_dir, pulled, data)
    assert disk.read_generation(run.run_dir, 10) == 2
    assert verify_snapshot(run.run_dir, 10) == []


def test_of_many_that_create_a_file_one_does_and_none_mixes_in(tmp_path: Path) -> None:
    """Agents on several nodes write `latest` and manifests with nothing between them but the file system."""
    with ThreadPoolExecutor(4) as pool:
        for number in range(30):
            path = tmp_path / f"created-{number}"
            texts = [bytes([65 + writer]) * (1 << 16) for writer in range(4)]
            first = list(pool.map(disk.create_atomic, [path] * 4, texts))
            assert first.count(True) == 1
            assert path.read_bytes() == texts[first.index(True)]
            list(pool.map(disk.write_atomic, [path] * 4, texts))
            assert path.read_bytes() in texts
    assert all(path.name.startswith("created-") and path.suffix == "" for path in tmp_path.iterdir())
