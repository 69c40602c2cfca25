"""A rank that loses a peer, in every collective that there is: what it raises is written down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from trainer.events import Phase, WorkerError

WORLD_SIZE = 3
VICTIM = 0
_N = 3 * 1024

Collective = Callable[[dist.ProcessGroup], object]
COLLECTIVES: dict[str, Collective] = {
    "all_reduce": lambda group: dist.all_reduce(torch.ones(_N), group=group),
    "broadcast": lambda group: dist.broadcast(torch.ones(_N), VICTIM, group=group),
    "all_gather": lambda group: dist.all_gather_into_tensor(torch.empty(_N * WORLD_SIZE), torch.ones(_N), group=group),
    "reduce_scatter": lambda group: dist.reduce_scatter_tensor(torch.empty(_N // 3), torch.ones(_N), group=group),
    "all_to_all": lambda group: dist.all_to_all_single(torch.empty(_N), torch.ones(_N), group=group),
    "barrier": dist.barrier,
    "receive": lambda group: dist.recv(torch.ones(_N), VICTIM, group=group),
    "send": lambda group: [dist.send(torch.ones(_N << 8), VICTIM, group=group) for _ in range(9)],
    "monitored_barrier": lambda group: dist.monitored_barrier(group, timedelta(seconds=2)),
}


def lose_a_peer(rank: int, port: int, folder: Path) -> None:
    """Meet, then rank 0, which hosts the store, kills itself while the others wait for it. Never returns."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == VICTIM, timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=30))
    # A broken group tells no more than that: each collective gets one of its own.
    groups = {name: dist.new_group() for name in COLLECTIVES}
    dist.barrier()
    if rank == VICTIM:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    for name, run in COLLECTIVES.items():
        group = groups[name]
        assert isinstance(group, dist.ProcessGroup)
        _note(folder, rank, name, lambda run=run, group=group: run(group))  # type: ignore[misc]
    _note(folder, rank, "store", lambda: store.get("a key that nobody sets"))
    _note(folder, rank, "late store", lambda: dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=1)))
    os._exit(0)


def _note(folder: Path, rank: int, name: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:  # noqa: BLE001  whatever a library makes of a lost peer is what is asked for
        record = WorkerError(
            rank=rank, step=1, phase=Phase.FORWARD_BACKWARD, type=type(error).__name__, message=str(error),
            traceback="", exit_code=1,
        )  # fmt: skip
        (folder / f"{name}-{rank}.json").write_bytes(msgspec.json.encode(record))
