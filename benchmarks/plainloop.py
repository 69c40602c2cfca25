"""Everstep's engine and data under a plain loop, without anything of Everstep's that survives faults.

What peers and bare loops are made of, so that both sides of a benchmark compute the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World
from parallelism.schedule import learning_rate
from trainer.data import Prefetcher, StepReader


@dataclass(frozen=True)
class PlainLoop:
    """An engine and where its batches come from."""

    config: JobConfig
    engine: Engine
    data: Prefetcher

    def compute(self, step: int) -> None:
        """Read, forward, backward, clip: everything of a step that leaves the weights as they are."""
        batch = self.data.get(step)
        self.engine.seed_step(step)
        self.engine.forward_backward(torch.from_numpy(batch.tokens))
        self.engine.clip_grad_norm(self.config.training.max_grad_norm)

    def update(self, step: int) -> None:
        """The optimizer's part of a step."""
        self.engine.optimizer_step(learning_rate(self.config.optimizer, self.config.training.steps, step), step)


def join_group() -> World:
    """Join the gloo group of torchrun's environment."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), torch.device("cpu"))


def build(config: JobConfig, world: World, init_weights: bool = True) -> Engine:
    """The engine. Collective."""
    return build_engine(config, world, init_weights=init_weights)


def read_from(config: JobConfig, engine: Engine, first_step: int) -> PlainLoop:
    """Put the engine and its data together, to go on at first_step."""
    vocab_size = config.model.vocab_size or FAMILIES[config.model.family][config.model.flavor].vocab_size
    reader = StepReader(config, engine.dp_rank, engine.dp_degree, vocab_size)
    data = Prefetcher(reader, first_step, config.training.steps, config.data.prefetch_steps)
    return PlainLoop(config, engine, data)
