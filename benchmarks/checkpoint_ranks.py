"""The ranks of `benchmarks.checkpoint`: one fresh process each for every side, forked where torch is imported already.

Figures, over all ranks the longest: `stall_s` (nothing overlaps: begin to save and wait until the state may change),
`durable_s` (from the same beginning until whole on disk everywhere), `overlapped_stall_s` and `overlapped_step_s` (a
step of known length computes meanwhile), `restore_*_s` (verified: the content's digest is the saved one's).
`saved_at_s` and `restored_at_s` are the ends of these parts (monotonic), `state_bytes` is one rank's.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.checkpoint_everstep import Everstep, Places
from benchmarks.checkpoint_files import forget_cached, read_into, write_durably
from benchmarks.checkpoint_savers import (
    DcpAsyncSave,
    DcpSave,
    MegatronAsync,
    Saver,
    TorchCheckpointing,
    step_folder,
)
from benchmarks.checkpoint_state import Compute, State, longest
from checkpointing import disk

KEPT = 2
WARM_UP = 1
OUT_NAME = "figures.json"


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one side's ranks shall do. total_bytes: over all ranks; folder: on the disk, this side's own.

    few: how often a step and a restore are measured.
    """

    side: str
    world_size: int
    port: int
    total_bytes: int
    step_s: float
    repeats: int
    few: int
    folder: str
    places: Places


class Figures:
    """Samples by name; every rank adds, with the longest of all."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, mine: float) -> None:
        """Collective."""
        self.values[name].append(longest(mine))

    def timed(self, name: str, call: Callable[[], None]) -> None:
        """Run `call` on all ranks at once and keep the longest time. Collective."""
        dist.barrier()
        began_s = time.monotonic()
        call()
        self.add(name, time.monotonic() - began_s)


def run_rank(rank: int, work: Work) -> None:
    """One rank from its beginning to its end; rank 0 leaves the figures, a rank that fails its reason."""
    os.setsid()
    log = os.open(Path(work.folder) / "ranks.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(work.port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        _run(rank, work)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (Path(work.folder) / f"failed-{rank}.txt").write_text(reason[:600])
        raise


def _run(rank: int, work: Work) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    mesh = init_device_mesh("cpu", (work.world_size,))
    state = State(work.total_bytes, mesh)
    figures = Figures()
    with torch.no_grad():
        if work.side == "limit":
            _limits(state, work, figures)
        else:
            _saver_figures(state, work, figures)
    if rank == 0:
        figures.values["state_bytes"] = [float(state.size_bytes)]
        (Path(work.folder) / OUT_NAME).write_bytes(msgspec.json.encode(figures.values))
    dist.barrier()
    dist.destroy_process_group()


def make_saver(state: State, work: Work) -> Saver:
    """The saver a side is called after."""
    name, _, tuned = work.side.partition(", ")
    folder = Path(work.folder) / "checkpoints"
    match name:
        case "everstep":
            return Everstep(state, work.places)
        case "dcp.save":
            return DcpSave(state, folder, bool(tuned))
        case "dcp.async_save thread" | "dcp.async_save process":
            return DcpAsyncSave(state, folder, bool(tuned), process=name.endswith("process"))
        case "torch_checkpointing":
            return TorchCheckpointing(state, folder, bool(tuned))
        case "megatron-core async":
            return MegatronAsync(state, folder, bool(tuned))
    raise ValueError(f"no saver is called {work.side!r}")


def _saver_figures(state: State, work: Work, figures: Figures) -> None:
    compute = Compute(work.step_s)
    saver = make_saver(state, work)
    step = 0
    # Memory that is touched for the first time is slow: every slot of ours, and the peers' one, gets a first save.
    for number in range(work.places.slots if isinstance(saver, Everstep) else WARM_UP):
        step = _next(saver, step, state, work)
        _save_alone(saver, step, _first(figures, number))
    for _ in range(work.few):
        step = _next(saver, step, state, work)
        _save_overlapped(saver, step, state, compute, figures)
    for _ in range(work.repeats):
        step = _next(saver, step, state, work)
        _save_alone(saver, step, figures)
    figures.add("saved_at_s", time.monotonic())
    _restore(saver, step, state, work, figures)
    saver.close()


def _next(saver: Saver, step: int, state: State, work: Work) -> int:
    """Change the state; Everstep has its own retention, for all others rank 0 removes what is old. Nothing is timed."""
    state.update()
    if not isinstance(saver, Everstep) and dist.get_rank() == 0:
        shutil.rmtree(step_folder(Path(work.folder) / "checkpoints", step + 1 - KEPT), ignore_errors=True)
    dist.barrier()
    return step + 1


def _first(figures: Figures, number: int) -> Figures:
    """Where the warm-up's figures go: the very first stall is kept under a name of its own."""
    found = Figures()
    if number == 0:
        found.values["stall_s"] = figures.values["first_stall_s"]
    return found


