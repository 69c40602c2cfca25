"""Promise: a recipe computes the same on every layout, repeats bit for bit, and resumes from tensors alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from configs.schema import JobConfig, PrecisionConfig
from parallelism.engine import build_engine
from parallelism.mesh import World, world_size_of
from tests.distributed.layouts import (
    Trace,
    batch,
    continued,
    fresh,
    reference,
    restored,
    tiny,
    with_training,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

# Relative, for losses; gradient norms get ten times as much. Which rows share a scale depends on the layout, so numbers
# near the format's smallest do; those of FP4, whose scales are no powers of two, all move a little.
TOLERANCE = {"fp8_current": 2e-5, "fp8_delayed": 2e-5, "fp8_block": 2e-5, "mxfp8": 2e-5, "nvfp4": 1e-3}
EXPERT_TOLERANCE = 1e-3


def low(config: JobConfig, recipe: str, **precision: object) -> JobConfig:
    """The job in a recipe, in all layers."""
    values = {"recipe": recipe, "keep_first_layers": 0, "keep_last_layers": 0, **precision}
    return msgspec.structs.replace(config, precision=msgspec.convert(values, PrecisionConfig))


def assert_near(traces: list[Trace], expected: Trace, tolerance: float) -> None:
    """All ranks agree bit for bit, and with one process within a relative tolerance."""
    assert all((trace.losses, trace.norms) == (traces[0].losses, traces[0].norms) for trace in traces)
    assert traces[0].losses == pytest.approx(expected.losses, rel=tolerance)
    assert traces[0].norms == pytest.approx(expected.norms, rel=10 * tolerance)
    assert set().union(*(trace.names for trace in traces)) == set(expected.names)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Trace]]:
    """By recipe and family: what one process saved, and what it saw afterwards. Filled on demand."""
    return {"": (tmp_path_factory.mktemp("lowp"), Trace([], [], [], "", []))}


def one_process(checkpoints: dict[str, tuple[Path, Trace]], config: JobConfig) -> tuple[Path, Trace]:
    recipe, family = config.precision.recipe, config.model.family
    key = f"{recipe}-{family}-{config.model.layers}"
    if key not in checkpoints:
        alone = msgspec.structs.replace(config, parallelism=tiny().parallelism)
        path = checkpoints[""][0] / f"{key}.safetensors"
        checkpoints[key] = path, run_ranks(1, reference, alone, path)[0]
    return checkpoints[key]


LAYOUTS = {
    "fsdp2": tiny(dp_shard=2),
    "tp2": tiny(tp=2),
    "pp2": tiny(pp=2),
    "fsdp2_tp2": tiny(dp_shard=2, tp=2),
    "pp2_interleaved": tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"),
}
SHORT = {("fsdp2_tp2", "fp8_delayed")}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=[] if (name, recipe) in SHORT else [pytest.mark.long])
        for name in LAYOUTS
        for recipe in TOLERANCE
    ],
)
def test_a_recipe_on_any_layout_equals_one_process(
    name: str, recipe: str, checkpoints: dict[str, tuple[Path, Trace]]
) -> None:
    """From one shared state, scales of past steps included."""
    config = low(LAYOUTS[name], recipe)
    path, expected = one_process(checkpoints, config)
    assert_near(run_ranks(world_size_of(config.parallelism), continued, config, path), expected, TOLERANCE[recipe])
    assert ("precision.amax_history" in expected.names) == (recipe == "fp8_delayed")


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        pytest.param("fp8_current", {"dp_shard": 2, "ep": 2}, id="fp8_current-ep2"),
        pytest.param("fp8_delayed", {"dp_shard": 2, "ep": 2}, id="fp8_delayed-ep2", marks=pytest.mark.long),
        pytest.param("mxfp8", {"dp_shard": 2, "tp": 2, "ep": 4}, id="mxfp8-fsdp2_tp2_ep4", marks=pytest.mark.long),
        pytest.param("fp8_block", {"tp": 2}, id="fp8_block-tp2", marks=pytest.mark.long),
    ],
)
def test_experts_on_any_layout_equal_one_process(
    recipe: str, layout: dict[str, int], checkpoints: dict[str, tuple[Path, Trace]]
) -> None:
    """Experts and the latent attention's matrices, which no axis cuts."""
    config = low(tiny("deepseek_v3", **layout), recipe)
    path, expected = one_process(checkpoints, config)
    traces = run_ranks(world_size_of(config.parallelism), continued, config, path)
    assert_near(traces, expected, EXPERT_TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
def test_recomputed_activations_are_rounded_to_the_same(recipe: str, mode: str) -> None:
    """Bit for bit the training without checkpointing."""
    plain = low(tiny(), recipe)
    (kept,) = run_ranks(1, fresh, plain, 3)
    (recomputed,) = run_ranks(1, fresh, with_training(plain, activation_checkpoint=mode), 3)
    assert recomputed.digest == kept.digest


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("nvfp4", {"dp_shard": 2}), ("fp8_delayed", {"pp": 2}), ("fp8_delayed", {"dp_shard": 2, "tp": 2})],
    ids=["nvfp4-fsdp2", "fp8_delayed-pp2", "fp8_delayed-fsdp2_tp2"],
)
def test_a_run_repeats_bit_for_bit(recipe: str, layout: dict[str, int]) -> None:
    """Rounding by chance included."""
    config = low(tiny(**layout), recipe)
    size = world_size_of(config.parallelism)
    first, second = (run_ranks(size, fresh, config, 3) for _ in range(2))
    assert [trace.digest for trace in first] == [trace.digest for trace in second]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["fp8_delayed", "nvfp4", "fp8_current"])
