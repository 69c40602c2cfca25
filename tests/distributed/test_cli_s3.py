"""Promises of `everstep checkpoint` with a real S3 server: whole snapshots go there and come back, manifest last."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpointing import disk
from checkpointing.verify import verify_snapshot
from cluster.cli import dispatch
from configs.load import load_job, resolve_toml
from tests.checkpoint_helpers import OneRank, flip_byte
from tests.s3server import S3Server

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a bucket, and steps 10 and 20 in its run directory."""
    monkeypatch.chdir(tmp_path)
    bucket = ["--s3.bucket", s3.create_bucket(), "--s3.endpoint", s3.endpoint]
    one = OneRank(tmp_path, seed=1)
    (one.run_dir / "config.toml").write_text(resolve_toml(load_job("debug_dense", ["--run.name", "run", *bucket])))
    one.persist(10)
    one.persist(20)
    return one.run_dir


def checkpoint(*arguments: str) -> int:
    return dispatch(["checkpoint", *arguments, "--dir", "."])


def damage(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 1)


def shard(run: Path, step: int) -> Path:
    return disk.step_dir(run, step) / "g1-rank00000.safetensors"


def test_a_snapshot_goes_to_the_bucket_and_comes_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("push", "run", "--step", "10") == 0
    assert checkpoint("push", "run") == 0
    assert checkpoint("push", "run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "step 20: in S3 (0 bytes sent)"
    before = {path.name: path.read_bytes() for path in disk.step_dir(run, 20).glob("*.safetensors")}
    shutil.rmtree(run / "checkpoints")
    assert checkpoint("ls", "run") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["s3", "20", "1"], ["s3", "10", "1"]]
    assert checkpoint("pull", "run") == 0
    assert disk.committed_steps(run) == [20]
    assert verify_snapshot(run, 20) == []
    assert {path.name: path.read_bytes() for path in disk.step_dir(run, 20).glob("*.safetensors")} == before
    assert checkpoint("pull", "run", "--step", "11") == 1
    assert "S3 has no snapshot of step 11; it has 20, 10" in capsys.readouterr().err


def test_a_damaged_snapshot_is_not_pushed_and_is_repaired_from_the_bucket(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint("push", "run", "--step", "20") == 0
    damage(shard(run, 10))
    assert checkpoint("push", "run", "--step", "10") == 1
    assert "step-10/g1-rank00000.safetensors" in capsys.readouterr().err
    damage(shard(run, 20))
    assert checkpoint("repair", "run", "--step", "20") == 0
    assert "fetched from S3" in capsys.readouterr().out
    assert verify_snapshot(run, 20) == []
    assert checkpoint("repair", "run") == 1
    assert "S3 has no step-10/g1-rank00000.safetensors" in capsys.readouterr().out


def test_rm_in_the_bucket_keeps_the_last_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("10", "20"):
        assert checkpoint("push", "run", "--step", step) == 0
    assert checkpoint("rm", "run", "10", "20", "--where", "s3", "--yes") == 2
    assert "no good snapshot would be left in S3" in capsys.readouterr().err
    assert checkpoint("rm", "run", "10", "--where", "s3", "--yes") == 0
    assert checkpoint("pull", "run", "--step", "10") == 1
    assert disk.committed_steps(run) == [20, 10], "the run directory is another place"


def test_rm_in_the_bucket_counts_only_what_is_whole_and_removes_only_ours(
    run: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 10 has lost a shard there: it is no reason to let step 20 go."""
    for step in ("10", "20"):
        assert checkpoint("push", "run", "--step", step) == 0
    client, bucket = s3.client(), load_job(run / "config.toml").s3.bucket
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]]
    [lost] = [key for key in keys if key.endswith("step-10/g1-rank00000.safetensors")]
    client.delete_object(Bucket=bucket, Key=lost)
    assert checkpoint("rm", "run", "20", "--where", "s3", "--yes") == 2
    assert "no good snapshot would be left in S3" in capsys.readouterr().err
    note = lost.replace("g1-rank00000.safetensors", "a note")
    client.put_object(Bucket=bucket, Key=note, Body=b"of somebody else")
    assert checkpoint("rm", "run", "10", "--where", "s3", "--yes") == 0
    left = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert [key for key in left if "step-10" in key] == [note]


def test_a_push_that_would_be_refused_sends_nothing(
    run: Path, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = shutil.copytree(run / "checkpoints", tmp_path / "kept")
    OneRank(tmp_path, seed=2, generation=2).persist(20)
    assert checkpoint("push", "run", "--step", "20") == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(kept, run / "checkpoints")
    assert checkpoint("push", "run", "--step", "10") == 2
    assert "S3 has snapshots of generation 2: generation 1 may not commit any more" in capsys.readouterr().err
    bucket = load_job(run / "config.toml").s3.bucket
    assert not [e for e in s3.client().list_objects_v2(Bucket=bucket)["Contents"] if "g1-" in e["Key"]]


def test_nothing_is_imported_beside_snapshots_in_the_bucket(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job would go on from those, and the import would never be looked at."""
    assert checkpoint("push", "run", "--step", "20") == 0
    config = (run / "config.toml").rename(tmp_path / "job.toml")
    shutil.rmtree(run)
    command = ["checkpoint", "import", "nowhere", str(config), "--format", "hf", "--run.dir", str(tmp_path)]
    assert dispatch(command) == 2
    assert "S3 has snapshots of a run run already, step 20" in capsys.readouterr().err


def test_an_unreachable_bucket_is_said_and_the_rest_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away = ("--s3", "s3://bucket/prefix", "--endpoint", "http://127.0.0.1:9")
    assert checkpoint("ls", "run", *away) == 1
    out = capsys.readouterr().out
    assert "S3 cannot be reached" in out
    assert "20" in out
    assert checkpoint("pull", "run", *away) == 1
    assert "Traceback" not in capsys.readouterr().err
