"""Promises of exports and imports that need no ranks: whole or not there, nothing unverified, nothing executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from checkpointing import disk
from checkpointing.assemble import open_snapshot
from checkpointing.contents import Wanted, wanted_tensors
from checkpointing.dcp_metadata import read_metadata
from checkpointing.export_dcp import export_dcp
from checkpointing.export_hf import export_hf
from checkpointing.import_dcp import import_dcp
from checkpointing.import_hf import import_hf
from checkpointing.imported import write_snapshot
from checkpointing.layout import SnapshotDamagedError
from checkpointing.staged import staged_folder
from checkpointing.verify import list_snapshots, verify_snapshot
from cluster.cli import dispatch
from configs.schema import DataConfig, DataSet, EmaConfig, JobConfig, ModelConfig, RunConfig, TrainingConfig
from configs.tomltext import resolve_toml
from parallelism.hf_names import hf_names
from parallelism.outline import outline
from tests.checkpoint_helpers import flip_byte, same_bits


def job(family: str = "llama3", flavor: str = "debugmodel") -> JobConfig:
    """A job of one small layer."""
    return JobConfig(
        run=RunConfig(name="test"),
        model=ModelConfig(family=family, flavor=flavor, layers=1, vocab_size=64),  # type: ignore[arg-type]
        data=DataConfig(sets=(DataSet(path="none"),), tokenizer=""),
        training=TrainingConfig(steps=10, seq_len=32, global_batch_size=4),
    )


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
    assert 0 <= done <= total


def values(config: JobConfig) -> dict[str, torch.Tensor]:
    """Random contents of a whole snapshot."""
    generator = torch.Generator().manual_seed(3)
    return {w.name: torch.randn(w.shape, generator=generator) for w in wanted_tensors(outline(config))}


def committed(config: JobConfig, run_dir: Path, step: int = 3) -> dict[str, torch.Tensor]:
    """A run with one snapshot, and what is in it."""
    contents = values(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(resolve_toml(config))
    write_snapshot(run_dir, step, wanted_tensors(outline(config)), contents.__getitem__, {"tokens_seen": 99}, silent,
                   shard_bytes=400_000)  # fmt: skip
    return contents


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with step 3."""
    committed(job(), tmp_path / "run")
    return tmp_path / "run"