def _save_alone(saver: Saver, step: int, figures: Figures) -> None:
    dist.barrier()
    began_s = time.monotonic()
    saver.begin(step)
    saver.release()
    held_s = time.monotonic() - began_s
    done_s = saver.durable() - began_s
    figures.add("stall_s", held_s)
    figures.add("durable_s", done_s)


def _save_overlapped(saver: Saver, step: int, state: State, compute: Compute, figures: Figures) -> None:
    """A step: what was computed last is saved while the next is computed; the update waits for the copy."""
    dist.barrier()
    began_s = time.monotonic()
    saver.begin(step)
    held_s = time.monotonic() - began_s
    compute.step()
    held_s -= time.monotonic()
    saver.release()
    held_s += time.monotonic()
    state.update()
    step_s = time.monotonic() - began_s
    saver.durable()
    figures.add("overlapped_stall_s", held_s)
    figures.add("overlapped_step_s", step_s)


def _restore(saver: Saver, step: int, state: State, work: Work, figures: Figures) -> None:
    digest = state.digest()

    def cold() -> None:
        if dist.get_rank() == 0:
            forget_cached(Path(work.folder))

    def measure(name: str, before: Callable[[], None], load: Callable[[int], None]) -> None:
        for _ in range(work.few):
            state.clear()
            before()
            figures.timed(f"restore_{name}_s", lambda: load(step))
            if state.digest() != digest:
                raise RuntimeError(f"what came back from {name} is not what was saved")

    if isinstance(saver, Everstep):
        measure("ram", saver.die, saver.load_from_ram)
    measure("disk", cold, saver.load)
    if isinstance(saver, Everstep):
        if work.places.bucket:
            assert saver.bucket.name
            figures.timed("s3_durable_s", lambda: saver.send_to_s3(step))
            measure("s3", saver.lose_run_directory, saver.load_from_s3)
        saver.leave_newest_slot(step)
        figures.timed("peer_durable_s", lambda: saver.send_to_peer(step))
        measure("peer", saver.lose_memory, saver.load_from_peer)
    figures.add("restored_at_s", time.monotonic())


def _limits(state: State, work: Work, figures: Figures) -> None:
    """What the machine can do: a copy in memory, a file written and synced, one read cold, and the step alone."""
    compute = Compute(work.step_s)
    copies = [torch.zeros_like(local) for local in state.locals]
    path = Path(work.folder) / f"limit-{dist.get_rank()}"
    for number in range(WARM_UP + work.repeats):
        into = figures if number >= WARM_UP else Figures()
        into.timed("memcpy_s", lambda: _copy(copies, state.locals))
        into.timed("write_s", lambda: write_durably(path, state.locals))
        disk.sync_dir(path.parent)
        if dist.get_rank() == 0:
            forget_cached(path.parent)
        into.timed("read_s", lambda: read_into(path, copies))
        path.unlink()
        into.timed("plain_step_s", lambda: _plain_step(compute, state))
    figures.add("saved_at_s", time.monotonic())


def _copy(into: list[torch.Tensor], out_of: list[torch.Tensor]) -> None:
    for copy, part in zip(into, out_of, strict=True):
        copy.copy_(part)


def _plain_step(compute: Compute, state: State) -> None:
    compute.step()
    state.update()
