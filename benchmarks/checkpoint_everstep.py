"""Everstep's side of `benchmarks.checkpoint`: the worker's manager here, the agent's part in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.checkpoint_savers import TIMEOUT_S
from benchmarks.checkpoint_state import State, least
from checkpointing import disk
from checkpointing.copies import CopyStore
from checkpointing.gather import Gatherer, Need
from checkpointing.layout import MANIFEST_NAME, Manifest, ShardRef, decode_document
from checkpointing.manager import SnapshotManager
from checkpointing.persister import Persister
from checkpointing.s3 import Bucket
from checkpointing.segment import PersistTo, parse_segment_name
from checkpointing.slots import find_slot, segment_paths
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from checkpointing.transfer_client import TransferClient
from checkpointing.transfer_server import TransferServer
from configs.schema import S3Config

GENERATION = 1
KEEP_LAST = 2
FAILURES = "failures.txt"
_POLL_S = 0.002


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where Everstep's files lie. run: the run directory; ram: the node's folder in shared memory.

    peer: where another node's agent listens, with the job's key; bucket: "" if there is no S3; environment: what a
    process needs to get into the bucket.
    """

    run: str
    ram: str
    slots: int
    peer: str = ""
    key: str = ""
    bucket: str = ""
    endpoint: str = ""
    environment: dict[str, str] = {}


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

    def die(self) -> None:
        """A worker that is killed: the kernel takes its mappings away, which is nobody's restore."""
        self.manager.close()

    def load_from_ram(self, step: int) -> None:
        """As a worker does that takes the place of a dead one: map the slots anew, verify, copy."""
        self.manager = self._open()
        self._load(step, step)

    def close(self) -> None:
        """See Saver."""
        self.manager.close()

    def leave_newest_slot(self, step: int) -> None:
        """Unmap all slots, and remove those that do not hold the step: there must be room for a peer's copy."""
        self.manager.close()
        located = find_slot(self.ram, self._ref(step))
        assert located is not None
        for path in self._own_slots():
            if path != located.path:
                path.unlink()

    def send_to_peer(self, step: int) -> None:
        """What an agent does after each snapshot: send this rank's to the other node."""
        located = find_slot(self.ram, self._ref(step))
        assert located is not None
        with contextlib.closing(TransferClient(bytes.fromhex(self.places.key))) as client:
            client.push(self.places.peer, located)

    def lose_memory(self) -> None:
        """This rank's slots are gone, as on a node that takes a lost one's place."""
        self.manager.close()
        for path in self._own_slots():
            path.unlink()

    def load_from_peer(self, step: int) -> None:
        """The agent brings all ranks' shards into this node's memory; then each worker maps, verifies and copies."""
        if dist.get_rank() == 0:
            self._gather(step)
        dist.barrier()
        self.manager = self._open(slots=1)
        self._load(step, step)

    def send_to_s3(self, step: int) -> None:
        """What an agent's uploader does: shard by shard, and the manifest last. Rank 0 does it, the others wait."""
        if dist.get_rank() == 0:
            manifest, bucket = disk.read_manifest(self.run, step), self.bucket
            folder = disk.step_dir(self.run, step)
            for shard in manifest.shards:
                bucket.upload(folder / shard.file, step, shard.file, checksum=shard.checksum)
            if problem := bucket.refusal(manifest, (folder / MANIFEST_NAME).read_bytes()):
                raise RuntimeError(problem)
        dist.barrier()

    def lose_run_directory(self) -> None:
        """All of it is gone."""
        if dist.get_rank() == 0:
            shutil.rmtree(disk.checkpoints_dir(self.run))
        dist.barrier()

    def load_from_s3(self, step: int) -> None:
        """Every rank fetches its shard into the run directory, and loads from there, verified like any other."""
        bucket, folder = self.bucket, disk.step_dir(self.run, step)
        data = bucket.manifest(step)
        shard = decode_document(data, Manifest, MANIFEST_NAME).shards[dist.get_rank()]
        folder.mkdir(parents=True, exist_ok=True)
        bucket.fetch(step, GENERATION, shard, folder / shard.file)
        if dist.get_rank() == 0:
            disk.write_atomic(folder / MANIFEST_NAME, data)
        dist.barrier()
        self._load(-1, step)

    def _gather(self, step: int) -> None:
        ranks, scratch = range(dist.get_world_size()), self.ram.parent / "scratch"
        copies, key = CopyStore(scratch), bytes.fromhex(self.places.key)
        gatherer = Gatherer(NodeStore(self.ram, self.run), copies, key, scratch)
        problems: list[str] = []
        gatherer.gather(
            [Need(ShardRef(GENERATION, step, rank), rank, (self.places.peer,)) for rank in ranks],
            lambda found: problems.append(found.problem),
        )
        copies.close()
        if any(problems):
            raise RuntimeError("; ".join(filter(None, problems)))

    @functools.cached_property
    def bucket(self) -> Bucket:
        """The bucket, connected: importing boto3 is nobody's restore."""
        os.environ.update(self.places.environment)
        found = Bucket(S3Config(bucket=self.places.bucket, endpoint=self.places.endpoint), "benchmark")
        found.committed()
        return found

    def _own_slots(self) -> list[Path]:
        paths = {path: parse_segment_name(path.name) for path in segment_paths(self.ram)}
        return [path for path, named in paths.items() if named is not None and named[0] == dist.get_rank()]

    @staticmethod
    def _ref(step: int) -> ShardRef:
        return ShardRef(GENERATION, step, dist.get_rank())

    def _open(self, slots: int = 0) -> SnapshotManager:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        manager = SnapshotManager(
            {"state": self.state}, self.ram, rank, rank, world_size, GENERATION, self.run, {"dp_shard": world_size},
            slots=slots or self.places.slots,
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


def peer(folder: str, key: str, ready: Connection) -> None:
    """Another node's agent: keeps copies, and serves them, until the other end of the connection is closed."""
    copies = CopyStore(Path(folder))
    server = TransferServer("127.0.0.1", bytes.fromhex(key), copies.find, copies)
    ready.send(server.start())
    ready.poll(None)
    server.close()
    copies.close()


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
