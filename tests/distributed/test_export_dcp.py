"""Promises of torch.distributed.checkpoint folders: stock torch and torchtitan read ours, and we read theirs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from checkpointing.export_dcp import export_dcp
from checkpointing.import_dcp import import_dcp
from configs.schema import JobConfig
from parallelism.engine import build_engine
from parallelism.mesh import World
from tests.checkpoint_helpers import same_bits
from tests.distributed.exchange import STEP, first_loss, full_of, job, silent, trained_run
from tests.distributed.layouts import train
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("llama3", "debugmodel", {"dp_shard": 2}),
    "qwen3_tied": ("qwen3", "debugmodel", {"layers": 1}),
    "deepseek_v3": ("deepseek_v3", "debugmodel", {}),
}


def run_of(case: str, tmp_path: Path) -> tuple[JobConfig, Path]:
    """A trained run and its configuration."""
    family, flavor, options = JOBS[case]
    config, run_dir = job(family, flavor, tmp_path / "none", **options), tmp_path / "run"
    run_dir.mkdir()
    run_ranks(options.get("dp_shard", 1), trained_run, config, run_dir)
    return config, run_dir


def torchtitan_states(parts: list[nn.Module]) -> tuple[Any, Any]:
    """torchtitan's own view of a model and of its optimizer."""
    from torchtitan.components.checkpoint import ModelWrapper
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})
    optimizers = OptimizersContainer(
        OptimizersContainer.Config(param_groups=[group], implementation="for-loop"), model_parts=parts
    )
    return ModelWrapper(parts), optimizers


def load_in_torchtitan(world: World, config: JobConfig, folder: Path) -> dict[str, float]:
    """Load as torchtitan's checkpoint manager does, into a model of another seed; what parameters are off by."""
    engine = build_engine(config, world)
    train(engine, range(50, 51))
    model, optimizers = torchtitan_states(engine.parts)
    state = {**model.state_dict(), "optimizer": optimizers}
    dcp.load(state, checkpoint_id=str(folder))
    model.load_state_dict(state)
    expected = load_file(folder.parent / "run/live.safetensors")
    off = {}
    for name, parameter in engine.parts[0].named_parameters():
        found, wanted = full_of(parameter), expected[f"model.{name}"]
        off[name] = float((found - wanted).abs().max())
    for name, moment in optimizers.state_dict().items():
        if name.startswith("state.") and name.endswith("exp_avg"):
            wanted = expected["optimizer.exp_avg." + name.removeprefix("state.").removesuffix(".exp_avg")]
            off[name] = float((full_of(moment) - wanted).abs().max())
    return off


def save_from_torchtitan(world: World, config: JobConfig, folder: Path, model_only: bool) -> None:
    """Train with torchtitan's optimizer, save as torchtitan does, and write down what the values were."""
    engine = build_engine(config, world)
    model, optimizers = torchtitan_states(engine.parts)
    for step in range(STEP):
        engine.forward_backward(torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(step)))
        optimizers.step()
        optimizers.zero_grad()
    whole = {f"model.{name}": full_of(p) for name, p in engine.parts[0].named_parameters()}
    for name, value in optimizers.state_dict().items():
        if name.startswith("state.") and name.endswith(("exp_avg", "exp_avg_sq")):
            parameter, _, kind = name.removeprefix("state.").rpartition(".")
            whole[f"optimizer.{kind}.{parameter}"] = full_of(value)
    state = model.state_dict() if model_only else {**model.state_dict(), "optimizer": optimizers, "n": {"step": 7}}
    dcp.save(state, checkpoint_id=str(folder))
    if world.rank == 0:
        save_file(whole, folder.parent / "theirs.safetensors")