def test_state_restores_a_run_bit_for_bit(recipe: str) -> None:
    """Copying the live tensors of `state()` is all that resuming needs."""
    for undisturbed, resumed in run_ranks(2, restored, low(tiny(dp_shard=2), recipe)):
        assert undisturbed == resumed


def test_a_discarded_batch_leaves_nothing_behind_on_any_stage() -> None:
    """Nor do the trial runs of a pipeline: no scale of theirs becomes history."""
    config = low(tiny(pp=2), "fp8_delayed")
    clean, skipped = run_ranks(2, fresh, config, 3), run_ranks(2, fresh, config, 3, 2)
    assert [trace.digest for trace in clean] == [trace.digest for trace in skipped]


# Of the loss, which halves in these steps; rounding by chance moves it more.
CURVES = {"fp8_current": 0.01, "fp8_delayed": 0.01, "fp8_block": 0.01, "mxfp8": 0.01, "nvfp4": 0.05}


def curves(world: World, steps: int) -> dict[str, list[float]]:
    """The losses of each recipe, and of fp32, on one batch that is learnt by heart, from the same weights."""
    found = {}
    for recipe in ("fp32", *CURVES):
        engine = build_engine(low(tiny(layers=1), recipe), world)
        found[recipe] = []
        for step in range(steps):
            engine.seed_step(step)
            found[recipe].append(engine.global_loss(engine.forward_backward(batch(engine, 0)))[0])
            engine.clip_grad_norm(1.0)
            engine.optimizer_step(1e-3, step + 1)
    return found


def test_every_recipe_learns_as_fp32_does() -> None:
    """`make bench-precision` in short: the loss falls along the same curve, and is not the very same."""
    (found,) = run_ranks(1, curves, 8)
    exact = found.pop("fp32")
    assert exact[-1] < 0.7 * exact[0]
    for recipe, losses in found.items():
        assert losses == pytest.approx(exact, rel=CURVES[recipe]), recipe
        assert losses != exact


@pytest.mark.long
def test_kept_weights_change_nothing() -> None:
    """Rounded once a step or for each microbatch: the same bytes."""
    config = low(tiny(dp_shard=2, microbatch_size=1), "mxfp8")
    traces = [run_ranks(2, fresh, low(config, "mxfp8", reuse_weights=word), 3) for word in ("on", "off")]
    assert [trace.digest for trace in traces[0]] == [trace.digest for trace in traces[1]]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["fp8_current", "mxfp8"])
def test_torchao_trains_on_a_layout_as_the_emulation_does(recipe: str) -> None:
    """The same bytes over FSDP2 and tp."""
    pytest.importorskip("torchao")
    config = tiny(dp_shard=2, tp=2)
    traces = [run_ranks(4, fresh, low(config, recipe, backend=each), 3) for each in ("emulated", "torchao")]
    assert [trace.digest for trace in traces[0]] == [trace.digest for trace in traces[1]]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["fp8_current", "fp8_delayed", "mxfp8"])
def test_torchao_can_be_compiled(recipe: str) -> None:
    """A block is traced as a whole, and trains as the eager one does."""
    pytest.importorskip("torchao")
    eager = low(tiny(layers=1), recipe, backend="torchao")
    compiled = with_training(eager, compile=True)
    (one,), (other,) = (run_ranks(1, fresh, config, 3, timeout_s=500) for config in (eager, compiled))
    assert other.losses == pytest.approx(one.losses, rel=TOLERANCE[recipe])
