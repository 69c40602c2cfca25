"""Promise: tensors of 8-bit floats are staged, saved and resharded like any other, bit for bit, NaNs among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from checkpointing.compare import Finding, compare_snapshots
from checkpointing.manager import SnapshotManager
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore, StoreEventKind
from checkpointing.verify import verify_snapshot
from parallelism.mesh import World
from tests.checkpoint_helpers import Tensors, as_bytes
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

ROWS, COLUMNS = 7, 6  # rows divide by no number of ranks here
KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def whole(kind: str) -> Tensor:
    """Every row has other bytes; all 256 of them are floats or NaNs, and each must come back as it was."""
    raw = (torch.arange(ROWS * COLUMNS) * 6 + len(kind)).to(torch.uint8).reshape(ROWS, COLUMNS)
    return raw.view(KINDS[kind])


def sharded(kind: str, dim: int, world: World, replicas: int) -> DTensor:
    """This rank's part, on a mesh of `replicas` copies of a split over the rest."""
    mesh = init_device_mesh(
        "cpu", (replicas, world.world_size // replicas), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    parts = whole(kind).view(torch.uint8).chunk(mesh.size(1), dim)
    rank = mesh.get_local_rank("dp_shard")
    local = parts[rank].contiguous().view(KINDS[kind])
    placed = (Replicate(), Shard(dim))
    return DTensor.from_local(
        local, mesh, placed, run_check=False, shape=torch.Size((ROWS, COLUMNS)), stride=(COLUMNS, 1)
    )


def states(world: World, replicas: int) -> dict[str, Tensors]:
    tensors: dict[str, Tensor] = {
        f"{kind}.{dim}": sharded(kind, dim, world, replicas) for kind in KINDS for dim in (0, 1)
    }
    return {"model": Tensors({**tensors, "odd": torch.ones(3)})}


def manager(world: World, replicas: int, folder: str, generation: int) -> tuple[SnapshotManager, dict[str, Tensors]]:
    ram_dir = Path(folder) / f"ram{world.rank}-g{generation}"
    ram_dir.mkdir()
    state = states(world, replicas)
    mesh = {"dp_replicate": replicas, "dp_shard": world.world_size // replicas}
    made = SnapshotManager(state, ram_dir, 0, world.rank, world.world_size, generation, Path(folder) / "run", mesh)
    made.prepare()
    return made, state


def save(world: World, replicas: int, folder: str, generation: int, step: int) -> None:
    made, _ = manager(world, replicas, folder, generation)
    commit(world, made, folder, step)


def commit(world: World, made: SnapshotManager, folder: str, step: int) -> None:
    made.stage(step, PersistTo.RUN, {})
    made.wait()
    store = NodeStore(made.ram_dir, Path(folder) / "run")
    assert [event.kind for event in store.persist_pending()] == [StoreEventKind.PERSISTED]
    dist.barrier()
    if world.rank == 0:
        assert [event.kind for event in store.commit_pending()] == [StoreEventKind.COMMITTED]
    dist.barrier()


def load_and_save(world: World, replicas: int, folder: str, generation: int, step: int) -> None:
    """Load on this layout into tensors of other bytes, compare this rank's part, and save it again."""
    made, state = manager(world, replicas, folder, generation)
    right = {name: as_bytes(local(t)).clone() for name, t in state["model"].tensors.items()}
    for tensor in state["model"].tensors.values():
        as_bytes(local(tensor)).fill_(0)
    loaded = made.load(-1, _agree, _broadcast)
    assert loaded is not None
    assert loaded.rejections == ()
    for name, tensor in state["model"].tensors.items():
        assert torch.equal(as_bytes(local(tensor)), right[name]), name
    commit(world, made, folder, step)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _agree(ok: bool) -> bool:
    flag = torch.tensor(int(ok))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _broadcast(values: list[int]) -> list[int]:
    held: list[list[int]] = [values]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def test_8_bit_floats_over_2_ranks_1_rank_and_2_replicas(tmp_path: Path) -> None:
    """Sharded, then on one rank, then with HSDP's replicas on, and off again: nothing changes a bit."""
    run_ranks(2, save, 1, str(tmp_path), 1, 10)
    run_ranks(1, load_and_save, 1, str(tmp_path), 2, 20)
    run_ranks(2, load_and_save, 2, str(tmp_path), 3, 30)
    run_ranks(2, load_and_save, 1, str(tmp_path), 4, 40)
    run_dir = tmp_path / "run"
    for step in (10, 20, 30, 40):
        assert verify_snapshot(run_dir, step) == []
        found = list(compare_snapshots((run_dir, 10), (run_dir, step), lambda done, total: None))
        assert len(found) == 5
        assert {diff.finding for diff in found} == {Finding.EQUAL}
