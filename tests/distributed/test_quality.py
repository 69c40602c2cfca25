"""Promise: Muon, z-loss and the average of the weights give one training on every layout, and survive a restore."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from configs.schema import EmaConfig, JobConfig, OptimizerConfig
from parallelism.mesh import world_size_of
from tests.distributed.layouts import continued, reference, restored, tiny
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

# Dense: ten times that of test_parity, as an orthogonalised matrix moves in directions that hardly have a gradient,
# where rounding decides.
DENSE_TOLERANCE = 2e-5
EXPERT_TOLERANCE = 1e-4


def with_quality(config: JobConfig) -> JobConfig:
    """The same job with all of them on; the matrices that are the most work stay with AdamW."""
    large = ("*.attention.wkv_b.weight", "*.attention.wq.weight") if config.model.family == "deepseek_v3" else ()
    return msgspec.structs.replace(
        config,
        training=msgspec.structs.replace(config.training, z_loss=0.01),
        optimizer=OptimizerConfig(name="muon", muon_iterations=2, muon_except=large),
        ema=EmaConfig(decay=0.9, interval_steps=2),
    )


DENSE = {"fsdp2_tp2": tiny(dp_shard=2, tp=2), "pp2": tiny(pp=2, microbatch_size=2)}
EXPERTS = {
    "ep2": tiny("deepseek_v3", dp_shard=2, ep=2),
    "fsdp2_tp2_ep4": tiny("deepseek_v3", dp_shard=2, tp=2, ep=4),
    "hsdp2x2_ep2": tiny("deepseek_v3", dp_replicate=2, dp_shard=2, ep=2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "fsdp2_tp2" else [pytest.mark.long]) for name in (*DENSE, *EXPERTS)]
)
def test_a_layout_trains_as_one_process_does(name: str, tmp_path: Path) -> None:
    """From one state, with momenta and averages in it: losses, norms, and the tensors that a snapshot has."""
    config, tolerance = (DENSE[name], DENSE_TOLERANCE) if name in DENSE else (EXPERTS[name], EXPERT_TOLERANCE)
    path = tmp_path / "state.safetensors"
    expected = run_ranks(1, reference, with_quality(tiny(config.model.family)), path)[0]
    traces = run_ranks(world_size_of(config.parallelism), continued, with_quality(config), path)
    for trace in traces:
        assert trace.losses == pytest.approx(expected.losses, rel=tolerance)
        assert trace.norms == pytest.approx(expected.norms, rel=10 * tolerance)
    names = set().union(*(trace.names for trace in traces))
    assert names == set(expected.names)
    weights = {name.removeprefix("ema.") for name in names if name.startswith("ema.")}
    momenta = {name.removeprefix("optimizer.momentum_buffer.") for name in names if "momentum_buffer" in name}
    assert momenta < weights
    assert "lm_head.weight" in weights - momenta


@pytest.mark.parametrize(
    "config",
    [tiny(dp_shard=2), pytest.param(tiny("deepseek_v3", dp_shard=2, ep=2), marks=pytest.mark.long)],
    ids=["fsdp2", "ep2"],
)
def test_a_restored_state_goes_on_bit_for_bit(config: JobConfig) -> None:
    """Momenta and averages are state: with them a run on other processes is the same run."""
    for undisturbed, resumed in run_ranks(2, restored, with_quality(config)):
        assert undisturbed == resumed
