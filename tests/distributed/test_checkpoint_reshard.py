"""Promises: a state saved on one mesh is loaded on any other bit for bit; all ranks always take the same snapshot."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from checkpointing.manager import LoadedSnapshot, SnapshotManager
from checkpointing.segment import CONTROL_BYTES, segment_name
from checkpointing.store import NodeStore, StoreEventKind
from checkpointing.verify import verify_snapshot
from parallelism.mesh import World
from tests.checkpoint_helpers import Tensors, as_bytes, flip_byte
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed


class Mesh(msgspec.Struct, frozen=True):
    """Degrees of a layout of the little model."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp


LAYOUTS = {
    "one": Mesh(),
    "fsdp2": Mesh(dp_shard=2),
    "fsdp3": Mesh(dp_shard=3),
    "fsdp4": Mesh(dp_shard=4),
    "tp2": Mesh(tp=2),
    "hsdp2x2": Mesh(dp_replicate=2, dp_shard=2),
    "fsdp2_tp2": Mesh(dp_shard=2, tp=2),
}
PAIRS = [
    ("fsdp2", "fsdp2"), ("fsdp2", "tp2"), ("tp2", "fsdp2"), ("tp2", "fsdp2_tp2"), ("fsdp2_tp2", "tp2"),
    ("fsdp2_tp2", "one"), ("one", "fsdp2_tp2"), ("fsdp2_tp2", "fsdp4"), ("fsdp4", "fsdp2_tp2"), ("fsdp4", "fsdp3"),
    ("hsdp2x2", "fsdp2"), ("fsdp3", "hsdp2x2"),
]  # fmt: skip


class Little(nn.Module):
    """An embedding whose 11 rows divide by no degree, a column- and a row-parallel layer, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.down(self.up(self.embed(ids)).relu()))


class Job:
    """A rank with its little model, AdamW, snapshots, and a node of its own."""

    def __init__(self, world: World, layout: Mesh, seed: int, folder: Path, generation: int = 1) -> None:
        self.rank, self.layout = world.rank, layout
        mesh = init_device_mesh(
            "cpu", (layout.dp_replicate, layout.dp_shard, layout.tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
        )
        torch.manual_seed(seed)
        self.model = Little()
        _shard(self.model, mesh, layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step(0)
        self.ram_dir = folder / f"ram{world.rank}-{layout.world_size}"
        self.ram_dir.mkdir(exist_ok=True)
        self.run_dir = folder / "run"
        self.store = NodeStore(self.ram_dir, self.run_dir)
        self.manager = SnapshotManager(
            self.states(), self.ram_dir, 0, world.rank, layout.world_size, generation, self.run_dir,
            {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "tp": layout.tp},
        )  # fmt: skip
        self.manager.prepare()

    def step(self, number: int) -> None:
        """One step of training; every rank reads the same ids, so that all layouts train alike."""
        ids = torch.arange(24).reshape(4, 6).mul(number + 3) % 11
        self.model(ids).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> Mapping[str, Tensors]:
        named = dict(self.model.named_parameters())
        moments = {
            f"{kind}.{name}": value
            for name, parameter in named.items()
            for kind, value in self.optimizer.state[parameter].items()
        }
        return {
            "model": Tensors(dict(named)),
            "optimizer": Tensors(moments, {"lr": self.optimizer.param_groups[0]["lr"]}),
        }

    def digest(self) -> str:
        """A hash of the whole logical state, equal on every rank and layout."""
        running = hashlib.sha256()
        for key, state in self.states().items():
            for name, tensor in sorted(state.tensors.items()):
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                running.update(f"{key}.{name}{tuple(full.shape)}{full.dtype}".encode())
                running.update(as_bytes(full).numpy().tobytes())
        return running.hexdigest()

    def snapshot(self, step: int) -> str:
        """Stage, persist and commit; returns the digest of the state at the moment of staging."""
        expected = self.digest()
        self.manager.stage(step, True, {"step": step, "rank": self.rank})
        self.manager.wait()
        self.step(step)
        assert self.digest() != expected
        assert [event.kind for event in self.store.persist_pending()] == [StoreEventKind.PERSISTED]
        dist.barrier()
        if self.rank == 0:
            assert [event.kind for event in self.store.commit_pending()] == [StoreEventKind.COMMITTED]
        dist.barrier()
        return expected

    def load(self, ram_step: int = -1) -> LoadedSnapshot | None:
        return self.manager.load(ram_step, _agree, _broadcast)


def _shard(model: Little, mesh: DeviceMesh, layout: Mesh) -> None:
    if layout.tp > 1:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if layout.dp_replicate * layout.dp_shard > 1:
        dp = mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
        fully_shard(model, mesh=dp)


def _agree(ok: bool) -> bool:
    flag = torch.tensor(int(ok))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _broadcast(values: list[int]) -> list[int]:
    held: list[Any] = [values]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def save(world: World, layout: Mesh, folder: str, steps: list[int]) -> list[str]:
    """Digests of the states that were scheduled at these steps."""
    job = Job(world, layout, seed=1, folder=Path(folder))
    return [job.snapshot(step) for step in steps]


def load(world: World, layout: Mesh, folder: str, ram_step: int = -1) -> tuple[int, str, str, Any, list[str]]:
    """Step, tier, digest and scalars of what was loaded, and this rank's refusals."""
    job = Job(world, layout, seed=2, folder=Path(folder), generation=2)
    loaded = job.load(ram_step)
    assert loaded is not None
    digest = job.digest()
    job.step(1)  # what was loaded can be trained on
    return loaded.step, loaded.tier, digest, loaded.scalars, [r.reason for r in loaded.rejections]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=lambda name: name)
