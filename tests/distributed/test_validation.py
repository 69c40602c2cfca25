"""A validation loss is the same on every layout, and measuring it leaves no trace in the training."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from configs.schema import DataConfig, DataSet, JobConfig, ValidationConfig
from parallelism.mesh import world_size_of
from tests.distributed.evaluations import counted_before_a_step, evaluated, measured, trained
from tests.distributed.layouts import BATCH, SEQ_LEN, VOCAB, reference, tiny
from tests.harness import run_ranks
from trainer.events import Phase
from trainer.indexed import CorpusWriter

pytestmark = pytest.mark.distributed

# Relative. Experts multiply in bf16, whose rounding flips with the order of sums.
TOLERANCE = 1e-5
LAYOUTS = {
    "accumulated": tiny(microbatch_size=1),
    "fsdp2": tiny(dp_shard=2),
    "tp2": tiny(tp=2),
    "pp2": tiny(pp=2),
    "pp2_fsdp2": tiny(pp=2, dp_shard=2),
    "pp2_interleaved": tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"),
    "ep2": tiny("deepseek_v3", dp_shard=2, ep=2),
    "experts_pp2": tiny("deepseek_v3", layers=3, pp=2),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, list[float]]]:
    """By family and layers: the weights that one process saved, and its validation losses. Filled on demand."""
    return {("folder", 0): (tmp_path_factory.mktemp("validation"), [])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_what_one_process_does(
    name: str, expected: dict[tuple[str, int], tuple[Path, list[float]]]
) -> None:
    """From the same weights, the same loss within rounding, and the very same number on all ranks."""
    config = LAYOUTS[name]
    key = (config.model.family, config.model.layers)
    if key not in expected:
        alone = tiny(config.model.family, layers=config.model.layers)
        path = expected["folder", 0][0] / f"{key[0]}-{key[1]}.safetensors"
        run_ranks(1, reference, alone, path)
        expected[key] = path, run_ranks(1, evaluated, alone, path)[0]
    path, losses = expected[key]
    found = run_ranks(world_size_of(config.parallelism), evaluated, config, path)
    assert all(each == found[0] for each in found)
    assert found[0] == pytest.approx(losses, rel=TOLERANCE)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["fsdp2", "pp2_interleaved", "ep2", "experts_pp2"])
def test_training_with_evaluations_gives_the_same_bytes(name: str) -> None:
    """Weights, moments, expert biases and losses are bit for bit those of a run that was never evaluated."""
    config = LAYOUTS[name]
    without = run_ranks(2, trained, config, frozenset())
    measured = run_ranks(2, trained, config, frozenset({0, 2}))
    assert [changed for _, changed in measured] == [[], []]
    assert [trace for trace, _ in measured] == [trace for trace, _ in without]


@pytest.mark.parametrize("name", ["ep2", "experts_pp2"])
def test_experts_count_the_tokens_of_the_step_alone(name: str) -> None:
    """Not those of the runs by which a pipeline learns its shapes: three experts a token, in each layer of experts."""
    counted = run_ranks(2, counted_before_a_step, LAYOUTS[name])
    ranks_of_a_layer = LAYOUTS[name].dp_degree
    tokens = BATCH * SEQ_LEN * 3 / ranks_of_a_layer
    assert [count for rank in counted for count in rank] == [tokens] * 2


def held_out(config: JobConfig, folder: Path, seed: int) -> JobConfig:
    """The job with validation on a corpus of its own, and no training data at all."""
    prefix = folder / f"held-out-{seed}"
    if not prefix.with_suffix(".bin").exists():
        writer = CorpusWriter(prefix, VOCAB)
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (40, SEQ_LEN))
        for document in tokens:
            writer.add(document)
        writer.finish()
    validation = ValidationConfig(sets=(DataSet(path=str(prefix)),), interval_steps=5, batches=3)
    return msgspec.structs.replace(config, data=DataConfig(sets=(), tokenizer=""), validation=validation)


def test_every_measurement_reads_the_same_samples(tmp_path: Path) -> None:
    """The loss repeats exactly until a step changes the weights, and is the same on one rank and on two."""
    alone = run_ranks(1, measured, held_out(tiny(), tmp_path, 1), tmp_path)[0]
    (first, again, later), phase = alone
    assert first == again
    assert later != first
    assert phase is Phase.VALIDATION
    one, other = run_ranks(2, measured, held_out(tiny(dp_shard=2), tmp_path, 1), tmp_path)
    assert one == other
    assert one[0] == pytest.approx(alone[0], rel=TOLERANCE)
    assert run_ranks(1, measured, held_out(tiny(), tmp_path, 2), tmp_path)[0][0][0] != first
