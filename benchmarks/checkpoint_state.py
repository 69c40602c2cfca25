"""State to be saved, and a step to be overlapped with, for `benchmarks.checkpoint`."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

COLUMNS = 1024
MATRIX_ROWS = 2048
NORM_SIZE = 4096
_ELEMENT_BYTES = 4
_BLOCK_ELEMENTS = 1 << 20


def shapes(total_bytes: int) -> dict[str, tuple[int, ...]]:
    """Logical tensors of one state in fp32: one large (an eighth of all), small ones, and matrices of 8 MiB."""
    matrix_bytes = MATRIX_ROWS * COLUMNS * _ELEMENT_BYTES
    large_rows = max(total_bytes // 8 // (COLUMNS * _ELEMENT_BYTES) // 64 * 64, 64)
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (large_rows, COLUMNS)}
    rest = total_bytes - large_rows * COLUMNS * _ELEMENT_BYTES
    for number in range(max(rest // (matrix_bytes + NORM_SIZE * _ELEMENT_BYTES), 1)):
        found[f"layers.{number}.weight"] = (MATRIX_ROWS, COLUMNS)
        found[f"layers.{number}.norm"] = (NORM_SIZE,)
    return found


class State:
    """One rank's part: every logical tensor cut by rows over the ranks, and a counter that all have."""

    def __init__(self, total_bytes: int, mesh: DeviceMesh) -> None:
        rank, world_size = mesh.get_rank(), mesh.size()
        generator = torch.Generator().manual_seed(rank)
        block = torch.randint(-1000, 1000, (_BLOCK_ELEMENTS,), generator=generator).float()
        self.tensors: dict[str, torch.Tensor] = {}
        self.locals: list[torch.Tensor] = []
        for name, (rows, *rest) in shapes(total_bytes).items():
            local = torch.empty(rows // world_size, *rest)
            flat = local.view(-1)
            for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
                window = flat[start : start + _BLOCK_ELEMENTS]
                window.copy_(block[: window.numel()])
            self.locals.append(local)
            self.tensors[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        self.counter = torch.zeros(1)
        self.tensors["optimizer.step"] = self.counter
        # Some stagers know a tensor again by its storage's Python object, which must live on for that.
        self.storages = [local.untyped_storage() for local in [*self.locals, self.counter]]

    @property
    def size_bytes(self) -> int:
        """Bytes of this rank."""
        return sum(local.nbytes for local in self.locals) + self.counter.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Everstep's and torch's protocol."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tensors were filled in place."""

    def update(self) -> None:
        """What an optimizer does: writes every element once."""
        torch._foreach_add_([*self.locals, self.counter], 1.0)

    def clear(self) -> None:
        """Forget everything, so that only a load can bring it back."""
        torch._foreach_zero_([*self.locals, self.counter])

    def digest(self) -> str:
        """Tells one content from another."""
        running = xxhash.xxh3_128()
        for local in [*self.locals, self.counter]:
            running.update(local.view(-1).view(torch.uint8).numpy().data)
        return str(running.hexdigest())


class Compute:
    """Matrix products that take `step_s` when nothing else runs. Collective."""

    def __init__(self, step_s: float) -> None:
        self._a, self._b, self._out = torch.randn(256, 256), torch.randn(256, 256), torch.empty(256, 256)
        count, probe_s = 0, min(0.5, step_s)
        dist.barrier()
        began_s = time.monotonic()
        while time.monotonic() - began_s < probe_s:
            torch.mm(self._a, self._b, out=self._out)
            count += 1
        self._count = max(int(least(count / (time.monotonic() - began_s)) * step_s), 1)

    def step(self) -> None:
        """Do it."""
        for _ in range(self._count):
            torch.mm(self._a, self._b, out=self._out)


def longest(mine: float) -> float:
    """The largest value over all ranks. Collective."""
    return _reduce(mine, dist.ReduceOp.MAX)


def least(mine: float) -> float:
    """The smallest value over all ranks. Collective."""
    return _reduce(mine, dist.ReduceOp.MIN)


def _reduce(mine: float, how: Any) -> float:
    value = torch.tensor([mine], dtype=torch.float64)
    dist.all_reduce(value, op=how)
    return float(value.item())
