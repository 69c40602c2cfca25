"""The ranks of `benchmarks.checkpoint`: one loop, snapshotted every step by one of several savers.

`-m benchmarks.checkpoint_ranks OUT CONFIG FOLDER SAVER STEPS MEMORY WARM_UP`. Figures of rank 0: `stall_s` is the time
in which the training thread was held up by a snapshot, over all ranks the longest; `step_s` the whole step; `memcpy_s`
one plain copy of the rank's bytes; `durable_s` from the call to its being whole on disk; everstep's agent knows that,
and gets `begun_step` and `begun_s` (monotonic) instead.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.plainloop import build, join_group, read_from
from benchmarks.ranks import write_figures
from checkpointing.manager import SnapshotManager
from configs.load import load_job
from parallelism.engine import Engine
from parallelism.mesh import World

Figures = dict[str, list[float]]


class Saver(Protocol):
    """One way to keep every step."""

    def before_update(self) -> None:
        """The weights are about to change."""

    def after_update(self, step: int) -> None:
        """The step is in the weights."""

    def close(self) -> Figures:
        """Finish; returns what the saver measured itself."""


class Nothing:
    """No snapshots."""

    def before_update(self) -> None:
        """See Saver."""

    def after_update(self, step: int) -> None:
        """See Saver."""

    def close(self) -> Figures:
        """See Saver."""
        return {}


class Everstep:
    """Every step to shared memory, to disk whenever the disk is free; the benchmark persists, as an agent would."""

    def __init__(self, engine: Engine, world: World, folder: Path, memory: Path) -> None:
        ram = memory / "segments"
        ram.mkdir(exist_ok=True)
        self.manager = SnapshotManager(
            engine.state(), ram, world.local_rank, world.rank, world.world_size, 1, folder, {"dp_shard": 2}
        )
        self.manager.prepare()
        self.persisted: dict[int, float] = {}
        dist.barrier()

    def before_update(self) -> None:
        """See Saver."""
        self.manager.wait()

    def after_update(self, step: int) -> None:
        """See Saver."""
        # What the vote says in a real step.
        busy = torch.tensor([self.manager.persist_busy], dtype=torch.int32)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        persist = not busy.item()
        if persist:
            self.persisted[step] = time.monotonic()
        self.manager.stage(step, persist=persist, scalars={})

    def close(self) -> Figures:
        """See Saver."""
        self.manager.wait()
        self.manager.close()
        return {"begun_step": [float(step) for step in self.persisted], "begun_s": list(self.persisted.values())}


class DcpSave:
    """torch's distributed checkpoint, saved before the next step begins."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.state: dict[str, Any] = dict(engine.state())
        self.folder = folder
        self.saved_s: list[float] = []

    def before_update(self) -> None:
        """See Saver. Nothing is under way."""

    def after_update(self, step: int) -> None:
        """See Saver."""
        began_s = time.monotonic()
        dcp.save(self.state, storage_writer=_writer(self.folder, step), planner=_planner())
        self.saved_s.append(time.monotonic() - began_s)

    def close(self) -> Figures:
        """See Saver."""
        return {"durable_s": self.saved_s}


class DcpAsyncSave:
    """torch's `async_save`, as it comes or tuned.

    Tuned is what was fastest on CPU: the plan cached; staged by a stager that is kept, in a thread, so that it overlaps
    with the next forward and backward (waited for before the update); written by a process that reads shared memory.
    """

    def __init__(self, engine: Engine, folder: Path, tuned: bool) -> None:
        self.state: dict[str, Any] = dict(engine.state())
        self.folder = folder
        self.group = dist.new_group(backend="gloo")
        self.options: dict[str, Any] = {}
        self.stager: DefaultStager | None = None
        if tuned:
            # The stager knows a tensor again by its storage's Python object, which must live on for that.
            self.storages = [part.untyped_storage() for part in _parts(engine)]
            self.stager = DefaultStager(StagingOptions(False, True, True, False))
            self.options = {"async_stager": self.stager, "async_checkpointer_type": AsyncCheckpointerType.PROCESS}
        self.tuned = tuned
        self.staged: Future[None] | None = None
        self.uploaded: Future[Any] | None = None
        self.durable_s: list[float] = []

    def before_update(self) -> None:
        """See Saver."""
        if self.staged is not None:
            self.staged.result()

    def after_update(self, step: int) -> None:
        """See Saver. async_save refuses a second save before the first is on disk: waiting is part of the stall."""
        if self.uploaded is not None:
            self.uploaded.result()
        began_s = time.monotonic()
        planner = _planner() if self.tuned else None
        response = dcp.async_save(
            self.state,
            storage_writer=_writer(self.folder, step),
            process_group=self.group,
            planner=planner,
            **self.options,
        )
        if isinstance(response, AsyncSaveResponse):
            self.staged, self.uploaded = response.staging_completion, response.upload_completion
        else:
            self.uploaded = response
        self.uploaded.add_done_callback(lambda _: self.durable_s.append(time.monotonic() - began_s))

    def close(self) -> Figures:
        """See Saver."""
        if self.uploaded is not None:
            self.uploaded.result()
        if self.stager is not None:
            self.stager.close()
        return {"durable_s": self.durable_s}


def _writer(folder: Path, step: int) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder / str(step % 3), overwrite=True)


def _planner() -> dcp.DefaultSavePlanner:
    return dcp.DefaultSavePlanner(enable_plan_caching=True)


def main() -> None:
    """Measure one saver."""
    out, config, folder, memory = Path(sys.argv[1]), load_job(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[6])
    name, steps, warm_up = sys.argv[4], int(sys.argv[5]), int(sys.argv[7])
    world = join_group()
    engine = build(config, world)
    loop = read_from(config, engine, 1)
    saver = _saver(name, engine, world, folder, memory)
    stalls, lengths = [], []
    for step in range(1, steps + warm_up + 1):
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
        if step > warm_up:
            stalls.append(_longest(held_s))
            lengths.append(time.monotonic() - began_s)
    found = saver.close()
    loop.data.close()
    dist.barrier()
    # On all ranks at once, as snapshots are: they share the memory's bandwidth.
    copies = [_longest(seconds) for seconds in _memcpy(engine)]
    if world.rank == 0:
        size = [float(sum(part.nbytes for part in _parts(engine)))]
        write_figures(out, {"stall_s": stalls, "step_s": lengths, "memcpy_s": copies, "state_bytes": size, **found})
    dist.barrier()


def _saver(name: str, engine: Engine, world: World, folder: Path, memory: Path) -> Saver:
    match name:
        case "none":
            return Nothing()
        case "everstep":
            return Everstep(engine, world, folder, memory)
        case "dcp.save":
            return DcpSave(engine, folder)
        case "dcp.async_save" | "dcp.async_save, tuned":
            return DcpAsyncSave(engine, folder, tuned=name.endswith("tuned"))
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
