"""The ranks' side of the tests of exports and imports: small trained runs with a run directory, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from checkpointing.manager import SnapshotManager
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore
from configs.models import DEEPSEEK_V3
from configs.schema import DataConfig, DataSet, JobConfig
from configs.tomltext import resolve_toml
from parallelism.engine import Engine, build_engine
from parallelism.mesh import World
from tests.distributed.layouts import SEQ_LEN, VOCAB, batch, full_of, live_tensors, tiny, train

STEP = 2


def job(family: str, flavor: str, tokenizer: Path, **options: Any) -> JobConfig:
    """A tiny job that load_job accepts."""
    config = tiny(family, microbatch_size=2, **options)
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, flavor=flavor, vocab_size=260),
        data=DataConfig(sets=(DataSet(path="none"),), tokenizer=str(tokenizer)),
        cluster=msgspec.structs.replace(config.cluster, ranks_per_node=options.get("dp_shard", 1)),
    )


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
    assert 0 <= done <= total


def register_sigmoid() -> str:
    """A deepseek_v3 flavour as small as the debug one that routes as the big one does; its name."""
    from torchtitan.models.deepseek_v3 import deepseekv3_configs

    debug, name = deepseekv3_configs["debugmodel"], "sigmoid"

    def build(
        attn_backend: str, moe_comm_backend: str, non_blocking_capacity_factor: float | None = None,
        num_mtp_layers: int = 0,
    ) -> Any:  # fmt: skip
        model = debug(attn_backend, moe_comm_backend, non_blocking_capacity_factor, num_mtp_layers)
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.router.score_func = "sigmoid"
                layer.moe.router.route_norm = True
                layer.moe.router.route_scale = 2.5
                layer.moe.router.num_expert_groups = 4
                layer.moe.router.num_limited_groups = 2
        return model

    deepseekv3_configs[name] = build
    DEEPSEEK_V3[name] = DEEPSEEK_V3["debugmodel"]
    return name


def manager_of(world: World, engine: Engine, run_dir: Path, generation: int) -> SnapshotManager:
    """This rank's snapshot manager, with shared memory below the run's folder."""
    ram_dir = run_dir.parent / f"ram-{run_dir.name}-{world.rank}"
    ram_dir.mkdir(exist_ok=True)
    mesh = {"pp": 1, "dp_replicate": 1, "dp_shard": world.world_size, "cp": 1, "tp": 1, "ep": 1}
    manager = SnapshotManager(engine.state(), ram_dir, 0, world.rank, world.world_size, generation, run_dir, mesh)
    manager.prepare()
    return manager


def trained_run(world: World, config: JobConfig, run_dir: Path, steps: int = STEP) -> None:
    """Train, commit a snapshot, and write beside it what the live tensors are (`live`) and what they give."""
    engine = build_engine(config, world)
    train(engine, range(steps))
    manager = manager_of(world, engine, run_dir, generation=1)
    manager.stage(STEP, PersistTo.RUN, {"tokens_seen": 1234})
    manager.wait()
    store = NodeStore(manager.ram_dir, run_dir)
    store.persist_pending()
    dist.barrier()
    store.commit_pending()
    (run_dir / "config.toml").write_text(resolve_toml(config))
    save_truth(world, engine, run_dir)
    manager.close()


def save_truth(world: World, engine: Engine, folder: Path) -> None:
    """Write the engine's whole tensors and its logits as safetensors files."""
    whole = {name: full_of(tensor) for name, tensor in live_tensors(engine).items()}
    output = logits(engine)
    if world.rank == 0:
        save_file(whole, folder / "live.safetensors")
        save_file({"logits": output}, folder / "logits.safetensors")


def logits(engine: Engine) -> Tensor:
    """What the model says of a fixed batch, [2, S, V] fp32.

    torchtitan rounds the inputs and weights of experts to bf16, whatever the model is in; transformers does not. To
    compare weights and not roundings, the rounding is left out here.
    """
    with torch.no_grad(), patch.object(Tensor, "bfloat16", lambda tensor: tensor):
        return engine.parts[0](probe_tokens()).float().contiguous()


def probe_tokens() -> Tensor:
    """A fixed batch, [2, S] int64."""
    return torch.randint(0, VOCAB, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))


def first_loss(world: World, config: JobConfig, run_dir: Path, steps: int) -> float:
    """Loss of the next step of a run that goes on from its newest snapshot, which must be of `steps`."""
    engine = build_engine(config, world, init_weights=False)
    manager = manager_of(world, engine, run_dir, generation=1)
    loaded = manager.load(-1, _agree, _broadcast)
    assert loaded is not None
    assert loaded.step == steps
    if not (run_dir / "live.safetensors").exists():
        save_truth(world, engine, run_dir)
    average, _ = engine.global_loss(engine.forward_backward(batch(engine, 99)))
    return average


def _agree(ok: bool) -> bool:
    flag = torch.tensor(int(ok))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _broadcast(values: list[int]) -> list[int]:
    held: list[Any] = [values]
    dist.broadcast_object_list(held, src=0)
    return list(held[0])
