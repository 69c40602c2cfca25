"""Every layout computes what one process computes, repeats itself bit for bit, and forgets a discarded update."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import JobConfig
from parallelism.mesh import world_size_of
from tests.distributed.layouts import (
    Trace,
    continued,
    discarded,
    fresh,
    initial_values,
    reference,
    restored,
    tiny,
    with_training,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

# Relative, for losses; gradient norms get ten times as much. Dense models compute in fp32, where only the order of sums
# differs (seen: 1.3e-7 and 1.2e-6). Experts multiply in bf16, whose rounding flips with that order (5e-6 and 1e-5).
DENSE_TOLERANCE = 2e-6
EXPERT_TOLERANCE = 1e-4

DENSE = {
    "fsdp2": tiny(dp_shard=2),
    "tp2": tiny(tp=2),
    "pp2": tiny(pp=2),
    "pp2_fsdp2": tiny(pp=2, dp_shard=2),
    "fsdp2_tp2": tiny(dp_shard=2, tp=2),
    "hsdp2x2": tiny(dp_replicate=2, dp_shard=2),
    "pp2_interleaved": tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"),
    "fsdp2_accumulated": tiny(dp_shard=2, microbatch_size=1),
}
EXPERTS = {
    "ep2": tiny("deepseek_v3", dp_shard=2, ep=2),
    "ep2_accumulated": tiny("deepseek_v3", dp_shard=2, ep=2, microbatch_size=1),
    "pp2": tiny("deepseek_v3", layers=3, pp=2),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Trace]]:
    """By family and layers: the file one process saved, and what it saw afterwards. Filled on demand."""
    return {("folder", 0): (tmp_path_factory.mktemp("parity"), Trace([], [], [], "", []))}


def one_process(checkpoints: dict[tuple[str, int], tuple[Path, Trace]], config: JobConfig) -> tuple[Path, Trace]:
    """The reference for a configuration's model, computed once."""
    model = config.model
    key = (model.family, model.layers)
    if key not in checkpoints:
        path = checkpoints["folder", 0][0] / f"{model.family}-{model.layers}.safetensors"
        checkpoints[key] = path, run_ranks(1, reference, tiny(model.family, layers=model.layers), path)[0]
    return checkpoints[key]


def assert_same_training(traces: list[Trace], expected: Trace, tolerance: float) -> None:
    """All ranks agree bit for bit, and with one process within a relative tolerance."""
    for trace in traces:
        assert (trace.losses, trace.largest, trace.norms) == (traces[0].losses, traces[0].largest, traces[0].norms)
    assert traces[0].losses == pytest.approx(expected.losses, rel=tolerance)
    assert traces[0].norms == pytest.approx(expected.norms, rel=10 * tolerance)
    assert set().union(*(trace.names for trace in traces)) == set(expected.names)


@pytest.mark.parametrize("name", DENSE)
def test_dense_layout_equals_one_process(name: str, checkpoints: dict[tuple[str, int], tuple[Path, Trace]]) -> None:
    """Loss, gradient norm and tensor names of llama3 are those of one process, from one shared state."""
    config = DENSE[name]
    path, expected = one_process(checkpoints, config)
    traces = run_ranks(world_size_of(config.parallelism), continued, config, path)
    assert_same_training(traces, expected, DENSE_TOLERANCE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if "accumulated" in name else []) for name in EXPERTS]
)
def test_expert_layout_equals_one_process(name: str, checkpoints: dict[tuple[str, int], tuple[Path, Trace]]) -> None:
    """The same for deepseek_v3, within the rounding of bf16 experts; expert biases are part of the state."""
    config = EXPERTS[name]
    path, expected = one_process(checkpoints, config)
    traces = run_ranks(world_size_of(config.parallelism), continued, config, path)
    assert_same_training(traces, expected, EXPERT_TOLERANCE)
    assert any("expert_bias" in name for name in expected.names)


