"""Promise: the state of the real engine moves between layouts: pipeline, tensor, expert and data parallel."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import torch

from checkpointing.manager import SnapshotManager
from checkpointing.store import NodeStore
from configs.schema import JobConfig
from parallelism.engine import build_engine
from parallelism.mesh import World, world_size_of
from tests.checkpoint_helpers import as_bytes
from tests.distributed.layouts import full_of, live_tensors, tiny, train
from tests.distributed.test_checkpoint_reshard import _agree, _broadcast
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

PAIRS = {
    "pp2_to_fsdp2": (tiny(pp=2), tiny(dp_shard=2)),
    "fsdp2_tp2_to_pp2": (tiny(dp_shard=2, tp=2), tiny(pp=2)),
    "fsdp2_to_pp2_fsdp2": (tiny(dp_shard=2), tiny(pp=2, dp_shard=2)),
    "ep2_to_one": (tiny("deepseek_v3", dp_shard=2, ep=2), tiny("deepseek_v3")),
}


def snapshots(world: World, config: JobConfig, folder: Path, generation: int) -> tuple[SnapshotManager, dict[str, str]]:
    """A trained engine's manager, and hashes of the whole logical tensors this rank has a part of."""
    engine = build_engine(config, world)
    train(engine, range(generation))
    ram_dir = folder / f"ram{world.rank}"
    ram_dir.mkdir(exist_ok=True)
    mesh = msgspec.structs.asdict(config.parallelism)
    degrees = {axis: mesh[axis] for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    manager = SnapshotManager(
        engine.state(), ram_dir, 0, world.rank, world.world_size, generation, folder / "run", degrees
    )  # fmt: skip
    manager.prepare()
    if generation == 2:
        assert manager.load(-1, _agree, _broadcast) is not None
    return manager, {name: _hash(full_of(tensor)) for name, tensor in live_tensors(engine).items()}


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor).numpy().tobytes()).hexdigest()


def save(world: World, config: JobConfig, folder: Path) -> dict[str, str]:
    """Persist the state after one step; returns hashes of its whole tensors."""
    manager, hashes = snapshots(world, config, folder, generation=1)
    manager.stage(1, True, {})
    manager.wait()
    store = NodeStore(manager.ram_dir, manager.run_dir)
    store.persist_pending()
    assert _agree(not manager.persist_busy)
    store.commit_pending()
    return hashes


def load(world: World, config: JobConfig, folder: Path) -> dict[str, str]:
    """Hashes of the whole tensors after loading what `save` saved over a state two steps old."""
    return snapshots(world, config, folder, generation=2)[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_an_engine_s_state_moves_to_another_layout(tmp_path: Path, pair: str) -> None:
    before, after = PAIRS[pair]
    saved: dict[str, str] = {}
    for hashes in run_ranks(world_size_of(before.parallelism), save, before, tmp_path):
        saved |= hashes
    loaded: dict[str, str] = {}
    for hashes in run_ranks(world_size_of(after.parallelism), load, after, tmp_path):
        loaded |= hashes
    assert loaded == saved
