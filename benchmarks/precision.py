"""`python -m benchmarks.precision`: the loss over 300 steps in bf16 and in each recipe, from the same weights and data.

Ends with 1 if a recipe's loss at the end is off by more than its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.common import JOB, console, show, small_corpus, workspace
from benchmarks.plainloop import build, read_from
from benchmarks.results import Result, Series, machine, now, ratio, series, settings, versions, write_result
from configs.load import load_job
from configs.precision import LOW
from configs.schema import JobConfig, PrecisionConfig
from parallelism.mesh import World
from parallelism.schedule import learning_rate

FIXED = {
    "layers": 3, "vocab_size": 1024, "seq_len": 64, "global_batch_size": 8, "microbatch_size": 8, "ranks": 1,
}  # fmt: skip
LAST = 50
WARMUP = 20
# How far the mean loss of the last steps may be from bf16's, as a part of it. Runs in fp32 and bf16 differ too: that is
# what a difference must be held against.
BOUNDS: Mapping[str, float] = {
    "fp32": 0.01, "fp8_current": 0.01, "fp8_block": 0.01, "fp8_delayed": 0.01, "mxfp8": 0.01, "nvfp4": 0.03,
}  # fmt: skip

NOTES = (
    "one process on CPU, numbers emulated (precision.backend = emulated): what is measured is what a recipe does to "
    "the training, not its speed.",
    "all linear layers are converted, first and last ones too (precision.keep_first_layers and keep_last_layers = 0): "
    "harsher than the default. What is not converted is computed in bf16, in fp32 in the run called so.",
    f"loss: of the last {LAST} steps; the ratio is that of the medians, the bound is on the means.",
)


def main() -> int:
    """Train, show, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of each recipe")
    parser.add_argument("--recipes", nargs="*", default=list(BOUNDS), help="which ones beside bf16")
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it runs at all")
    options = parser.parse_args()
    if options.quick:
        options.steps = WARMUP
    here, taken_at, began_s = machine(), now(), time.monotonic()
    found: dict[str, list[float]] = {}
    with workspace("precision") as place:
        store = dist.FileStore(str(place.disk / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        job = place.disk / "job.toml"
        job.write_text(
            JOB.format(corpus=small_corpus(place.disk / "corpus", FIXED["vocab_size"]), steps=options.steps, **FIXED)
        )
        for recipe in ("bf16", *options.recipes):
            step_began_s = time.monotonic()
            found[recipe] = losses(in_recipe(_job(job), recipe))
            step_s = (time.monotonic() - step_began_s) / options.steps
            console.print(f"{recipe}: loss {found[recipe][0]:.4f} -> {end(found[recipe]):.4f}, {step_s:.2f} s a step")
        dist.destroy_process_group()
    result = Result(
        benchmark="precision",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**FIXED, "steps": options.steps, "schedule": f"cosine, {WARMUP} steps of warm-up, lr 1e-3"}),
        series=tuple(_series(recipe, values) for recipe, values in found.items()),
        ratios=tuple(ratio(f"loss of {each}", _series(each, found[each]), _series("bf16", found["bf16"]))
                     for each in options.recipes),
        notes=(*NOTES, *(f"{each}: {_verdict(each, found)}" for each in options.recipes)),
    )  # fmt: skip
    show(result)
    if options.quick:
        return 0
    console.print(f"written to {write_result(result)}")
    return int(any(off(found[each], found["bf16"]) > BOUNDS[each] for each in options.recipes))


def in_recipe(config: JobConfig, recipe: str) -> JobConfig:
    """The job in a recipe, all of its layers converted, the rest in bf16."""
    values: dict[str, object] = {"recipe": recipe, "param_dtype": "bf16", "keep_first_layers": 0, "keep_last_layers": 0}
    if recipe in LOW:
        values["backend"] = "emulated"
    else:
        values["param_dtype"] = recipe
    return msgspec.structs.replace(config, precision=msgspec.convert(values, PrecisionConfig))


def losses(config: JobConfig) -> list[float]:
    """The loss of each step of a training in this process, which is a process group of its own."""
    torch.set_num_threads(1)
    engine = build(config, World(0, 1, 0, torch.device("cpu")))
    loop, found = read_from(config, engine, 1), []
    try:
        for step in range(1, config.training.steps + 1):
            batch = loop.data.get(step)
            engine.seed_step(step)
            loss, _ = engine.global_loss(engine.forward_backward(torch.from_numpy(batch.tokens)))
            engine.clip_grad_norm(config.training.max_grad_norm)
            engine.optimizer_step(learning_rate(config.optimizer, config.training.steps, step), step)
            found.append(loss)
    finally:
        loop.data.close()
    return found


def end(values: list[float]) -> float:
    """Mean of the last steps."""
    return statistics.fmean(values[-LAST:])


def off(values: list[float], base: list[float]) -> float:
    """How far the end is from another's, as a part of that."""
    return abs(end(values) - end(base)) / end(base)


def _verdict(recipe: str, found: Mapping[str, list[float]]) -> str:
    difference, bound = off(found[recipe], found["bf16"]), BOUNDS[recipe]
    words = "within" if difference <= bound else "BEYOND"
    return f"off by {100 * difference:.2f} % of bf16's loss at the end, {words} the bound of {100 * bound:g} %"


def _series(recipe: str, values: list[float]) -> Series:
    return series(recipe, "loss", "nats", values[-LAST:])


def _job(path: Path) -> JobConfig:
    return load_job(str(path), ["--optimizer.schedule", "cosine", "--optimizer.warmup_steps", str(WARMUP)])


if __name__ == "__main__":
    sys.exit(main())
