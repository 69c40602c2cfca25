"""Ranks that compute steps as the step loop does, with bits that flip where they are told to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from configs.schema import IntegrityConfig, JobConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World
from tests.distributed.layouts import batch, digest, live_tensors, local_of
from trainer.data import StepBatch
from trainer.events import Fact, FactKind, Heart, HeartbeatFile, WorkerStart
from trainer.integrity import CorruptionError, Integrity
from trainer.main import RankContext
from trainer.paths import facts_path, heartbeat_path
from trainer.replay import Replay

LR = 1e-3
SIGN, EXPONENT = 31, 30


class Told(msgspec.Struct, frozen=True):
    """What one rank saw: final hash of its state, accusations (step, rank), replays' words, steps found wrong."""

    digest: str
    blamed: list[tuple[int, int]]
    unnamed: list[str]
    replays: list[tuple[int, str]]
    distrusted: list[int]
    stopped: int


def flip(tensor: Tensor, bit: int, element: int = 5) -> None:
    """Flip one bit of one fp32 element in place."""
    flat = local_of(tensor).detach().reshape(-1)
    assert flat.data_ptr() == local_of(tensor).data_ptr()
    assert flat.dtype == torch.float32
    words = flat.view(torch.int32)
    words[element] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)


@contextlib.contextmanager
def flipped_gradient(times: int, bit: int = SIGN) -> Iterator[None]:
    """In the next `times` computations a bit of one of this rank's own gradients flips before it is sent."""
    reduce, left = _fsdp_param_group.foreach_reduce, times

    def flipping(fsdp_params: Any, unsharded_grads: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            flip(unsharded_grads[0], bit)
        return reduce(fsdp_params, unsharded_grads, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = flipping  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param_group.foreach_reduce = reduce


@contextlib.contextmanager
def flipped_activation(engine: Engine, times: int) -> Iterator[None]:
    """In the next `times` computations a bit of what a layer of this rank gives out flips in forward."""
    left = times

    def hook(module: Any, args: Any, output: Tensor) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            with torch.no_grad():
                flip(output, EXPONENT - 4)

    layers = next(iter(engine.parts[0].layers.values()))  # type: ignore[union-attr,operator]
    handle = layers.attention.wo.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Share:
    """Reads one dp rank's share of a step, as a reader of the corpus would."""

    def __init__(self, engine: Engine, dp_rank: int) -> None:
        self.engine = engine
        self.dp_rank = dp_rank

    def read(self, step: int) -> StepBatch:
        """The share, as the parity tests have it."""
        tokens = batch(self.engine, step, self.dp_rank).numpy()
        return StepBatch(step, step, (), tokens, 0, len(tokens), "")


class Driver:
    """One rank's loop."""

    def __init__(self, world: World, config: JobConfig, folder: Path, name: str, **integrity: Any) -> None:
        config = msgspec.structs.replace(config, integrity=IntegrityConfig(**integrity))
        here = folder / f"{name}-{world.rank}"
        here.mkdir()
        start = WorkerStart(run_dir=str(here), node=f"node{world.rank}", generation=1, ram_dir=str(here), ram_step=-1)
        heart = Heart(HeartbeatFile(heartbeat_path(here), 1).open(), 0, 1)
        self.context = RankContext(start, world.rank, 0, world.world_size, heart)
        self.engine = build_engine(config, world)
        self.integrity = Integrity(self.context, self.engine, config.integrity.interval_steps, 1)
        self.share = functools.partial(Share, self.engine)
        self.replay = Replay(self.context, config, self.engine, self.share, None)
        self.stopped = 0

    def step(self, step: int, held: Callable[[], None] = lambda: None, suspect: str = "") -> None:
        """One step. held: called between clipping and the check. suspect: its numbers are odd."""
        self.context.heart.step = step
        mine = self.share(self.engine.dp_rank).read(step)
        work = self.replay.first(mine)
        self.integrity.gradients_done(step)
        held()
        doubted = self.integrity.check(step, work.grad_norm, LR)
        if why := self.replay.reason(step, doubted, None) or suspect:
            work = self.replay.examine(mine, work, why)
            if doubted:
                self.integrity.agree(work.grad_norm, LR, split=False)
        if torch.isfinite(work.grad_norm):
            self.engine.optimizer_step(LR, step)
        else:
            self.engine.discard_update()
        self.integrity.remember(step + 1)

    def stop(self, step: int, held: Callable[[], None] = lambda: None, suspect: str = "") -> None:
        """One step, which must find that this generation cannot go on."""
        try:
            self.step(step, held, suspect)
        except CorruptionError as error:
            self.stopped = step
            if "rank" in str(error) and any(blamed == self.context.rank for _, blamed in self.told().blamed):
                dist.all_reduce(torch.zeros(1))  # what the others wait for, until this process is gone

    def told(self) -> Told:
        """All that was said, and the state as it is now."""
        path = facts_path(self.context.ram_dir, 0)
        lines = path.read_bytes().splitlines() if path.exists() else []
        facts = [msgspec.json.decode(line, type=Fact) for line in lines]
        found = [fact for fact in facts if fact.kind is FactKind.CORRUPTION_FOUND]
        return Told(
            digest(live_tensors(self.engine)),
            [(fact.step, fact.blamed) for fact in found if fact.blamed >= 0],
            [fact.detail for fact in found if fact.blamed < 0],
            [(fact.step, fact.detail) for fact in facts if fact.kind is FactKind.UPDATE_REPLAYED],
            [fact.step for fact in facts if fact.kind is FactKind.SNAPSHOT_DISTRUSTED],
            self.stopped,
        )


def undisturbed(world: World, config: JobConfig, folder: Path, steps: int) -> str:
    """The state after so many steps without any check."""
    driver = Driver(world, config, folder, "plain", interval_steps=0, replay_interval_steps=0)
    for step in range(1, steps + 1):
        driver.step(step)
    return driver.told().digest


def checked(world: World, config: JobConfig, folder: Path) -> tuple[str, Told]:
    """Every step is compared and replayed, and nothing is wrong."""
    right = undisturbed(world, config, folder, 3)
    driver = Driver(world, config, folder, "checked", interval_steps=1, replay_interval_steps=1)
    for step in range(1, 4):
        driver.step(step)
    return right, driver.told()


def flips(world: World, config: JobConfig, folder: Path) -> tuple[str, Told]:
    """Bits flip on the way: in gradients of ranks 1 and 3, in what rank 2 activates, in clipped gradients of rank 0."""
    right = undisturbed(world, config, folder, 5)
    driver = Driver(world, config, folder, "flips", interval_steps=1, replay_interval_steps=1)
    driver.step(1)
    with flipped_gradient(int(world.rank == 1)):
        driver.step(2)
    with flipped_gradient(int(world.rank == 3), EXPONENT):
        driver.step(3)
    with flipped_activation(driver.engine, int(world.rank == 2)):
        driver.step(4)

    def bend() -> None:
        gradient = driver.engine.gradients()[-1]
        if world.rank == 0 and gradient is not None:
            flip(gradient, 3)

    driver.step(5, held=bend)
    return right, driver.told()


def flipped_state(world: World, config: JobConfig, folder: Path) -> list[Told]:
    """A weight of rank 1, and in another run a moment of rank 2, flips between two updates."""
    told = []
    for name, guilty in (("weight", 1), ("moment", 2)):
        driver = Driver(world, config, folder, name, interval_steps=2)
        driver.step(1)
        slot = driver.engine.optimizer.slots[-1]
        tensor = slot.parameter if name == "weight" else slot.state["exp_avg_sq"]

        def strike(tensor: Tensor = tensor, hit: bool = world.rank == guilty) -> None:
            if hit:
                flip(tensor, 2)

        driver.stop(2, held=strike)
        told.append(driver.told())
    return told


def drifted(world: World, config: JobConfig, folder: Path) -> Told:
    """A weight of rank 2 flips where no two sums are around it: only its replicas can tell."""
    driver = Driver(world, config, folder, "drifted", interval_steps=4)
    for step in range(1, 6):
        driver.step(step)
    if world.rank == 2:
        flip(driver.engine.optimizer.slots[-1].parameter, 20)
    for step in range(6, 8):
        driver.step(step)
    driver.stop(8)
    return driver.told()


def always_wrong(world: World, config: JobConfig, folder: Path) -> Told:
    """Rank 1's device computes one gradient wrong, each time alike."""
    driver = Driver(world, config, folder, "always", interval_steps=0, replay_interval_steps=2)
    with flipped_gradient(1_000_000 if world.rank == 1 else 0):
        driver.step(1)
        driver.stop(2)
    return driver.told()


def struck_forward(world: World, config: JobConfig, folder: Path) -> Told:
    """Rank 1's activations flip in two suspect steps: nothing was recorded in the first."""
    driver = Driver(world, config, folder, "forward", interval_steps=0, replay_interval_steps=0)
    driver.step(1)
    for step in (2, 3):
        with flipped_activation(driver.engine, int(world.rank == 1)):
            driver.step(step, suspect="a spike")
    return driver.told()


def restless(world: World, config: JobConfig, folder: Path) -> Told:
    """Each computation of every rank has a bit of its own wrong."""
    driver = Driver(world, config, folder, "restless", interval_steps=0, replay_interval_steps=2)
    driver.step(1)
    reduce, calls = _fsdp_param_group.foreach_reduce, iter(range(1_000_000))

    def flipping(fsdp_params: Any, unsharded_grads: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        flip(unsharded_grads[0], 3, element=next(calls))
        return reduce(fsdp_params, unsharded_grads, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = flipping  # type: ignore[assignment]
    try:
        driver.step(2)
    finally:
        _fsdp_param_group.foreach_reduce = reduce
    return driver.told()


def suspects(world: World, config: JobConfig, folder: Path) -> tuple[str, Told, Told]:
    """Steps with odd numbers that nobody expected to replay: the data's doing, and a flip with and without a record."""
    right = undisturbed(world, config, folder, 1)
    driver = Driver(world, config, folder, "poison", interval_steps=1, replay_interval_steps=0)
    driver.step(1)
    with poisoned(driver.engine):
        driver.step(2, suspect="not finite")
    legitimate = driver.told()
    driver = Driver(world, config, folder, "unrecorded", replay_interval_steps=0)
    with flipped_gradient(int(world.rank == 3), EXPONENT):
        driver.step(1, suspect="a spike")
    with flipped_gradient(int(world.rank == 3), EXPONENT):
        driver.step(2, suspect="a spike")
    return right, legitimate, driver.told()


@contextlib.contextmanager
def poisoned(engine: Engine) -> Iterator[None]:
    """The first sample of dp rank 1's share has infinite numbers, whoever computes it."""
    poison = int(batch(engine, 2, 1)[0, 0])

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * torch.inf if int(args[0][0, 0]) == poison else output

    handle = engine.parts[0].tok_embeddings.register_forward_hook(hook)  # type: ignore[union-attr,operator]
    try:
        yield
    finally:
        handle.remove()
