"""Real processes for tests: `run_ranks` runs a function on every rank of a gloo job, and cleans up whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from parallelism.mesh import World
from parallelism.warm import PRELOAD_MODULES


class RanksFailedError(AssertionError):
    """A rank raised, died or was too slow. The message holds every traceback there is."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(world, *args)` on `world_size` ranks with torch.distributed initialised; returns results in rank order.

    fn must be importable, arguments and results picklable and plain (no tensors). Processes come from a forkserver
    that has the worker's imports loaded, one for the whole test session. On the first failure, or after timeout_s,
    all ranks are killed.

    Raises:
        RanksFailedError: with the tracebacks of all ranks that raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD_MODULES))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_rank_main, args=(rank, world_size, Path(folder) / "store", theirs, fn, args), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: Sequence[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksFailedError(f"ranks {sorted(pending.values())} did not end within {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            ok, value = _receive(pipe)
            if not ok:
                raise RanksFailedError("\n".join([f"rank {pending[pipe]}: {value}", *_other_errors(pending, pipe)]))
            results[pending[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "died without a word"


def _other_errors(pending: dict[Connection, int], first: Connection) -> list[str]:
    """What the peers say too, within two seconds: the first to fail is not always the cause."""
    others = {pipe: rank for pipe, rank in pending.items() if pipe is not first}
    told: list[str] = []
    deadline = time.monotonic() + 2.0
    while others and (ready := wait(list(others), timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            ok, value = _receive(pipe)
            rank = others.pop(pipe)
            if not ok:
                told.append(f"rank {rank}: {value}")
    return told


def _rank_main(
    rank: int, world_size: int, store: Path, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = fn(World(rank, world_size, rank, torch.device("cpu")), *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    pipe.send((True, result))
