"""Promise: a recipe that cannot run is refused before anything starts, with the key, the value and what to set."""

from __future__ import annotations

import copy
import re

import msgspec
import pytest
import torch

from configs.check_precision import check_precision
from configs.models import FAMILIES
from configs.precision import LOW, lowered_to, safer_than
from configs.schema import JobConfig, PrecisionConfig
from parallelism.lowp import build_lowp
from parallelism.lowp_state import Lowp, ScalesState, reuses_weights
from parallelism.precision import Card, Precision, choose
from tests.distributed.layouts import tiny, with_training
from trainer.metrics import peak_tflops

CPU = Card("this CPU", None, gpu=False)
AMD = Card("AMD Instinct MI300X", None)
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0))
B200 = Card("NVIDIA B200", (10, 0))
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0))
CONSUMER = Card("NVIDIA GeForce RTX 5090", (12, 0))
ALL = frozenset({"te", "torchao", "emulated"})


def job(recipe: str = "fp8_current", family: str = "llama3", layers: int = 4, **precision: object) -> JobConfig:
    base = tiny(family, layers=layers)
    return msgspec.structs.replace(base, precision=msgspec.convert({"recipe": recipe, **precision}, PrecisionConfig))


def complaints(config: JobConfig) -> list[str]:
    facts = FAMILIES[config.model.family][config.model.flavor]
    return [str(problem) for problem in check_precision(config, facts)]


# What the configuration alone says -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["auto", "fp32", "bf16", *LOW])
def test_every_recipe_is_accepted_as_it_is(recipe: str) -> None:
    """No other key need be set."""
    assert complaints(job(recipe)) == []


