"""Everstep's side of `benchmarks.checkpoint`: the worker's manager here, the agent's part in a process of its own."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.checkpoint_savers import TIMEOUT_S
from benchmarks.checkpoint_state import State, least
from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME
from checkpointing.manager import SnapshotManager
from checkpointing.persister import Persister
from checkpointing.segment import PersistTo
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind

KEEP_LAST = 2
FAILURES = "failures.txt"
_POLL_S = 0.002


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where Everstep's files lie. run: the run directory; ram: the node's folder in shared memory."""

    run: str
    ram: str
    slots: int


class Everstep:
    """Every save to shared memory with its checksum, and from there, by the agent, to the run directory."""

    def __init__(self, state: State, places: Places) -> None:
        self.state = state
        self.places = places
        self.run, self.ram = Path(places.run), Path(places.ram)
        self.manager = self._open()
        self._step = 0
        dist.barrier()

    def begin(self, step: int) -> None:
        """See Saver."""
        self._step = step
        self.manager.stage(step, persist=PersistTo.RUN, scalars={})

    def release(self) -> None:
        """See Saver."""
        self.manager.wait()

    def durable(self) -> float:
        """See Saver. The manifest is written last; its folder is made durable once more, to be sure of the time."""
        folder, failures = disk.step_dir(self.run, self._step), self.ram / FAILURES
        deadline = time.monotonic() + TIMEOUT_S
        while not (folder / MANIFEST_NAME).exists():
            if failures.exists() or time.monotonic() > deadline:
                raise RuntimeError(failures.read_text() if failures.exists() else f"step {self._step} not committed")
            time.sleep(_POLL_S)
        disk.sync_dir(folder)
        at_s = time.monotonic()
        while self.manager.persist_busy or len(disk.all_steps(self.run)) > KEEP_LAST:
            if time.monotonic() > deadline:
                raise RuntimeError("the agent does not finish")
            time.sleep(_POLL_S)
        return at_s

    def load(self, step: int) -> None:
        """See Saver."""
        self._load(-1, step)

    def load_from_ram(self, step: int) -> None:
        """As a worker does that takes the place of a dead one: map the slots anew, verify, copy."""
        self.manager.close()
        self.manager = self._open()
        self._load(step, step)

    def close(self) -> None:
        """See Saver."""
        self.manager.close()

    def _open(self) -> SnapshotManager:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        manager = SnapshotManager(
            {"state": self.state}, self.ram, rank, rank, world_size, 1, self.run, {"dp_shard": world_size},
            slots=self.places.slots,
        )  # fmt: skip
        manager.prepare()
        return manager

    def _load(self, ram_step: int, expected: int) -> None:
        loaded = self.manager.load(ram_step, agree, broadcast)
        if loaded is None or loaded.step != expected or loaded.rejections:
            raise RuntimeError(f"step {expected} not loaded: {loaded}")


def agent(places: Places, ready: Connection) -> None:
    """The agent's part: persist and commit until the other end of the connection is closed."""
    failures = Path(places.ram) / FAILURES

    def on_event(event: StoreEvent) -> None:
        if event.kind is StoreEventKind.FAILED:
            with failures.open("a") as out:
                out.write(f"{event.detail}\n")

    persister = Persister(NodeStore(Path(places.ram), Path(places.run), keep_last=KEEP_LAST), on_event).start()
    ready.send(True)
    ready.poll(None)
    persister.stop()


def agree(mine: bool) -> bool:
    """Whether all ranks say yes. Collective."""
    return least(float(mine)) == 1.0


def broadcast(values: list[int]) -> list[int]:
    """Rank 0's list. Collective."""
    count = torch.tensor([len(values)])
    dist.broadcast(count, 0)
    found = torch.tensor(values) if dist.get_rank() == 0 else torch.zeros(int(count.item()), dtype=torch.int64)
    if len(found):
        dist.broadcast(found, 0)
    return [int(value) for value in found]
