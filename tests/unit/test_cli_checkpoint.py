"""Promises of `everstep checkpoint`: exit codes that scripts can use, words that a person can act on, no surprises."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import disk
from checkpointing.compare import Finding, compare_snapshots, pieces
from checkpointing.segment import PersistTo
from checkpointing.staged import staged_folder
from checkpointing.store import NodeStore
from checkpointing.verify import verify_snapshot
from cluster.cli import dispatch
from cluster.cli_checkpoint import tidy_when_terminated
from cluster.rundir import RunDir
from configs.load import load_job, resolve_toml
from tests.checkpoint_helpers import OneRank, flip_byte


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OneRank:
    """A run called `run` in the current folder, with steps 10 and 20 in the run directory and on the node's disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run").mkdir()
    config = load_job("debug_dense", ["--run.name", "run"])
    config = msgspec.structs.replace(
        config, checkpoint=msgspec.structs.replace(config.checkpoint, node_dir=str(tmp_path / "disk"))
    )
    (tmp_path / "runs/run/config.toml").write_text(resolve_toml(config))
    return persist(tmp_path, {10: 1, 20: 2})


def persist(tmp_path: Path, seeds: dict[int, int], generation: int = 1) -> OneRank:
    run_dir = RunDir(tmp_path / "runs/run")
    for step, seed in seeds.items():
        run = OneRank(tmp_path, seed=seed, generation=generation)
        run.run_dir = run.manager.run_dir = run_dir.path
        run.store = NodeStore(
            run.ram_dir, run.run_dir, keep_last=9, node_dir=run_dir.node_root(str(tmp_path / "disk")) / "node0"
        )
        run.manager.stage(step, PersistTo.RUN | PersistTo.NODE, {"validation_loss": 0.5})
        run.manager.wait()
        run.store.persist_pending()
        run.store.commit_pending()
        run.store.verify_pending()
    return run


def shard(run: OneRank, step: int) -> Path:
    return disk.step_dir(run.run_dir, step) / "g1-rank00000.safetensors"


def damage(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 1)