def test_qwen3_with_tied_weights_equals_one_process(
    checkpoints: dict[tuple[str, int], tuple[Path, Trace]],
) -> None:
    """qwen3 ties its embeddings; sharding it keeps them one parameter."""
    config = tiny("qwen3", dp_shard=2)
    path, expected = one_process(checkpoints, config)
    assert_same_training(run_ranks(2, continued, config, path), expected, DENSE_TOLERANCE)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(
    mode: str, checkpoints: dict[tuple[str, int], tuple[Path, Trace]]
) -> None:
    """Recomputing activations gives the same training and the same tensor names."""
    config = with_training(tiny(dp_shard=2), activation_checkpoint=mode)
    path, expected = one_process(checkpoints, config)
    assert_same_training(run_ranks(2, continued, config, path), expected, DENSE_TOLERANCE)


@pytest.mark.long
def test_compiled_equals_eager(checkpoints: dict[tuple[str, int], tuple[Path, Trace]]) -> None:
    """torch.compile keeps the training within tolerance."""
    config = with_training(tiny(dp_shard=2), compile=True)
    path, expected = one_process(checkpoints, config)
    assert_same_training(run_ranks(2, continued, config, path, timeout_s=500), expected, DENSE_TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        tiny(dp_shard=2, tp=2),
        tiny(pp=2, dp_shard=2),
        tiny("deepseek_v3", dp_shard=2, ep=2),
        pytest.param(tiny("qwen3", tp=2), marks=pytest.mark.long),
        pytest.param(tiny("deepseek_v3", dp_shard=2, tp=2, ep=4), marks=pytest.mark.long),
        pytest.param(tiny("deepseek_v3", layers=3, pp=2, dp_shard=2, ep=2), marks=pytest.mark.long),
        pytest.param(tiny("deepseek_v3", dp_replicate=2, dp_shard=2, ep=2), marks=pytest.mark.long),
        pytest.param(tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"), marks=pytest.mark.long),
    ],
    ids=["fsdp2_tp2", "pp2_fsdp2", "ep2", "tied_tp2", "fsdp2_tp2_ep4", "pp2_fsdp2_ep2", "hsdp2x2_ep2", "interleaved"],
)
def test_initial_weights_do_not_depend_on_the_layout(config: JobConfig) -> None:
    """The seed alone decides the initial weights, bit for bit."""
    alone = run_ranks(1, initial_values, tiny(config.model.family, layers=config.model.layers))[0]
    parts = run_ranks(world_size_of(config.parallelism), initial_values, config)
    for part in parts:
        assert part == {name: alone[name] for name in part}
    assert set().union(*parts) == alone.keys()


@pytest.mark.parametrize(
    "config",
    [tiny(dp_shard=2), tiny(pp=2, dp_shard=2), tiny("deepseek_v3", dp_shard=2, ep=2)],
    ids=["fsdp2", "pp2_fsdp2", "ep2"],
)
def test_a_run_repeats_bit_for_bit(config: JobConfig) -> None:
    """The same layout twice gives the same bytes on every rank."""
    size = world_size_of(config.parallelism)
    first, second = (run_ranks(size, fresh, config, 3) for _ in range(2))
    assert [trace.digest for trace in first] == [trace.digest for trace in second]
    assert first[0].losses == second[0].losses


SKIPPED = {"fsdp2": tiny(dp_shard=2), "ep2": tiny("deepseek_v3", dp_shard=2, ep=2)}


@pytest.mark.parametrize("name", SKIPPED)
def test_discarded_update_leaves_nothing_behind(name: str) -> None:
    """Parameters, moments and expert counters are bitwise what they were."""
    for before, after in run_ranks(2, discarded, SKIPPED[name]):
        assert before == after


@pytest.mark.parametrize("name", SKIPPED)
def test_run_with_a_discarded_update_equals_one_without(name: str) -> None:
    """A bad batch before step 2 does not show in steps 2 and 3, nor in the final bytes."""
    clean = run_ranks(2, fresh, SKIPPED[name], 4)
    skipped = run_ranks(2, fresh, SKIPPED[name], 4, 2)
    assert [trace.digest for trace in clean] == [trace.digest for trace in skipped]
    assert clean[0].losses == skipped[0].losses


@pytest.mark.parametrize("name", SKIPPED)
def test_state_restores_a_run_bit_for_bit(name: str) -> None:
    """Copying the live tensors of `state()` into an engine without initial weights is all that resuming needs."""
    for undisturbed, resumed in run_ranks(2, restored, SKIPPED[name]):
        assert undisturbed == resumed