def test_any_layout_to_any_layout(tmp_path: Path, saved: str, loaded: str) -> None:
    """FSDP, TP, HSDP and their product, onto each other and onto one rank, uneven shards among them."""
    digests = run_ranks(LAYOUTS[saved].world_size, save, LAYOUTS[saved], str(tmp_path), [10])
    assert len({tuple(d) for d in digests}) == 1
    assert verify_snapshot(tmp_path / "run", 10) == []
    results = run_ranks(LAYOUTS[loaded].world_size, load, LAYOUTS[loaded], str(tmp_path))
    same_world = LAYOUTS[saved].world_size == LAYOUTS[loaded].world_size
    for rank, (step, tier, digest, scalars, refusals) in enumerate(results):
        assert (step, tier, refusals) == (10, "disk", [])
        assert digest == digests[0][0], "the bytes are those of the moment of staging"
        assert scalars == {"step": 10, "rank": rank if same_world else 0}


def test_one_rank_s_damaged_shard_moves_all_ranks_to_the_step_before(tmp_path: Path) -> None:
    layout = LAYOUTS["fsdp2_tp2"]
    digests = run_ranks(4, save, layout, str(tmp_path), [10, 20])[0]
    flip_byte(tmp_path / "run/checkpoints/step-20/g1-rank00002.safetensors", 20_000)
    results = run_ranks(4, load, layout, str(tmp_path))
    assert {(step, tier, digest) for step, tier, digest, _, _ in results} == {(10, "disk", digests[0])}
    refusals = [refusals for *_, refusals in results]
    assert [len(r) for r in refusals] == [0, 0, 1, 0]
    assert refusals[2][0].startswith("step-20/g1-rank00002.safetensors: checksum")


@pytest.mark.parametrize("damaged", [None, 1], ids=["whole", "rank1_damaged"])
def test_memory_is_used_by_all_ranks_or_by_none(tmp_path: Path, damaged: int | None) -> None:
    layout = LAYOUTS["fsdp2_tp2"]
    digests = run_ranks(4, save, layout, str(tmp_path), [10, 20])[0]
    if damaged is not None:
        for slot in range(3):
            flip_byte(tmp_path / f"ram{damaged}-4" / segment_name(0, slot), CONTROL_BYTES + 20_000)
    results = run_ranks(4, load, layout, str(tmp_path), 20)
    tier = "ram" if damaged is None else "disk"
    assert {(step, tier, digest) for step, tier, digest, _, _ in results} == {(20, tier, digests[1])}
    assert [len(refusals) for *_, refusals in results] == [int(rank == damaged) for rank in range(4)]
    assert {result[1] for result in results} == {tier}
