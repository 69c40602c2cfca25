"""The ranks' side of `test_waiting`: a few timed steps in which one rank takes longer."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from configs.schema import JobConfig
from parallelism.clock import HostClock, Part, Split, running_clock
from parallelism.engine import build_engine
from parallelism.mesh import World
from parallelism.waiting import HostWaits, timing
from tests.distributed.layouts import batch


def split_steps(world: World, config: JobConfig, slow_rank: int, sleep_s: float, steps: int = 3) -> list[Split]:
    """Train; in each forward of the slow rank it sleeps once. The first step is not measured."""
    engine = build_engine(config, world)
    splits: list[Split] = []
    if world.rank == slow_rank:
        engine.parts[0].register_forward_pre_hook(lambda *_: time.sleep(sleep_s), prepend=True)
    with running_clock(world.device, engine.parts if engine.schedule is not None else ()) as clock:
        engine.clock = clock
        for step in range(1, steps + 1):
            engine.seed_step(step)
            # What the ranks' own skew of the step before adds must not count here.
            dist.barrier()
            clock.begin(step)
            engine.forward_backward(batch(engine, step))
            engine.clip_grad_norm(1.0)
            engine.optimizer_step(1e-3, step)
            split = clock.finish()
            assert split is not None
            splits.append(split)
    return splits[1:]


def waits_of_each_kind(world: World, sleep_s: float) -> dict[str, float]:
    """Seconds that this rank was seen to wait in each kind of wait; rank 0 is late each time."""
    found: dict[str, float] = {}
    waits = HostWaits()
    group: Any = dist.group.WORLD
    value = torch.ones(4)

    @contextlib.contextmanager
    def late(name: str) -> Any:
        dist.barrier()
        before_s = waits.seconds
        if world.rank == 0:
            time.sleep(sleep_s)
        yield
        found[name] = waits.seconds - before_s

    with timing(waits):
        with late("all_reduce"):
            dist.all_reduce(value)
        with late("functional"):
            _ = functional.all_reduce(value, "sum", group) + 1
        with late("operator"):
            torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(value, "sum", "0"))
        with late("send and receive"):
            peer = 1 - world.rank
            kind = dist.isend if world.rank == 0 else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(kind, value, peer)]):
                work.wait()
    outside_s = waits.seconds
    if world.rank == 0:
        time.sleep(sleep_s)
    dist.barrier()
    found["outside"] = waits.seconds - outside_s
    return found


def paused_and_waiting(world: World, sleep_s: float) -> Split:
    """A step with a pause, a wait that is no collective, and a part that computes while it also waits."""
    clock = HostClock(HostWaits())
    with timing(clock.waits):
        clock.begin(7)
        time.sleep(sleep_s)
        clock.switch(Part.OPTIMIZER)
        if world.rank == 0:
            time.sleep(2 * sleep_s)
        dist.barrier()
        clock.switch(Part.WAIT)
        time.sleep(sleep_s)
        with clock.paused():
            time.sleep(3 * sleep_s)
        split = clock.finish()
    assert split is not None
    return split
