"""Promises: ranks share a repair and agree on its end; loading takes a rank's shard and one stored slice, no more."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpointing.manager import SnapshotManager
from checkpointing.repair import Repair
from checkpointing.run_source import RunSource
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore
from checkpointing.verify import verify_snapshot
from parallelism.mesh import World
from tests.checkpoint_helpers import Tensors, flip_byte
from tests.distributed.test_checkpoint_reshard import _agree, _broadcast
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

MIB = 2**20


class Seen(NamedTuple):
    """What a rank saw of a load."""

    step: int
    right: bool
    repaired: list[str]
    rejections: int


def whole_tensor(step: int, rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + step


def manager_of(world: World, state: torch.Tensor, folder: Path, generation: int) -> SnapshotManager:
    ram_dir = folder / f"ram{world.rank}-{generation}"
    ram_dir.mkdir(exist_ok=True)
    manager = SnapshotManager(
        {"model": Tensors({"w": state})}, ram_dir, 0, world.rank, world.world_size, generation, folder / "run",
        {"dp_shard": world.world_size},
    )  # fmt: skip
    manager.prepare()
    return manager


def save(world: World, folder: str, steps: list[int], rows: int, columns: int) -> None:
    """A tensor sharded over all ranks, committed at these steps."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    state = distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(0)])
    manager = manager_of(world, state, Path(folder), 1)
    store = NodeStore(manager.ram_dir, Path(folder) / "run", keep_last=9)
    share = rows // world.world_size
    for step in steps:
        first = world.rank * share
        state.to_local().copy_(whole_tensor(step, rows, columns)[first : first + share])
        manager.stage(step, PersistTo.RUN, {})
        manager.wait()
        store.persist_pending()
        _agree(True)
        if world.rank == 0:
            store.commit_pending()
        _agree(True)
    store.close()


def load(world: World, folder: str, rows: int, columns: int) -> Seen:
    """On as many ranks as there are now, with a backup to repair from."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    state = distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(0)])
    repairs: list[Repair] = []
    loaded = manager_of(world, state, Path(folder), 2).load(
        -1, _agree, _broadcast, far=RunSource(Path(folder) / "backup"), repaired=repairs.append
    )
    assert loaded is not None
    assert isinstance(state, DTensor)
    right = torch.equal(state.full_tensor(), whole_tensor(loaded.step, rows, columns))
    return Seen(loaded.step, right, [repair.file for repair in repairs], len(loaded.rejections))


@pytest.mark.parametrize("ranks", [4, 2, 3])
def test_each_rank_repairs_its_part_on_the_same_and_on_another_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    run_ranks(4, save, str(tmp_path), [10, 20], 24, 512)
    run_dir = tmp_path / "run"
    shutil.copytree(run_dir, tmp_path / "backup")
    for rank in (1, 3):
        flip_byte(run_dir / f"checkpoints/step-20/g1-rank0000{rank}.safetensors", 17_000)
    seen = run_ranks(ranks, load, str(tmp_path), 24, 512)
    assert {(s.step, s.right, s.rejections) for s in seen} == {(20, True, 0)}
    for rank, one in enumerate(seen):
        assert one.repaired == [f"g1-rank{i:05d}.safetensors" for i in (1, 3) if i % ranks == rank]
    assert verify_snapshot(run_dir, 20) == []


def test_a_shard_that_nobody_has_moves_all_ranks_to_the_step_before(tmp_path: Path) -> None:
    run_ranks(4, save, str(tmp_path), [10, 20], 24, 512)
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    for root in ("run", "backup"):
        (tmp_path / f"{root}/checkpoints/step-20/g1-rank00002.safetensors").unlink()
    seen = run_ranks(2, load, str(tmp_path), 24, 512)
    assert [(s.step, s.right) for s in seen] == [(10, True)] * 2
    assert [s.rejections for s in seen] == [1, 0]


def test_a_snapshot_that_only_the_bucket_has_is_pulled_by_all_ranks(tmp_path: Path) -> None:
    run_ranks(4, save, str(tmp_path), [10], 24, 512)
    (tmp_path / "run").rename(tmp_path / "backup")
    seen = run_ranks(2, load, str(tmp_path), 24, 512)
    assert [(s.step, s.right) for s in seen] == [(10, True)] * 2
    assert [len(s.repaired) for s in seen] == [2, 2]
    assert verify_snapshot(tmp_path / "run", 10) == []


class PeakWatch:
    """Looks at this process's own memory (no files, no shared memory) all the time, and remembers the most."""

    def __init__(self) -> None:
        self.first_bytes = self.peak_bytes = self._now_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, self._now_bytes())

    @staticmethod
    def _now_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def load_measured(world: World, folder: str, rows: int, columns: int) -> int:
    """Bytes by which the process's memory rose while it loaded."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    state = distribute_tensor(torch.ones(rows, columns), mesh, [Shard(1)])
    manager = manager_of(world, state, Path(folder), 2)
    _agree(True)
    with PeakWatch() as watch:
        assert manager.load(-1, _agree, _broadcast) is not None
    first = world.rank * columns // world.world_size
    local = state.to_local()
    assert torch.equal(local[rows // 2], whole_tensor(10, rows, columns)[rows // 2, first : first + local.shape[1]])
    return watch.peak_bytes - watch.first_bytes


def test_loading_takes_no_more_than_the_shard_and_one_stored_slice(tmp_path: Path) -> None:
    """128 MiB, sharded by rows over 8 ranks, loaded by columns on 2: each has 64 MiB, and reads all 8 slices."""
    rows, columns = 8192, 4096
    run_ranks(8, save, str(tmp_path), [10], rows, columns)
    slice_bytes = rows * columns * 4 // 8
    rises = run_ranks(2, load_measured, str(tmp_path), rows, columns)
    # Beside a slice: pieces of 8 MiB for checksums and rows, of which the allocator keeps some. Never the 128 MiB.
    assert MIB < max(rises) < slice_bytes + 32 * MIB, rises