EXPORTS = {
    "hf": lambda run_dir, output: export_hf(run_dir, 3, output, "float32", silent),
    "dcp": lambda run_dir, output: export_dcp(run_dir, 3, output, silent),
}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5), st.booleans()), min_size=1), st.integers(64, 2000))
def test_what_is_written_in_files_of_any_size_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, bool]], shard_bytes: int
) -> None:
    """Tensors of any shape and of two types, some zero, in bounded files that verify, with scalars and step."""
    folder = tmp_path_factory.mktemp("run")
    contents, wanted = {}, []
    for i, (rows, columns, half) in enumerate(shapes):
        dtype = torch.bfloat16 if half else torch.float32
        contents[f"t{i}"] = None if i % 3 == 2 else torch.randn(rows, columns).to(dtype)
        wanted.append(Wanted(f"t{i}", dtype, (rows, columns)))
    write_snapshot(folder, 5, wanted, contents.__getitem__, {"tokens_seen": 7}, silent, shard_bytes)
    assert verify_snapshot(folder, 5) == []
    (info,) = list_snapshots(folder)
    assert (info.step, info.generation, info.problem) == (5, 0, "")
    with open_snapshot(folder, 5, contents, silent) as snapshot:
        assert snapshot.scalars == {"tokens_seen": 7}
        for tensor in wanted:
            expected = contents[tensor.name]
            expected = torch.zeros(tensor.shape, dtype=tensor.dtype) if expected is None else expected
            assert same_bits(snapshot.read(tensor.name), expected)
    for shard in disk.read_manifest(folder, 5).shards:
        held = [part for part in shard.tensors if part.end_bytes > part.start_bytes]
        assert shard.size_bytes - shard.data_start_bytes <= shard_bytes or len(held) == 1


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_damaged_shard_is_named_and_nothing_is_exported(run_dir: Path, tmp_path: Path, kind: str) -> None:
    shard = disk.read_manifest(run_dir, 3).shards[1]
    flip_byte(disk.step_dir(run_dir, 3) / shard.file, shard.size_bytes - 5)
    with pytest.raises(SnapshotDamagedError, match=rf"step-3/{shard.file}: checksum"):
        EXPORTS[kind](run_dir, tmp_path / "out")
    assert names_in(tmp_path) == {"run"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_output_that_holds_something_is_left_alone(run_dir: Path, tmp_path: Path, kind: str) -> None:
    """An empty folder is fine."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(ValueError, match="no empty folder"):
        EXPORTS[kind](run_dir, output)
    assert names_in(output) == {"mine"}
    (output / "mine").unlink()
    EXPORTS[kind](run_dir, output)
    assert len(names_in(output)) >= 2
    assert names_in(tmp_path) == {"run", "out"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_full_disk_is_said_and_nothing_is_left_on_it(run_dir: Path, small_disk: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"no room for .*small/out"):
        EXPORTS[kind](run_dir, small_disk / "out")
    assert names_in(small_disk) == set()


def test_an_import_onto_a_full_disk_leaves_no_snapshot(run_dir: Path, tmp_path: Path, small_disk: Path) -> None:
    export_dcp(run_dir, 3, tmp_path / "dcp", silent)
    with pytest.raises(ValueError, match="no room for"):
        import_dcp(tmp_path / "dcp", job(), small_disk / "new", silent)
    assert names_in(small_disk / "new/checkpoints") == set()


def test_a_half_made_folder_never_has_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), staged_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
        raise RuntimeError("half way")
    assert names_in(tmp_path) == set()


def test_a_snapshot_of_another_model_is_no_export(run_dir: Path, tmp_path: Path) -> None:
    other = msgspec.structs.replace(job(), model=ModelConfig(family="llama3", flavor="debugmodel", vocab_size=64))
    (run_dir / "config.toml").write_text(resolve_toml(other))
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is missing.*another model"):
        export_hf(run_dir, 3, tmp_path / "out", "float32", silent)


def test_a_flavour_that_transformers_cannot_compute_is_refused_with_the_reason() -> None:
    config = msgspec.structs.replace(job(), model=ModelConfig(family="deepseek_v3", flavor="16B"))
    with pytest.raises(ValueError, match="16B routes by softmax, and DeepseekV3ForCausalLM by sigmoid"):
        hf_names(config)


@pytest.mark.parametrize(("family", "flavor"), [("llama3", "1B"), ("qwen3", "debugmodel_non_fused_qkv")])
def test_every_name_maps_there_and_back(family: str, flavor: str) -> None:
    """On meta tensors: tied weights and projections that are not fused."""
    names = hf_names(job(family, flavor))
    for name, tensor in names.model.tensors.items():
        parts = names.to_hf(name, tensor)
        assert parts.keys() == names.names[name].keys()
        assert names.from_hf(name, parts).shape == tensor.shape


class Exploit:
    """Pickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_before_it_does_anything(tmp_path: Path) -> None:
    """Alone, and hidden in the metadata of a real checkpoint."""
    source, planted = tmp_path / "dcp", tmp_path / "planted"
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(source), no_dist=True)
    real = pickle.loads((source / ".metadata").read_bytes())
    real.planner_data = {"a": Exploit(planted)}
    for forged in (Exploit(planted), real):
        (source / ".metadata").write_bytes(pickle.dumps(forged))
        with pytest.raises(ValueError, match=r"refused: it asks for (posix|os)\.mkdir"):
            import_dcp(source, job(), tmp_path / "run", silent)
        assert not planted.exists()
    pickle.loads((source / ".metadata").read_bytes())
    assert planted.is_dir()


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "sub/file", ".metadata"])
def test_metadata_cannot_point_outside_its_folder(tmp_path: Path, place: str) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    path = tmp_path / "dcp/.metadata"
    found = pickle.loads(path.read_bytes())
    next(iter(found.storage_data.values())).relative_path = place
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match="refused: it looks for a tensor in"):
        read_metadata(tmp_path / "dcp")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 10_000))
def test_damaged_metadata_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, at: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        (folder / "whole").write_bytes((folder / ".metadata").read_bytes())
    whole = (folder / "whole").read_bytes()
    at %= len(whole)
    (folder / ".metadata").write_bytes(whole[:at] + garbage + whole[at + len(garbage) :])
    with contextlib.suppress(ValueError):
        assert isinstance(read_metadata(folder), Metadata)


def test_a_tensor_that_is_only_partly_described_is_not_loaded(run_dir: Path, tmp_path: Path) -> None:
    """torch's own loader would leave the rest as memory happened to be."""
    export_dcp(run_dir, 3, tmp_path / "dcp", silent)
    path = tmp_path / "dcp/.metadata"
    found = pickle.loads(path.read_bytes())
    found.state_dict_metadata["norm.weight"].chunks[0].sizes = torch.Size([100])
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match=r"does not say where all of norm\.weight is"):
        import_dcp(tmp_path / "dcp", job(), tmp_path / "new", silent)


