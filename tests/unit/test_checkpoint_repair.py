"""Promises of repair: a bad shard is replaced from the nearest whole copy, or else the step before is loaded."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpointing import disk
from checkpointing.candidates import any_snapshot
from checkpointing.layout import MANIFEST_NAME, Shard
from checkpointing.maintenance import pull_snapshot
from checkpointing.manager import LoadedSnapshot, NoSnapshotError
from checkpointing.node_disk import NodeDisk
from checkpointing.repair import Repair
from checkpointing.run_source import RunSource
from checkpointing.segment import PersistTo
from checkpointing.sources import ShardSource, SnapshotSource, SourceError
from checkpointing.store import NodeStore
from checkpointing.verify import list_snapshots, verify_snapshot
from tests.checkpoint_helpers import OneRank, flip_byte


class Unreachable:
    """A bucket behind a network that is down."""

    name = "S3"

    def committed(self) -> list[tuple[int, int]]:
        raise SourceError("connection refused")

    def anything(self) -> bool:
        raise SourceError("connection refused")

    def manifest(self, step: int) -> bytes:
        raise SourceError("connection refused")

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        raise SourceError("connection refused")


class Outcome:
    """A load and all that it said."""

    def __init__(
        self, run: OneRank, sources: Sequence[ShardSource] = (), far: SnapshotSource | None = None,
        rejected: Collection[tuple[int, int]] = (), scratch_dir: Path | None = None, ram_step: int = -1,
    ) -> None:  # fmt: skip
        self.run = run
        self.repairs: list[Repair] = []
        self.troubles: list[str] = []
        self.rejections: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.loaded: LoadedSnapshot | None = run.manager.load(
            ram_step, lambda ok: ok, lambda values: values, lambda r: self.rejections.append(r.reason),
            sources=sources, far=far, rejected=rejected, scratch_dir=scratch_dir, repaired=self.repairs.append,
            trouble=self.troubles.append, progress=lambda done, total: self.progress.append((done, total)),
        )  # fmt: skip

    @property
    def age(self) -> tuple[int, int]:
        assert self.loaded is not None
        return self.loaded.generation, self.loaded.step


@pytest.fixture
def run(tmp_path: Path) -> OneRank:
    """Steps 10 (the state of seed 1) and 20 (of seed 2) committed, and on the node's disk; a backup beside it."""
    for seed, step in ((1, 10), (2, 20)):
        run = OneRank(tmp_path, seed=seed)
        run.store = NodeStore(run.ram_dir, run.run_dir, node_dir=tmp_path / "node")
        run.manager.stage(step, PersistTo.RUN | PersistTo.NODE, {"step": step})
        run.manager.wait()
        run.store.persist_pending()
        run.store.commit_pending()
        run.store.verify_pending()
        run.store.close()
    shutil.copytree(run.run_dir, tmp_path / "backup")
    return run


def shard(root: Path, step: int, generation: int = 1) -> Path:
    return root / f"checkpoints/step-{step}/g{generation}-rank00000.safetensors"


def flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 1)


def again(tmp_path: Path) -> OneRank:
    return OneRank(tmp_path, seed=9, generation=2)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda p: os.truncate(p, 100)], ids=["flipped", "missing", "cut"]
)
def test_a_bad_shard_is_repaired_in_place_from_the_nearest_copy(tmp_path: Path, run: OneRank, damage: Any) -> None:
    damage(shard(run.run_dir, 20))
    got = Outcome(again(tmp_path), [NodeDisk(tmp_path / "node"), RunSource(tmp_path / "backup")])
    assert got.age == (1, 20)
    assert got.rejections == []
    assert got.run.equals(seed=2)
    [repair] = got.repairs
    assert (repair.step, repair.file, repair.source) == (20, "g1-rank00000.safetensors", "the node's disk")
    assert repair.reason.startswith("step-20/g1-rank00000.safetensors: ")
    assert repair.in_place
    assert verify_snapshot(run.run_dir, 20) == []