def test_ls_shows_every_tier_newest_first(run: OneRank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    persist(tmp_path, {15: 3}, generation=2)
    assert dispatch(["checkpoint", "ls", "run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["tier", "step", "generation", "ranks"]
    assert [row[:4] for row in rows[1:]] == [
        ["node", "15", "2", "1"], ["node", "20", "1", "1"],
        ["run", "15", "2", "1"], ["run", "20", "1", "1"], ["run", "10", "1", "1"],
    ]  # fmt: skip
    assert rows[3][-2:] == ["0.5000", "yes"]


def test_verify_names_the_damaged_file_and_exits_with_1(run: OneRank, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["checkpoint", "verify", "run"]) == 0
    damage(shard(run, 20))
    assert dispatch(["checkpoint", "verify", "run"]) == 1
    assert "step-20/g1-rank00000.safetensors: checksum" in capsys.readouterr().out
    assert dispatch(["checkpoint", "verify", "run", "--step", "10"]) == 0
    assert dispatch(["checkpoint", "verify", "run", "--step", "11"]) == 2
    assert "has no snapshot of step 11; it has step 20, step 10" in capsys.readouterr().err


def test_repair_takes_shards_from_the_nodes_disk_or_a_backup(
    run: OneRank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.run_dir, tmp_path / "backup")
    damage(shard(run, 20))
    assert dispatch(["checkpoint", "repair", "run"]) == 0
    assert "fetched from the node's disk (step-20/g1-rank00000.safetensors: checksum" in capsys.readouterr().out
    assert verify_snapshot(run.run_dir, 20) == []
    shutil.rmtree(tmp_path / "disk")
    shard(run, 20).unlink()
    assert dispatch(["checkpoint", "repair", "run"]) == 1
    assert "cannot be repaired" in capsys.readouterr().out
    os.truncate(disk.step_dir(run.run_dir, 20) / "manifest.json", 50)
    assert dispatch(["checkpoint", "repair", "run", "--source", "backup"]) == 0
    assert verify_snapshot(run.run_dir, 20) == []


def test_rm_asks_refuses_the_last_good_one_and_removes(run: OneRank, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["checkpoint", "rm", "run", "10"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert dispatch(["checkpoint", "rm", "run", "11", "--yes"]) == 2
    assert "has no snapshot of step 11" in capsys.readouterr().err
    damage(shard(run, 20))
    assert dispatch(["checkpoint", "rm", "run", "10", "--yes"]) == 2
    assert "no good snapshot would be left" in capsys.readouterr().err
    assert disk.committed_steps(run.run_dir) == [20, 10]
    assert dispatch(["checkpoint", "rm", "run", "20", "--yes"]) == 0
    assert disk.committed_steps(run.run_dir) == [10]
    assert dispatch(["checkpoint", "rm", "run", "10", "--yes", "--force"]) == 0
    assert disk.all_steps(run.run_dir) == []


def test_repair_replaces_nothing_good_by_another_runs(
    run: OneRank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest is gone, and the copy that was named is of another run with the same steps."""
    shutil.copytree(run.run_dir, tmp_path / "kept")
    shutil.rmtree(run.run_dir / "checkpoints")
    shutil.rmtree(tmp_path / "disk")
    persist(tmp_path, {10: 3, 20: 4})
    shutil.copytree(run.run_dir, tmp_path / "other")
    shutil.rmtree(run.run_dir / "checkpoints")
    shutil.copytree(tmp_path / "kept/checkpoints", run.run_dir / "checkpoints")
    os.truncate(disk.step_dir(run.run_dir, 20) / "manifest.json", 50)
    before = shard(run, 20).read_bytes()
    assert dispatch(["checkpoint", "repair", "run", "--step", "20", "--source", "other"]) == 1
    assert "as if it were of another run: name a copy of this one" in capsys.readouterr().out
    assert shard(run, 20).read_bytes() == before
    assert dispatch(["checkpoint", "repair", "run", "--step", "20", "--source", "kept"]) == 0
    assert verify_snapshot(run.run_dir, 20) == []


def test_what_was_mistyped_is_said_and_not_taken_for_something_else(
    run: OneRank, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["verify"], ["repair"], ["export", "--format", "dcp", "--output", "out"]):
        assert dispatch(["checkpoint", command[0], "run", *command[1:], "--step", "-10"]) == 2
        assert "--step -10: steps count from 0" in capsys.readouterr().err
    assert dispatch(["checkpoint", "repair", "run", "--source", "nowhere"]) == 2
    assert "--source nowhere: is no copy of a run directory" in capsys.readouterr().err
    assert dispatch(["checkpoint", "rm", "run", "10", "10", "--yes"]) == 0
    assert disk.all_steps(run.run_dir) == [20]
    shutil.rmtree(disk.checkpoints_dir(run.run_dir))
    assert dispatch(["checkpoint", "verify", "run"]) == 2
    assert "run run has no snapshot in" in capsys.readouterr().err


def test_without_a_bucket_pull_and_push_say_how_to_name_one(run: OneRank, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pull", "push"):
        assert dispatch(["checkpoint", command, "run"]) == 2
        assert "--s3 s3://BUCKET/PREFIX" in capsys.readouterr().err
    assert dispatch(["checkpoint", "ls", "run", "--s3", "bucket"]) == 2
    assert "write it as s3://BUCKET/PREFIX" in capsys.readouterr().err


def test_diff_tells_equal_from_different_by_exit_code(
    run: OneRank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    persist(tmp_path, {30: 2})
    assert dispatch(["checkpoint", "diff", "run:20", "run"]) == 0
    assert "step 20 and step 30: 8 equal" in capsys.readouterr().out
    assert dispatch(["checkpoint", "diff", "run:10", "run:20"]) == 1
    out = capsys.readouterr().out
    assert "model.weight: 2,112 of 2,112 elements differ, at most " in out
    damage(shard(run, 20))
    assert dispatch(["checkpoint", "diff", "run:10", "run:20"]) == 1
    assert "step-20/g1-rank00000.safetensors: checksum" in capsys.readouterr().err


def test_diff_counts_elements_and_finds_the_largest_difference(run: OneRank, tmp_path: Path) -> None:
    other = OneRank(tmp_path, seed=1)
    other.run_dir = other.manager.run_dir = run.run_dir
    other.store = NodeStore(other.ram_dir, run.run_dir, keep_last=9)
    tensors = other.state.tensors
    tensors["weight"][3, 4] += 0.5
    tensors["weight"][60, 32] -= 2.0
    tensors["step"].fill_(float("nan"))
    other.persist(30)
    found = {d.name: d for d in compare_snapshots((run.run_dir, 10), (run.run_dir, 30), lambda a, b: None, 500)}
    weight = found["model.weight"]
    assert (weight.finding, weight.differing, weight.elements) == (Finding.DIFFER, 2, 64 * 33)
    assert weight.max_abs == pytest.approx(2.0)
    assert found["model.step"].max_abs != found["model.step"].max_abs
    assert {d.finding for name, d in found.items() if name not in ("model.weight", "model.step")} == {Finding.EQUAL}


def test_diff_names_what_only_one_side_has_or_has_otherwise(run: OneRank, tmp_path: Path) -> None:
    other = OneRank(tmp_path, seed=1)
    other.manager.close()
    del other.state.tensors["half"]
    other.state.tensors["extra"] = torch.ones(3)
    other.state.tensors["ids"] = torch.ones(12, dtype=torch.int64)
    again = OneRank(tmp_path, seed=1)
    again.state.tensors.clear()
    again.state.tensors.update(other.state.tensors)
    again.manager.run_dir = run.run_dir
    again.manager._slots.clear()
    again.manager.prepare()
    again.store = NodeStore(again.ram_dir, run.run_dir, keep_last=9)
    again.persist(30)
    found = {d.name: d.finding for d in compare_snapshots((run.run_dir, 10), (run.run_dir, 30), lambda a, b: None)}
    assert {name: finding for name, finding in found.items() if finding is not Finding.EQUAL} == {
        "model.half": Finding.ONLY_A, "model.extra": Finding.ONLY_B, "model.ids": Finding.OTHER_KIND
    }  # fmt: skip


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 300))
def test_pieces_cover_every_element_once(shape: list[int], piece_bytes: int) -> None:
    whole = torch.zeros(shape, dtype=torch.int32)
    for piece in pieces("w", "F32", shape, piece_bytes):
        window = whole
        for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
            window = window.narrow(dim, offset, size)
        window += 1
        rows = piece.sizes[0] if piece.sizes else 1
        assert rows == 1 or piece.end_bytes <= piece_bytes
    assert bool((whole == 1).all())


def test_the_commands_answer_while_a_shard_is_missing_its_folder(run: OneRank) -> None:
    """A running job may remove a snapshot between two looks: that is an error in words at most, never a traceback."""
    shutil.rmtree(disk.step_dir(run.run_dir, 20))
    for command in ("ls", "verify", "repair"):
        assert dispatch(["checkpoint", command, "run"]) == 0


def test_what_only_looks_and_mends_loads_no_torch(run: OneRank, tmp_path: Path) -> None:
    damage(shard(run, 20))
    code = (
        "import sys; from cluster.cli import dispatch; "
        "assert [dispatch(['checkpoint', c, 'run']) for c in ('ls', 'verify', 'repair', 'verify')] == [0, 1, 0, 0]; "
        "heavy = {'torch', 'torchtitan', 'megatron', 'numpy', 'boto3'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_exports_and_imports_that_cannot_be_say_why(
    run: OneRank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snapshots here are of no model at all; an import brings nothing into being if it fails."""
    for kind in ("hf", "dcp"):
        assert dispatch(["checkpoint", "export", "run", "--format", kind, "--output", "out"]) == 1
        assert "step 20" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert dispatch(["checkpoint", "import", "nothing", "debug_dense", "--format", kind, "--run.name", "new"]) == 2
        assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "runs/new/config.toml").exists()


def test_a_command_that_is_terminated_leaves_nothing_half_written(tmp_path: Path) -> None:
    """As after Ctrl-C: an export's hidden folder may be as large as the model."""

    def export() -> None:
        with tidy_when_terminated(), staged_folder(tmp_path / "out") as folder:
            (folder / "weights").write_bytes(bytes(1000))
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        export()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