def edited(folder: Path, **changes: object) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def test_a_source_of_another_function_is_not_imported(run_dir: Path, tmp_path: Path) -> None:
    """The same shapes with another rope, another eps, another architecture, or quantised."""
    source, new = tmp_path / "hf", tmp_path / "new"
    export_hf(run_dir, 3, source, "float32", silent)
    good = (source / "config.json").read_text()
    for changes, reason in (
        ({"rope_theta": 10000.0}, "rope is"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 there, 1e-05 in this job"),
        ({"model_type": "mistral"}, "model_type is 'mistral' there"),
        ({"quantization_config": {"bits": 8}}, "quantised"),
    ):
        edited(source, **changes)
        with pytest.raises(ValueError, match=reason):
            import_hf(source, job(), new, silent)
        (source / "config.json").write_text(good)
    edited(source, rope_theta=None, rope_scaling=None,
           rope_parameters={**json.loads(good)["rope_scaling"], "rope_theta": 500000.0})  # fmt: skip
    assert import_hf(source, job(), new, silent) == 0


def test_missing_and_misshapen_weights_are_named(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    export_hf(run_dir, 3, source, "float32", silent)
    weights = load_file(source / "model.safetensors")
    for change, reason in (
        ({"model.norm.weight": None}, r"has no model\.norm\.weight \(1 of"),
        ({"lm_head.weight": torch.zeros(65, 256)}, r"lm_head\.weight has shape \[65, 256\]"),
        ({"model.norm.weight": torch.zeros(256, dtype=torch.int8)}, "quantised"),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(changed, source / "model.safetensors")
        with pytest.raises(ValueError, match=reason):
            import_hf(source, job(), tmp_path / "new", silent)
        assert not list((tmp_path / "new").rglob("*.json"))


def test_an_index_cannot_name_files_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    export_hf(run_dir, 3, source, "float32", silent, file_bytes=100_000)
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="must name files of this folder"):
        import_hf(source, job(), tmp_path / "new", silent)


def test_progress_counts_bytes_up_to_the_whole(run_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_hf(run_dir, 3, tmp_path / "hf", "bfloat16", lambda *told: seen.append(told))
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["verify", "write"]
    for kind in ("verify", "write"):
        done = [d for what, d, _ in seen if what == kind]
        assert done == sorted(done)
        assert done[-1] == next(total for what, _, total in reversed(seen) if what == kind)


def test_the_import_command_names_the_command_that_goes_on(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its overrides: without them it would begin another run."""
    export_hf(run_dir, 3, tmp_path / "hf", "float32", silent)
    config = tmp_path / "job.toml"
    config.write_text(resolve_toml(job()))
    overrides = ["--run.name", "imported", "--run.dir", str(tmp_path)]
    assert dispatch(["checkpoint", "import", str(tmp_path / "hf"), str(config), "--format", "hf", *overrides]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"`everstep run {config} --run.name imported --run.dir {tmp_path}` goes on from there" in said


def with_average(decay: float) -> JobConfig:
    return msgspec.structs.replace(job(), ema=EmaConfig(decay=decay))


def test_averages_are_exported_in_the_place_of_weights_and_only_then(tmp_path: Path) -> None:
    """In both formats; without --ema the weights are, and torch's folder has the averages beside them."""
    config = with_average(0.9)
    contents, run_dir = committed(config, tmp_path / "run"), tmp_path / "run"
    weight = "layers.0.attention.wo.weight"
    for averaged, kept in ((False, "model"), (True, "ema")):
        export_hf(run_dir, 3, tmp_path / f"hf-{kept}", "float32", silent, averaged=averaged)
        found = load_file(tmp_path / f"hf-{kept}/model.safetensors")
        assert same_bits(found["model.layers.0.self_attn.o_proj.weight"], contents[f"{kept}.{weight}"])
        export_dcp(run_dir, 3, tmp_path / f"dcp-{kept}", silent, averaged=averaged)
        state = {weight: torch.zeros_like(contents[f"model.{weight}"])}
        reader = dcp.FileSystemReader(tmp_path / f"dcp-{kept}")
        assert any(name.startswith("optimizer.") for name in reader.read_metadata().state_dict_metadata) != averaged
        dcp.load(state, storage_reader=reader, no_dist=True)
        assert same_bits(state[weight], contents[f"{kept}.{weight}"])


def test_an_average_survives_torchs_folder_and_begins_with_weights_that_have_none(tmp_path: Path) -> None:
    config = with_average(0.9)
    contents = committed(config, tmp_path / "run")
    export_dcp(tmp_path / "run", 3, tmp_path / "dcp", silent)
    import_dcp(tmp_path / "dcp", config, tmp_path / "again", silent)
    committed(job(), tmp_path / "plain")
    export_dcp(tmp_path / "plain", 3, tmp_path / "dcp-plain", silent)
    import_dcp(tmp_path / "dcp-plain", config, tmp_path / "begun", silent)
    wanted = [tensor.name for tensor in wanted_tensors(outline(config))]
    averages = [name for name in wanted if name.startswith("ema.")]
    assert len(averages) == len(outline(config).parameters)
    with open_snapshot(tmp_path / "again", 3, wanted, silent) as again:
        assert all(same_bits(again.read(name), contents[name]) for name in wanted)
    with open_snapshot(tmp_path / "begun", 3, wanted, silent) as begun:
        assert all(same_bits(begun.read(name), begun.read("model." + name.removeprefix("ema."))) for name in averages)


def test_a_run_without_averages_has_none_to_export(run_dir: Path, tmp_path: Path) -> None:
    for export in (export_hf, export_dcp):
        arguments = ("float32",) if export is export_hf else ()
        with pytest.raises(ValueError, match=r"ema\.decay = 0.*leave --ema out"):
            export(run_dir, 3, tmp_path / "out", *arguments, silent, averaged=True)  # type: ignore[operator]
