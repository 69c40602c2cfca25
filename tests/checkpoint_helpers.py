"""Small states and managers for the tests of snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpointing.manager import LoadedSnapshot, SnapshotManager
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore, StoreEvent


class Tensors:
    """State of live tensors and plain values, some nested."""

    def __init__(self, tensors: dict[str, torch.Tensor], values: dict[str, Any] | None = None) -> None:
        self.tensors = tensors
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors) if self.values is None else {**self.tensors, "values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = state_dict.get("values")


def sample_tensors(seed: int, rows: int = 64) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes: two-, one- and zero-dimensional, odd sizes, empty, not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(rows, 33, generator=generator),
        "transposed": torch.randn(7, 5, generator=generator).t(),
        "half": torch.randn(rows + 1, generator=generator).bfloat16(),
        "step": torch.tensor(float(seed)),
        "ids": torch.randint(0, 1000, (11,), generator=generator),
        "mask": torch.rand(13, generator=generator) > 0.5,
        "fp8": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
    }


class OneRank:
    """One rank of a run, alone on its node: its manager and its node's store, and all a test does with them."""

    def __init__(
        self, tmp_path: Path, seed: int, generation: int = 1, rank: int = 0, world_size: int = 1, **options: Any
    ) -> None:
        self.ram_dir, self.run_dir = tmp_path / f"ram{rank or ''}", tmp_path / "run"
        self.ram_dir.mkdir(exist_ok=True)
        self.run_dir.mkdir(exist_ok=True)
        self.state = Tensors(sample_tensors(seed), {"lr": 0.1 * seed, "betas": (0.9, 0.95), "name": "adamw"})
        self.manager = SnapshotManager(
            {"model": self.state},
            self.ram_dir,
            local_rank=0,
            rank=rank,
            world_size=world_size,
            generation=generation,
            run_dir=self.run_dir,
            mesh={"dp_shard": world_size},
            **options,
        )
        self.store = NodeStore(self.ram_dir, self.run_dir)
        self.manager.prepare()

    def stage(self, step: int, persist: bool = False) -> None:
        self.manager.stage(step, PersistTo.RUN if persist else PersistTo.NOTHING, {"step": step, "tokens": step * 1024})
        self.manager.wait()

    def persist(self, step: int) -> list[StoreEvent]:
        self.stage(step, persist=True)
        store = self.store
        events = store.persist_pending() + store.verify_pending()
        return events + store.commit_pending() + store.verify_pending()

    def load(self, ram_step: int = -1) -> LoadedSnapshot | None:
        return self.manager.load(ram_step, agree=lambda ok: ok, broadcast=lambda values: values)

    def change(self) -> None:
        """What an optimizer does: every tensor gets other contents, in place."""
        for tensor in self.state.tensors.values():
            tensor.copy_((tensor.float() * 0.5 - 1.0).to(tensor.dtype))

    def equals(self, seed: int) -> bool:
        """Whether the live tensors are bit for bit those of sample_tensors(seed)."""
        expected = sample_tensors(seed)
        return all(same_bits(tensor, expected[name]) for name, tensor in self.state.tensors.items())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and bool(torch.equal(as_bytes(a), as_bytes(b)))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, row by row."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def flip_byte(path: Path, offset_bytes: int) -> None:
    """Damage one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 0x40]))