@pytest.mark.parametrize("case", JOBS)
def test_stock_torch_loads_an_export_and_it_imports_bit_for_bit(tmp_path: Path, case: str) -> None:
    """Into plain tensors, without any process group; the import has weights, moments, counter, step and scalars."""
    config, run_dir = run_of(case, tmp_path)
    output, again = tmp_path / "dcp", tmp_path / "again"
    export_dcp(run_dir, STEP, output, silent, file_bytes=3_000_000)
    assert len(list(output.glob("*.distcp"))) > 1
    live = load_file(run_dir / "live.safetensors")
    plain = {key.removeprefix("model."): torch.zeros_like(value) for key, value in live.items() if "wqkv" not in key}
    state = {key: value for key, value in plain.items() if not key.startswith("optimizer.")}
    first = next(name for name in live if name.startswith("optimizer.exp_avg.")).removeprefix("optimizer.exp_avg.")
    inner = {f"state.{first}.exp_avg": torch.zeros_like(live[f"model.{first}"]), f"state.{first}.step": torch.zeros(())}
    state |= {"optimizer": {**inner, f"param_groups.{first}.lr": 0.0}}
    dcp.load(state, storage_reader=dcp.FileSystemReader(output), no_dist=True)
    assert all(same_bits(value, live[f"model.{name}"]) for name, value in state.items() if name != "optimizer")
    assert same_bits(state["optimizer"][f"state.{first}.exp_avg"], live[f"optimizer.exp_avg.{first}"])
    assert float(state["optimizer"][f"state.{first}.step"]) == STEP
    assert state["optimizer"][f"param_groups.{first}.lr"] == config.optimizer.lr

    assert import_dcp(output, config, again, silent, shard_bytes=2_000_000) == STEP
    ranks = config.world_size
    losses = [run_ranks(ranks, first_loss, config, folder, STEP)[0] for folder in (run_dir, again)]
    assert losses[0] == losses[1]
    imported = load_file(again / "live.safetensors")
    assert imported.keys() == live.keys()
    assert all(same_bits(imported[name], value) for name, value in live.items())


def test_torchtitan_loads_an_export_on_two_ranks(tmp_path: Path) -> None:
    """Model and optimizer, by its own wrappers, into DTensors on two ranks, and alone."""
    _, run_dir = run_of("llama3", tmp_path)
    export_dcp(run_dir, STEP, tmp_path / "dcp", silent)
    for ranks in (2, 1):
        for off in run_ranks(ranks, load_in_torchtitan, job("llama3", "debugmodel", tmp_path / "none", dp_shard=ranks),
                             tmp_path / "dcp"):  # fmt: skip
            assert len(off) > 30
            assert not any(off.values()), {name: value for name, value in off.items() if value}


@pytest.mark.parametrize("model_only", [False, True])
def test_what_torchtitan_saves_on_two_ranks_can_be_imported(tmp_path: Path, model_only: bool) -> None:
    """Sharded DTensors saved by stock torch; without an optimizer in it, moments are zeros that take no disk."""
    config = job("llama3", "debugmodel", tmp_path / "none", dp_shard=2)
    run_ranks(2, save_from_torchtitan, config, tmp_path / "dcp", model_only)
    run_dir = tmp_path / "again"
    assert import_dcp(tmp_path / "dcp", config, run_dir, silent) == 0
    run_ranks(2, first_loss, config, run_dir, 0)
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), load_file(run_dir / "live.safetensors")
    for name, value in ours.items():
        kept = name.startswith("model.") or (not model_only and name != "optimizer.step")
        if kept:
            assert same_bits(value, theirs[name]), name
    assert float(ours["optimizer.step"]) == (0 if model_only else STEP)
    (shard,) = (run_dir / "checkpoints/step-0").glob("*.safetensors")
    used_bytes = shard.stat().st_blocks * 512
    assert (used_bytes < shard.stat().st_size / 2) == model_only


def test_a_checkpoint_of_another_model_or_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    """Nothing is left of an import that fails."""
    config, run_dir = run_of("llama3", tmp_path)
    export_dcp(run_dir, STEP, tmp_path / "dcp", silent, file_bytes=1_000_000)
    deeper = job("llama3", "debugmodel", tmp_path / "none", layers=3)
    with pytest.raises(ValueError, match=r"has no layers\.2\."):
        import_dcp(tmp_path / "dcp", deeper, tmp_path / "again", silent)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "dcp", broken)
    max(broken.glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        import_dcp(broken, config, tmp_path / "again", silent)
    assert not list((tmp_path / "again/checkpoints").iterdir())
