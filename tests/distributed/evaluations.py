"""The ranks' side of the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import JobConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World
from tests.distributed.layouts import VOCAB, Trace, batch, digest, live_tensors, load_whole, local_of, train
from trainer.events import Heart, HeartbeatFile, Phase
from trainer.validation import build_validation

HELD_OUT = 5_000


def evaluated(world: World, config: JobConfig, path: Path) -> list[float]:
    """Mean losses of two held-out batches, from weights that `reference` saved."""
    engine = build_engine(config, world, init_weights=False)
    load_whole(engine, path)
    return [evaluate(engine, number) for number in range(2)]


def trained(world: World, config: JobConfig, evaluate_after: frozenset[int]) -> tuple[Trace, list[str]]:
    """Four steps from initial weights with evaluations after some of them; what was found to change during those."""
    engine = build_engine(config, world)
    losses, changed = [], []
    for step in range(4):
        losses.append(train(engine, range(step, step + 1)).losses[0])
        if step in evaluate_after:
            before = _surroundings(engine)
            again = [evaluate(engine, number) for number in (0, 1, 0)]
            if again[0] != again[2]:
                changed.append(f"step {step}: the same batch has loss {again[0]} and then {again[2]}")
            changed += [
                f"step {step}: {name}" for name, value in _surroundings(engine).items() if value != before[name]
            ]
    tensors = live_tensors(engine)
    return Trace(losses, [], [], digest(tensors), sorted(tensors)), changed


def counted_before_a_step(world: World, config: JobConfig) -> list[float]:
    """Tokens that each layer's experts have counted after one forward and backward, over all ranks' own counters."""
    engine = build_engine(config, world)
    engine.forward_backward(batch(engine, 0))
    return [float(local_of(counter).sum()) for counter in engine.expert_counters]


def measured(world: World, config: JobConfig, folder: Path) -> tuple[list[float | None], Phase]:
    """The validation loss before a step, again, and after it; and the phase in which that was."""
    engine = build_engine(config, world)
    slots = HeartbeatFile(folder / f"heart-{world.world_size}-{world.rank}", 1).open()
    heart = Heart(slots, 0, 1)
    validation = build_validation(config, engine, heart, None, VOCAB)
    assert validation is not None
    losses = [validation.measure().loss, validation.measure().loss]
    train(engine, range(1))
    losses.append(validation.measure().loss)
    beat = slots.read(0)
    assert beat is not None
    return losses, beat.phase


def evaluate(engine: Engine, number: int) -> float:
    """Mean loss of a held-out batch."""
    average, _ = engine.global_loss(engine.evaluate(batch(engine, HELD_OUT + number)))
    return average


def _surroundings(engine: Engine) -> dict[str, object]:
    """All that training depends on beside the batch."""
    counters = {str(index): local_of(counter) for index, counter in enumerate(engine.expert_counters)}
    parameters = [parameter for part in engine.parts for parameter in part.parameters()]
    return {
        "state": digest(live_tensors(engine)),
        "counters": digest(counters),
        "gradients": sum(parameter.grad is not None for parameter in parameters),
        "generator": digest({"": torch.get_rng_state()}),
        "training mode": all(module.training for part in engine.parts for module in part.modules()),
        "grad mode": torch.is_grad_enabled(),
    }