def test_a_damaged_copy_is_passed_over_for_the_next(tmp_path: Path, run: OneRank) -> None:
    flip(shard(run.run_dir, 20))
    flip(tmp_path / "node/step-20/g1-rank00000.safetensors")
    got = Outcome(again(tmp_path), [NodeDisk(tmp_path / "node"), Unreachable()], RunSource(tmp_path / "backup"))
    assert got.age == (1, 20)
    assert [r.source for r in got.repairs] == [str(tmp_path / "backup")]
    assert got.run.equals(seed=2)


def test_with_no_whole_copy_the_step_before_is_loaded_and_every_source_is_named(tmp_path: Path, run: OneRank) -> None:
    for path in (shard(run.run_dir, 20), tmp_path / "node/step-20/g1-rank00000.safetensors"):
        flip(path)
    shard(tmp_path / "backup", 20).unlink()
    before = shard(run.run_dir, 20).read_bytes()
    got = Outcome(again(tmp_path), [NodeDisk(tmp_path / "node"), Unreachable()], RunSource(tmp_path / "backup"))
    assert got.age == (1, 10)
    assert got.run.equals(seed=1)
    [reason] = got.rejections
    for words in ("step-20/g1-rank00000.safetensors: checksum", "the node's disk: what came is not the shard",
                  "S3: connection refused", f"{tmp_path / 'backup'}: No such file"):  # fmt: skip
        assert words in reason
    assert "\n" not in reason
    assert got.repairs == []
    assert shard(run.run_dir, 20).read_bytes() == before
    assert not list(run.run_dir.rglob("*.tmp"))
    assert not list_snapshots(run.run_dir)[0].verified, "a snapshot that was refused no longer counts as verified"


def test_a_snapshot_that_only_the_bucket_has_is_pulled_manifest_last(tmp_path: Path, run: OneRank) -> None:
    shutil.rmtree(run.run_dir / "checkpoints")
    assert any_snapshot(run.run_dir, RunSource(tmp_path / "backup"))
    got = Outcome(again(tmp_path), far=RunSource(tmp_path / "backup"))
    assert got.age == (1, 20)
    assert got.run.equals(seed=2)
    assert verify_snapshot(run.run_dir, 20) == []
    name = f"checkpoints/step-20/{MANIFEST_NAME}"
    assert (run.run_dir / name).read_bytes() == (tmp_path / "backup" / name).read_bytes()
    assert [(s.step, s.verified) for s in list_snapshots(run.run_dir)] == [(20, True)]


def test_what_is_being_pulled_is_no_leftover(tmp_path: Path, run: OneRank) -> None:
    """The node's agent writes and tidies meanwhile; shards without a manifest would pass for something abandoned."""
    shutil.rmtree(run.run_dir / "checkpoints/step-10")
    later = OneRank(tmp_path, seed=3, generation=2)

    class Busy(RunSource):
        def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
            super().fetch(step, generation, shard, into)
            for step in (30, 40, 50):
                later.persist(step)

    shutil.rmtree(tmp_path / "backup/checkpoints/step-20")
    repairs: list[Repair] = []
    assert pull_snapshot(run.run_dir, 10, Busy(tmp_path / "backup"), [], repairs.append, lambda a, b: None) == []
    assert verify_snapshot(run.run_dir, 10) == []
    assert not (run.run_dir / "checkpoints/step-10" / disk.PULLING_NAME).exists()
    later.persist(60)
    assert disk.committed_steps(run.run_dir) == [60, 50], "once it is there it is kept like any other"


def test_a_snapshot_of_the_bucket_that_cannot_be_had_leaves_no_manifest(tmp_path: Path, run: OneRank) -> None:
    shutil.rmtree(run.run_dir / "checkpoints/step-20")
    flip(shard(tmp_path / "backup", 20))
    got = Outcome(again(tmp_path), far=RunSource(tmp_path / "backup"))
    assert got.age == (1, 10)
    assert disk.committed_steps(run.run_dir) == [10]


