"""Promises of the commit in the bucket: one manifest a step, whole, and no orphan ever overwrites its successor."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from checkpointing.disk import step_dir
from checkpointing.layout import Manifest, encode_document
from checkpointing.s3 import Bucket
from checkpointing.s3_retention import carry_out, keep_house, plan_removal
from configs.schema import S3Config
from tests.s3_helpers import QUICK, commit, make_bucket, problems, send, write_snapshot
from tests.s3server import S3Server

pytestmark = pytest.mark.distributed


def test_a_snapshot_is_committed_only_when_all_its_shards_are_there(s3: S3Server, tmp_path: Path) -> None:
    """With one shard missing, or another in its place, there is no manifest; and it says which one."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10)
    send(bucket, tmp_path, manifest, ranks=[1])
    refusal = bucket.refusal(manifest, encode_document(manifest))
    assert refusal is not None
    assert not refusal.final
    assert "g1-rank00000.safetensors not there" in refusal.why
    wrong = write_snapshot(tmp_path / "other", 11)
    path = step_dir(tmp_path / "other", 11) / wrong.shards[0].file
    bucket.upload(path, 10, manifest.shards[0].file)  # as many bytes, others
    assert not commit(bucket, tmp_path, manifest)
    assert bucket.committed() == []
    send(bucket, tmp_path, manifest, ranks=[0])
    assert commit(bucket, tmp_path, manifest)
    assert commit(bucket, tmp_path, manifest)  # once more is the same
    assert problems(bucket, 10) == []


def test_of_racing_writers_one_wins(s3: S3Server, tmp_path: Path) -> None:
    """Eight manifests of the same generation at once: one is there afterwards, and only its writer was told so."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10)
    send(bucket, tmp_path, manifest)
    rivals = [msgspec.structs.replace(manifest, t_wall_s=float(number)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda rival: bucket.commit(rival, encode_document(rival)), rivals))
    assert won.count(True) == 1
    assert bucket.manifest(10) == encode_document(rivals[won.index(True)])


def test_of_racing_generations_the_newest_wins(s3: S3Server, tmp_path: Path) -> None:
    """However they interleave, the newest generation's manifest is there in the end, and it was told so."""
    bucket = make_bucket(s3)
    manifests = [write_snapshot(tmp_path / str(generation), 10, generation) for generation in range(1, 7)]
    for manifest in manifests:
        send(bucket, tmp_path / str(manifest.generation), manifest)
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda m: commit(bucket, tmp_path / str(m.generation), m), manifests))
    assert won[-1]
    assert bucket.manifest(10) == encode_document(manifests[-1])
    assert problems(bucket, 10) == []


def test_an_older_generation_is_refused_everywhere(s3: S3Server, tmp_path: Path) -> None:
    """Also at a step that the newer one has not got; and a newer one takes over the step of an older one."""
    bucket = make_bucket(s3)
    old, new = write_snapshot(tmp_path / "old", 10, 1), write_snapshot(tmp_path / "new", 10, 2)
    late = write_snapshot(tmp_path / "old", 30, 1)
    for run_dir, manifest in ((tmp_path / "old", old), (tmp_path / "new", new), (tmp_path / "old", late)):
        send(bucket, run_dir, manifest)
    assert commit(bucket, tmp_path / "old", old)
    assert commit(bucket, tmp_path / "new", new)
    assert not commit(bucket, tmp_path / "old", old)
    refusal = bucket.refusal(late, encode_document(late))
    assert refusal is not None
    assert refusal.final
    assert "generation 2" in refusal.why
    assert bucket.committed() == [(2, 10)]
    assert problems(bucket, 10) == []


@pytest.mark.parametrize("held_up", ["before its commit", "within its commit"])
@pytest.mark.parametrize("orphan_step", [20, 40])
def test_a_real_orphan_cannot_overwrite_its_successor(
    s3: S3Server, tmp_path: Path, orphan_step: int, held_up: str
) -> None:
    """A process of generation 1 has sent its shards and is stopped, before it commits or right after it has looked for
    newer generations. Generation 2 commits steps 20 and 30. The orphan goes on: its commit is refused, at the same
    step and at a later one, and nothing of its successor's is lost, not even when it keeps house.
    """
    bucket = make_bucket(s3)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    orphan = multiprocessing.get_context("spawn").Process(
        target=_orphan, args=(bucket.settings, tmp_path / "old", orphan_step, held_up, theirs), daemon=True
    )
    orphan.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == held_up
        assert orphan.pid is not None
        os.kill(orphan.pid, signal.SIGSTOP)
        for step in (20, 30):
            manifest = write_snapshot(tmp_path / "new", step, 2)
            send(bucket, tmp_path / "new", manifest)
            assert commit(bucket, tmp_path / "new", manifest)
        os.kill(orphan.pid, signal.SIGCONT)
        ours.send("go on")
        assert ours.poll(60)
        done, removed = ours.recv()
    finally:
        orphan.kill()
        orphan.join()
    assert not done
    assert removed == [10]  # its own, which two newer ones have made needless
    assert bucket.committed() == [(2, 30), (2, 20)]
    assert problems(bucket, 20) == []
    assert problems(bucket, 30) == []


def test_an_orphan_does_not_remove_what_was_replaced_meanwhile(s3: S3Server, tmp_path: Path) -> None:
    """It has decided to remove a snapshot of its own; before it does, the successor has put one in its place."""
    bucket = make_bucket(s3)
    for step in (10, 20, 30):
        manifest = write_snapshot(tmp_path / "old", step, 1)
        send(bucket, tmp_path / "old", manifest)
        assert commit(bucket, tmp_path / "old", manifest)
    plan = plan_removal(bucket.files(), bucket.manifests(), bucket.settings, ())
    assert list(plan.manifests) == [10]
    successor = write_snapshot(tmp_path / "new", 10, 2)
    send(bucket, tmp_path / "new", successor)
    assert commit(bucket, tmp_path / "new", successor)
    assert carry_out(bucket, plan) == []
    assert bucket.committed()[0] == (2, 10)
    assert problems(bucket, 10) == []


def _orphan(settings: S3Config, run_dir: Path, step: int, held_up: str, pipe: Connection) -> None:
    """Uploads and commits step 10, uploads `step`, waits to be stopped, commits and keeps house."""
    bucket = _Pausing(settings, "run", QUICK)
    first = write_snapshot(run_dir, 10, 1)
    send(bucket, run_dir, first)
    assert commit(bucket, run_dir, first)
    manifest = write_snapshot(run_dir, step, 1)
    send(bucket, run_dir, manifest)
    if held_up == "before its commit":
        pipe.send(held_up)
        pipe.recv()
    else:
        bucket.pipe = pipe
    done = commit(bucket, run_dir, manifest)
    pipe.send((done, keep_house(bucket, set())))
    pipe.close()


class _Pausing(Bucket):
    """A bucket that says when it has looked for newer generations, and waits there to be stopped."""

    pipe: Connection | None = None

    def manifests(self) -> dict[int, Manifest]:
        found = super().manifests()
        if self.pipe is not None:
            self.pipe.send("within its commit")
            self.pipe.recv()
            self.pipe = None
        return found