@pytest.mark.parametrize(
    ("config", "key", "fix"),
    [
        (job("fp32", param_dtype="bf16"), "precision.param_dtype", 'precision.recipe = "bf16"'),
        (job("bf16", backend="te"), "precision.backend", 'precision.backend = "auto"'),
        (job("fp8_block", backend="torchao"), "precision.backend", '"te" or "emulated"'),
        (job("fp8_delayed", backend="te"), "precision.backend", '"torchao" or "emulated"'),
        (job(layers=2), "precision.keep_first_layers", "at most 1"),
        (job(keep_first_layers=4), "precision.keep_first_layers", "at most 3"),
        (with_training(job(), seq_len=20, microbatch_size=1), "training.seq_len", "multiple of 16"),
        (with_training(job("mxfp8"), seq_len=16, microbatch_size=1), "training.seq_len", "multiple of 32"),
        (with_training(job(backend="emulated"), compile=True), "training.compile", "training.compile = false"),
        (with_training(job(backend="te"), compile=True), "training.compile", '"torchao"'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_fix(config: JobConfig, key: str, fix: str) -> None:
    """One line, that begins with the key and says what to set."""
    (line,) = complaints(config)
    assert line.startswith(f"{key} = ")
    assert fix in line


# What the card and the installed packages say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "card", "installed", "expected"),
    [
        (job("auto"), CPU, ALL, Precision("fp32", "", "fp32")),
        (job("auto"), A100, ALL, Precision("bf16", "", "bf16")),
        (job("auto"), AMD, ALL, Precision("bf16", "", "bf16")),
        (job("auto", param_dtype="bf16"), CPU, ALL, Precision("bf16", "", "bf16")),
        (job("fp32"), H100, ALL, Precision("fp32", "", "fp32")),
        (job("fp8_current"), CPU, ALL, Precision("fp8_current", "emulated", "fp32")),
        (job("fp8_current", backend="torchao"), CPU, ALL, Precision("fp8_current", "torchao", "fp32")),
        (job("fp8_current"), H100, ALL, Precision("fp8_current", "te", "bf16")),
        (job("fp8_current"), H100, ALL - {"te"}, Precision("fp8_current", "torchao", "bf16")),
        (with_training(job("fp8_current"), compile=True), H100, ALL, Precision("fp8_current", "torchao", "bf16")),
        (job("fp8_delayed"), H100, ALL, Precision("fp8_delayed", "torchao", "bf16")),
        (job("fp8_block"), H100, ALL, Precision("fp8_block", "te", "bf16")),
        (job("nvfp4"), B200, ALL, Precision("nvfp4", "te", "bf16")),
        (job("nvfp4", backend="emulated"), A100, ALL, Precision("nvfp4", "emulated", "bf16")),
    ],
)
def test_the_best_that_is_there_is_taken(
    config: JobConfig, card: Card, installed: frozenset[str], expected: Precision
) -> None:
    """Emulation on a GPU only for those who ask for it."""
    assert choose(config, card, installed) == expected


@pytest.mark.parametrize(
    ("config", "card", "installed", "says"),
    [
        (job("fp8_current"), A100, ALL, ("8.9", "A100", "has 8.0", 'precision.recipe = "bf16"')),
        (job("mxfp8"), H100, ALL, ("10.0", "H100", '"fp8_current" or "fp8_block"')),
        (job("mxfp8"), CONSUMER, ALL, ("below 12.0", "has 12.0")),
        (job("nvfp4"), H100, ALL, ("10.0", "has 9.0")),
        (job("fp8_current", backend="te"), CPU, ALL, ("needs an NVIDIA GPU", "this CPU", '"emulated"')),
        (job("fp8_current"), AMD, ALL, ("needs an NVIDIA GPU", "MI300X", '"bf16"')),
        (job("fp8_block"), H100, ALL - {"te"}, ("transformer_engine is not installed",)),
        (job("fp8_current", backend="torchao"), CPU, frozenset({"emulated"}), ("torchao is not installed",)),
        (with_training(job("fp8_block"), compile=True), H100, ALL, ("training.compile = false",)),
        (with_training(job("fp8_block"), compile=True), CPU, ALL, ("training.compile = false",)),
    ],
)
def test_what_cannot_run_here_is_refused(
    config: JobConfig, card: Card, installed: frozenset[str], says: tuple[str, ...]
) -> None:
    """The text names what is asked for, what is there, and what to set."""
    with pytest.raises(ValueError, match=r"^(precision\.\w+|training\.compile) = ") as error:
        choose(config, card, installed)
    assert all(part in str(error.value) for part in says), str(error.value)


def test_transformer_engine_that_does_not_load_is_an_error_and_no_silence() -> None:
    """Here it is not even installed; where it is without a GPU, it fails in other ways."""
    with pytest.raises(ValueError, match=r'precision\.backend = "te": Transformer Engine does not load here'):
        build_lowp(job(), Precision("fp8_current", "te", "bf16"), torch.device("cpu"))


# Which modules -----------------------------------------------------------------------------------------------------


def sites_of(config: JobConfig) -> list[str]:
    """Names of what would be converted, as the engine does it."""
    from parallelism import titan

    device = torch.device("cpu")
    titan.prepare_process(device)
    lowp = build_lowp(config, Precision(config.precision.recipe, "emulated", "fp32"), device)
    assert isinstance(lowp, Lowp)
    titan.blueprint(config, device, lowp)
    return [site.name for site in lowp.sites]


def test_first_and_last_layers_head_and_routers_stay_as_they_are() -> None:
    """The rule without any key."""
    dense = sites_of(job())
    assert {name.split(".")[1] for name in dense} == {"1", "2"}
    assert {name.rpartition(".")[2] for name in dense} == {"wqkv", "wo", "w1", "w2", "w3"}
    experts = sites_of(job(family="deepseek_v3"))
    assert not [name for name in experts if "router" in name or "head" in name]
    assert [name for name in experts if name.endswith("inner_experts.w1")]


def test_named_modules_stay_too() -> None:
    """By any part of their path."""
    kept = sites_of(job(keep_modules=["wo", "feed_forward"], keep_first_layers=0, keep_last_layers=0))
    assert {name.rpartition(".")[2] for name in kept} == {"wqkv"}
    assert len(kept) == 4


def test_asked_for_but_inactive_is_an_error() -> None:
    """A recipe under which nothing is left to convert."""
    with pytest.raises(ValueError, match=r"no module is left to convert; set precision\.keep_first_layers"):
        sites_of(job(keep_modules=["attention", "feed_forward"]))


def test_dims_that_the_recipe_cannot_have_are_named() -> None:
    """With how to leave the module out; what tp cuts is counted as each rank has it."""
    wide = msgspec.structs.replace(job("mxfp8"), parallelism=msgspec.structs.replace(tiny().parallelism, tp=8))
    assert sites_of(wide)
    too_wide = msgspec.structs.replace(wide, parallelism=msgspec.structs.replace(tiny().parallelism, tp=16))
    named = "layers.1.attention.qkv_linear.wqkv: its 768 outputs over parallelism.tp = 16 are no multiple of 32"
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        sites_of(msgspec.structs.replace(too_wide, precision=job("mxfp8", keep_modules=["wo"]).precision))
    assert str(error.value).endswith('set precision.keep_modules = ["wo", "wqkv"]')


def test_torchao_refuses_experts_that_it_would_scale_otherwise() -> None:
    """Not honoured is not done in silence."""
    from parallelism import titan

    config, device = job(family="deepseek_v3"), torch.device("cpu")
    titan.prepare_process(device)
    lowp = build_lowp(config, Precision("fp8_current", "emulated", "fp32"), device)
    assert lowp is not None
    lowp.precision = Precision("fp8_current", "torchao", "fp32")
    with pytest.raises(ValueError, match=r"another recipe; set precision\.keep_modules = \[.*inner_experts"):
        titan.blueprint(config, device, lowp)


def test_what_a_run_begins_with_has_room_for_scales() -> None:
    """An import writes them as zeros, under the name and in the shape that an engine has; no other recipe has any."""
    from checkpointing.contents import Wanted, fresh_tensors
    from parallelism.outline import outline

    config = job("fp8_delayed", amax_history_steps=5)
    (scales,) = fresh_tensors(outline(config))
    assert scales == Wanted("precision.amax_history", torch.float32, (len(sites_of(config)), 3, 5))
    assert [f"precision.{name}" for name in ScalesState(torch.zeros(1)).state_dict()] == [scales.name]
    assert fresh_tensors(outline(job("fp8_current"))) == []


# The rest ----------------------------------------------------------------------------------------------------------


def test_weights_are_kept_where_they_are_whole_anyway() -> None:
    """Kept ones take a byte a parameter, which sharding was to save."""
    assert reuses_weights(job())
    assert not reuses_weights(msgspec.structs.replace(job(), parallelism=tiny(dp_shard=2).parallelism))
    assert not reuses_weights(job(reuse_weights="off"))
    forced = msgspec.structs.replace(job(reuse_weights="on"), parallelism=tiny(dp_shard=2).parallelism)
    assert reuses_weights(forced)


def test_copies_of_a_model_share_their_state() -> None:
    """Stages of a pipeline are cut from copies."""
    lowp = build_lowp(job(), Precision("fp8_delayed", "emulated", "fp32"), torch.device("cpu"))
    assert lowp is not None
    site = lowp.add_site("a")
    assert copy.deepcopy(site) is site
    assert copy.deepcopy({"x": lowp})["x"] is lowp


@pytest.mark.parametrize("recipe", LOW)
def test_a_recipe_can_be_left_for_what_the_rest_is_computed_in(recipe: str) -> None:
    """On GPUs that is bf16; with no word from the supervisor nothing changes."""
    config = job(recipe)
    assert lowered_to(config, "") is config
    left = lowered_to(config, safer_than(recipe))
    assert choose(left, B200, ALL) == Precision("bf16", "", "bf16")
    assert choose(left, CPU, ALL) == Precision("fp32", "", "fp32")
    assert safer_than(left.precision.recipe) == ""


def test_peaks_are_those_of_the_format() -> None:
    """Twice that of bf16 for 8 bits; unknown stays unknown."""
    assert peak_tflops(H100.name) == 989.0
    assert peak_tflops(H100.name, 8) == 1979.0
    assert peak_tflops(H100.name, 4) is None
    assert peak_tflops("NVIDIA GB200", 4) == 10000.0
    assert peak_tflops("a CPU", 8) is None
