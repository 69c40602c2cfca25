"""Tiny jobs and the ranks' side of the parity tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.schema import DataConfig, JobConfig, ModelConfig, ParallelismConfig, RunConfig, TrainingConfig
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World

SEQ_LEN = 32
BATCH = 4
VOCAB = 256


class Trace(msgspec.Struct, frozen=True):
    """What a rank saw: per step the job's mean and largest loss and the gradient norm; then a hash of its state."""

    losses: list[float]
    largest: list[float]
    norms: list[float]
    digest: str
    names: list[str]


def tiny(family: str = "llama3", *, layers: int = 2, microbatch_size: int = BATCH, **layout: Any) -> JobConfig:
    """A job small enough for a test, on the family's debug flavour."""
    return JobConfig(
        run=RunConfig(name="test", seed=7),
        model=ModelConfig(family=family, flavor="debugmodel", layers=layers, vocab_size=VOCAB),  # type: ignore[arg-type]
        data=DataConfig(sets=(), tokenizer=""),
        training=TrainingConfig(
            steps=10, seq_len=SEQ_LEN, global_batch_size=BATCH, microbatch_size=microbatch_size, max_grad_norm=1.0
        ),
        parallelism=ParallelismConfig(**layout),
    )


def with_training(config: JobConfig, **changes: Any) -> JobConfig:
    """The same job with other `[training]` values."""
    return msgspec.structs.replace(config, training=msgspec.structs.replace(config.training, **changes))


def batch(engine: Engine, step: int, dp_rank: int | None = None) -> Tensor:
    """A dp rank's (None: this one's) [B_local, S + 1] tokens of a step; in every layout a part of the same batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=generator)
    size = BATCH // engine.dp_degree
    share = engine.dp_rank if dp_rank is None else dp_rank
    return tokens[share * size : (share + 1) * size]


def train(engine: Engine, steps: range, poisoned: int = -1) -> Trace:
    """Train over `steps`; before the poisoned one, a bad batch is computed and its update discarded."""
    losses, largest, norms = [], [], []
    for step in steps:
        if step == poisoned:
            engine.forward_backward(batch(engine, 10_000))
            engine.clip_grad_norm(1.0)
            engine.discard_update()
        engine.seed_step(step)
        average, most = engine.global_loss(engine.forward_backward(batch(engine, step)))
        losses.append(average)
        largest.append(most)
        norms.append(float(engine.clip_grad_norm(engine.config.training.max_grad_norm)))
        engine.optimizer_step(1e-3, step)
    tensors = live_tensors(engine)
    return Trace(losses, largest, norms, digest(tensors), sorted(tensors))


def live_tensors(engine: Engine) -> dict[str, Tensor]:
    """All tensors of a snapshot, as `model.<name>` and `optimizer.<name>`."""
    return {
        f"{part}.{name}": value
        for part, stateful in engine.state().items()
        for name, value in stateful.state_dict().items()
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of the local bytes of every tensor, in order of names."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        local = local_of(tensors[name])
        hasher.update(name.encode())
        hasher.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def local_of(tensor: Tensor) -> Tensor:
    """A tensor's local shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_of(tensor: Tensor) -> Tensor:
    """A tensor's whole value, gathered."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load_whole(engine: Engine, path: Path) -> None:
    """Fill the engine's live tensors from a file of whole ones."""
    whole = load_file(path)
    with torch.no_grad():
        for name, live in live_tensors(engine).items():
            value = whole[name]
            if isinstance(live, DTensor):
                value = distribute_tensor(value, live.device_mesh, live.placements, src_data_rank=None).to_local()
            local_of(live).copy_(value)
    for stateful in engine.state().values():
        stateful.load_state_dict(stateful.state_dict())


def reference(world: World, config: JobConfig, path: Path) -> Trace:
    """One process: two steps, save everything whole, three more steps."""
    engine = build_engine(config, world)
    train(engine, range(2))
    save_file({name: full_of(tensor) for name, tensor in live_tensors(engine).items()}, path)
    return train(engine, range(2, 5))


def continued(world: World, config: JobConfig, path: Path) -> Trace:
    """Load what `reference` saved into another layout, and do the same three steps."""
    engine = build_engine(config, world, init_weights=False)
    load_whole(engine, path)
    return train(engine, range(2, 5))


def fresh(world: World, config: JobConfig, steps: int, poisoned: int = -1) -> Trace:
    """Train from initial weights."""
    return train(build_engine(config, world), range(steps), poisoned)


def initial_values(world: World, config: JobConfig) -> dict[str, str]:
    """A hash of each whole initial tensor that this rank has a part of."""
    engine = build_engine(config, world)
    return {name: digest({"": full_of(tensor)}) for name, tensor in live_tensors(engine).items()}


def discarded(world: World, config: JobConfig) -> tuple[str, str]:
    """Hashes of the state before and after a batch whose update was discarded."""
    engine = build_engine(config, world)
    train(engine, range(1))
    before = digest(live_tensors(engine))
    engine.forward_backward(batch(engine, 10_000))
    engine.clip_grad_norm(1.0)
    engine.discard_update()
    assert all(parameter.grad is None for part in engine.parts for parameter in part.parameters())
    assert all(not counter.any() for counter in map(local_of, engine.expert_counters))
    return before, digest(live_tensors(engine))


def restored(world: World, config: JobConfig) -> tuple[str, str]:
    """Hashes after five steps undisturbed, and after two steps, a copy into a bare engine, and three steps there."""
    whole = train(build_engine(config, world), range(5))
    first = build_engine(config, world)
    train(first, range(2))
    second = build_engine(config, world, init_weights=False)
    saved = {name: local_of(tensor).clone() for name, tensor in live_tensors(first).items()}
    with torch.no_grad():
        for name, live in live_tensors(second).items():
            local_of(live).copy_(saved[name])
    for stateful in second.state().values():
        stateful.load_state_dict(stateful.state_dict())
    return whole.digest, train(second, range(2, 5)).digest