def test_a_damaged_manifest_is_replaced_from_the_bucket(tmp_path: Path, run: OneRank) -> None:
    os.truncate(run.run_dir / f"checkpoints/step-20/{MANIFEST_NAME}", 100)
    got = Outcome(again(tmp_path), far=RunSource(tmp_path / "backup"))
    assert got.age == (1, 20)
    assert verify_snapshot(run.run_dir, 20) == []


def test_newest_means_of_the_latest_generation(tmp_path: Path, run: OneRank) -> None:
    """The run went on from 10 in generation 2 and made 15: that is newer than the 20 of the history given up."""
    later = OneRank(tmp_path, seed=3, generation=2)
    later.persist(15)
    later.store.close()
    assert [(s.generation, s.step) for s in list_snapshots(run.run_dir)] == [(2, 15), (1, 20)]
    assert (run.run_dir / "checkpoints/latest").read_text() == "step-15\n"
    got = Outcome(OneRank(tmp_path, seed=9, generation=3))
    assert got.age == (2, 15)
    assert got.run.equals(seed=3)


def test_near_and_far_are_merged_by_generation_and_step(tmp_path: Path, run: OneRank) -> None:
    """The bucket has 20 of a later generation than the run directory, which has lost it."""
    later = OneRank(tmp_path, seed=3, generation=2)
    later.run_dir = later.manager.run_dir = later.store.run_dir = tmp_path / "far"
    later.store = NodeStore(later.ram_dir, tmp_path / "far")
    later.persist(20)
    later.store.close()
    got = Outcome(OneRank(tmp_path, seed=9, generation=3), far=RunSource(tmp_path / "far"))
    assert got.age == (2, 20)
    assert got.run.equals(seed=3)
    assert disk.read_generation(run.run_dir, 20) == 2, "what was pulled takes the older one's place"
    flip(shard(run.run_dir, 20, 2))
    flip(shard(tmp_path / "far", 20, 2))
    assert Outcome(OneRank(tmp_path, seed=9, generation=3), far=RunSource(tmp_path / "far")).age == (1, 10)


def test_an_older_history_in_the_bucket_never_replaces_a_manifest(tmp_path: Path, run: OneRank) -> None:
    later = OneRank(tmp_path, seed=3, generation=2)
    later.persist(20)
    later.store.close()
    shutil.rmtree(run.run_dir / "checkpoints/step-10", ignore_errors=True)
    flip(shard(run.run_dir, 20, 2))
    got = Outcome(OneRank(tmp_path, seed=9, generation=3), far=RunSource(tmp_path / "backup"))
    assert got.age == (1, 20)
    assert got.run.equals(seed=2)
    assert disk.read_generation(run.run_dir, 20) == 2


def test_rejected_snapshots_are_loaded_from_nowhere(tmp_path: Path, run: OneRank) -> None:
    got = Outcome(again(tmp_path), far=RunSource(tmp_path / "backup"), rejected=[(1, 20)])
    assert got.age == (1, 10)
    staged = again(tmp_path)
    staged.stage(30)
    got = Outcome(staged, rejected=[(2, 30)], ram_step=30)
    assert got.age == (1, 20)
    assert "rejected before" in got.rejections[0]
    assert staged.manager.newest_complete is None
    with pytest.raises(NoSnapshotError, match="2 more had been rejected before"):
        Outcome(again(tmp_path), far=RunSource(tmp_path / "backup"), rejected=[(1, 20), (1, 10)])


def test_without_the_bucket_what_is_near_will_do_and_that_is_said(tmp_path: Path, run: OneRank) -> None:
    got = Outcome(again(tmp_path), far=Unreachable())
    assert got.age == (1, 20)
    assert got.troubles == [
        "S3 cannot be reached, going on with the snapshots in the run directory: connection refused"
    ]


