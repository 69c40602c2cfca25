"""The ranks of `benchmarks.checkpoint`: one loop, snapshotted every step by one of several savers.

`-m benchmarks.checkpoint_ranks OUT CONFIG FOLDER SAVER STEPS`. Figures of rank 0: `stall_s` is the time in which the
training thread was held up by a snapshot, over all ranks the longest; `step_s` the whole step; `memcpy_s` one plain
copy of the rank's bytes; `durable_s` from the snapshot's beginning to its being whole on disk, where it is known.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.plainloop import build, join_group, read_from
from benchmarks.ranks import write_figures
from checkpointing.manager import SnapshotManager
from checkpointing.persister import Persister
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from configs.load import load_job
from parallelism.engine import Engine
from parallelism.mesh import World

WARM_UP = 3


class Saver(Protocol):
    """One way to keep every step."""

    def before_update(self) -> None:
        """The weights are about to change."""

    def after_update(self, step: int) -> None:
        """The step is in the weights."""

    def close(self) -> list[float]:
        """Finish; returns seconds from a snapshot's beginning to its being on disk, of those known."""


class Nothing:
    """No snapshots."""

    def before_update(self) -> None:
        """See Saver."""

    def after_update(self, step: int) -> None:
        """See Saver."""

    def close(self) -> list[float]:
        """See Saver."""
        return []


class Everstep:
    """Every step to shared memory; to disk whenever the disk is free. Rank 0 plays the agent's part for all."""

    def __init__(self, engine: Engine, world: World, folder: Path, memory: Path) -> None:
        ram = memory / "segments"
        ram.mkdir(exist_ok=True)
        self.manager = SnapshotManager(
            engine.state(), ram, world.local_rank, world.rank, world.world_size, 1, folder, {"dp_shard": 2}
        )
        self.manager.prepare()
        self.begun: dict[int, float] = {}
        self.durable: list[float] = []
        self.persister = None
        dist.barrier()
        if world.rank == 0:
            self.persister = Persister(NodeStore(ram, folder), self._on_event).start()

    def _on_event(self, event: StoreEvent) -> None:
        if event.kind is StoreEventKind.COMMITTED:
            self.durable.append(time.monotonic() - self.begun[event.step])

    def before_update(self) -> None:
        """See Saver."""
        self.manager.wait()

    def after_update(self, step: int) -> None:
        """See Saver."""
        busy = torch.tensor([self.manager.persist_busy], dtype=torch.int32)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        self.begun[step] = time.monotonic()
        self.manager.stage(step, persist=not busy.item(), scalars={})

    def close(self) -> list[float]:
        """See Saver."""
        self.manager.wait()
        if self.persister is not None:
            self.persister.flush(60.0)
            self.persister.stop()
        self.manager.close()
        return self.durable


class Dcp:
    """torch's distributed checkpoint: `save`, or `async_save` with its plan cached and its staging kept."""

    def __init__(self, engine: Engine, folder: Path, asynchronous: bool) -> None:
        self.state: dict[str, Any] = dict(engine.state())
        self.folder = folder
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        self.pending: Any = None
        self.begun_s = 0.0
        self.durable: list[float] = []

    def before_update(self) -> None:
        """See Saver. async_save copied the state before it returned."""

    def after_update(self, step: int) -> None:
        """See Saver."""
        target = self.folder / str(step % 3)
        if self.group is None:
            dcp.save(self.state, storage_writer=_writer(target))
            return
        # A second save before the first is on disk is refused by async_save: waiting is part of its stall.
        self._finish_pending()
        self.begun_s = time.monotonic()
        self.pending = dcp.async_save(self.state, storage_writer=_writer(target), process_group=self.group)

    def _finish_pending(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.durable.append(time.monotonic() - self.begun_s)
            self.pending = None

    def close(self) -> list[float]:
        """See Saver."""
        self._finish_pending()
        return self.durable


def _writer(target: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(target, overwrite=True)


def main() -> None:
    """Measure one saver."""
    out, config, folder, name, steps = (
        Path(sys.argv[1]),
        load_job(sys.argv[2]),
        Path(sys.argv[3]),
        sys.argv[4],
        int(sys.argv[5]),
    )
    memory = Path(sys.argv[6])
    world = join_group()
    engine = build(config, world)
    loop = read_from(config, engine, 1)
    saver = _saver(name, engine, world, folder, memory)
    stalls, lengths = [], []
    for step in range(1, steps + WARM_UP + 1):
        began_s = time.monotonic()
        loop.compute(step)
        held_s = -time.monotonic()
        saver.before_update()
        held_s += time.monotonic()
        loop.update(step)
        dist.barrier()
        held_s -= time.monotonic()
        saver.after_update(step)
        held_s += time.monotonic()
        if step > WARM_UP:
            stalls.append(_longest(held_s))
            lengths.append(time.monotonic() - began_s)
    durable = saver.close()
    dist.barrier()
    loop.data.close()
    if world.rank == 0:
        figures = {"stall_s": stalls, "step_s": lengths, "memcpy_s": _memcpy(engine), "durable_s": durable}
        figures["state_bytes"] = [float(sum(part.nbytes for part in _parts(engine)))]
        write_figures(out, figures)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def _saver(name: str, engine: Engine, world: World, folder: Path, memory: Path) -> Saver:
    match name:
        case "none":
            return Nothing()
        case "everstep":
            return Everstep(engine, world, folder, memory)
        case "dcp.save" | "dcp.async_save":
            return Dcp(engine, folder, name == "dcp.async_save")
    raise ValueError(f"no saver is called {name!r}")


def _longest(mine_s: float) -> float:
    value = torch.tensor([mine_s], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())


def _parts(engine: Engine) -> list[torch.Tensor]:
    found = []
    for stateful in engine.state().values():
        for value in stateful.state_dict().values():
            if isinstance(value, torch.Tensor):
                found.append(value.to_local() if hasattr(value, "to_local") else value)
    return found


def _memcpy(engine: Engine) -> list[float]:
    """Seconds of one plain copy of this rank's state into memory that was touched before."""
    parts = _parts(engine)
    copies = [torch.empty_like(part) for part in parts]
    times = []
    with torch.no_grad():
        for _ in range(6):
            began_s = time.monotonic()
            for copy, part in zip(copies, parts, strict=True):
                copy.copy_(part)
            times.append(time.monotonic() - began_s)
    return times[1:]


if __name__ == "__main__":
    main()