def test_nothing_near_and_no_bucket_is_no_reason_to_begin_again(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    with pytest.raises(NoSnapshotError, match=r"has no snapshot, and whether S3 has one is not known"):
        Outcome(run, far=Unreachable())
    with pytest.raises(SourceError, match=r"has no snapshot, and whether S3 has one is not known"):
        any_snapshot(run.run_dir, Unreachable())
    assert not any_snapshot(run.run_dir, None)
    assert not any_snapshot(run.run_dir, RunSource(tmp_path / "nothing"))
    assert Outcome(run, far=RunSource(tmp_path / "nothing")).loaded is None


def test_damaged_manifests_far_away_are_no_reason_to_begin_again(tmp_path: Path) -> None:
    """Promise: where there was a run, and nothing of it can be read any more, a person has to decide."""
    run, far = OneRank(tmp_path, seed=1), RunSource(tmp_path / "backup")
    manifest = tmp_path / "backup" / "checkpoints" / "step-10" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("no manifest")
    assert any_snapshot(run.run_dir, far)
    with pytest.raises(NoSnapshotError, match="damaged"):
        Outcome(run, far=far)


@pytest.fixture
def frozen(tmp_path: Path, run: OneRank) -> Iterator[Path]:
    """The run directory on a read-only disk, its step 20 damaged."""
    flip(shard(run.run_dir, 20))
    path = str(run.run_dir)
    if subprocess.run(["mount", "--bind", path, path], capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
    yield run.run_dir
    subprocess.run(["umount", "-l", path], check=True)


def test_a_read_only_run_directory_does_not_stop_a_repair(tmp_path: Path, frozen: Path) -> None:
    with pytest.raises(OSError) as refused:
        (frozen / "new").touch()
    assert refused.value.errno == errno.EROFS
    scratch = tmp_path / "scratch"
    got = Outcome(again(tmp_path), [NodeDisk(tmp_path / "node")], scratch_dir=scratch)
    assert got.age == (1, 20)
    assert got.run.equals(seed=2)
    assert [r.in_place for r in got.repairs] == [False]
    assert list(scratch.iterdir()) == [], "nothing stays behind"


def test_a_full_run_directory_does_not_stop_a_pull(tmp_path: Path, run: OneRank, small_disk: Path) -> None:
    """No room for the shard: it is read from a temporary file, and the run directory gets no manifest without it."""
    other = again(tmp_path)
    other.run_dir = other.manager.run_dir = small_disk
    (small_disk / "hog").write_bytes(b"x" * 90_000)
    got = Outcome(other, far=RunSource(tmp_path / "backup"))
    assert got.age == (1, 20)
    assert got.run.equals(seed=2)
    assert disk.committed_steps(small_disk) == []
    assert not [p for p in small_disk.rglob("*") if p.is_file() and p.name != "hog"]


def test_a_full_run_directory_is_named_and_not_the_source(tmp_path: Path, run: OneRank, small_disk: Path) -> None:
    (small_disk / "hog").write_bytes(b"x" * 90_000)
    far = RunSource(tmp_path / "backup")
    [problem] = pull_snapshot(small_disk, 20, far, [], lambda repair: None, lambda done, total: None)
    assert f"{far.name}: not copied to {small_disk}/checkpoints/step-20: No space left on device" in problem
    assert not (disk.step_dir(small_disk, 20) / MANIFEST_NAME).exists()


def test_what_a_killed_load_left_is_removed_by_the_next(tmp_path: Path, frozen: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    abandoned = tmp_path / f"scratch/everstep-load-{gone.pid}-x"
    alive = tmp_path / f"scratch/everstep-load-{os.getpid()}-x"
    abandoned.mkdir(parents=True)
    alive.mkdir()
    Outcome(again(tmp_path), [NodeDisk(tmp_path / "node")], scratch_dir=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == [alive]


def test_progress_never_says_more_than_there_is(tmp_path: Path, run: OneRank) -> None:
    flip(shard(run.run_dir, 20))
    got = Outcome(again(tmp_path), [NodeDisk(tmp_path / "node")])
    assert got.progress
    assert all(0 < done <= total for done, total in got.progress)
    assert [done for done, _ in got.progress] == sorted(done for done, _ in got.progress)
