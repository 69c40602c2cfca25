"""Savers of `benchmarks.checkpoint`: each way to keep a state, behind one small interface."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.checkpoint_files import fsync_tree
from benchmarks.checkpoint_state import State

TIMEOUT_S = 240.0


class Saver(Protocol):
    """One way to keep a state on disk."""

    def begin(self, step: int) -> None:
        """Begin to save; returns when the training thread may go on. The one before is durable."""

    def release(self) -> None:
        """Return when the state may change."""

    def durable(self) -> float:
        """Wait until what was begun is whole on disk; when that was (monotonic seconds)."""

    def load(self, step: int) -> None:
        """Fill the state from the disk."""

    def close(self) -> None:
        """Finish."""


class DcpSave:
    """torch's distributed checkpoint, saved before training goes on. Tuned: the plan is cached."""

    def __init__(self, state: State, folder: Path, tuned: bool) -> None:
        self.state = state
        self.folder = folder
        self.tuned = tuned
        self._at_s = 0.0

    def begin(self, step: int) -> None:
        """See Saver."""
        dcp.save(self.state.state_dict(), storage_writer=_writer(self.folder, step), planner=_planner(self.tuned))
        self._at_s = time.monotonic()

    def release(self) -> None:
        """See Saver. Nothing is under way."""

    def durable(self) -> float:
        """See Saver."""
        return self._at_s

    def load(self, step: int) -> None:
        """See Saver."""
        dcp.load(self.state.state_dict(), checkpoint_id=step_folder(self.folder, step))

    def close(self) -> None:
        """See Saver."""


class DcpAsyncSave(DcpSave):
    """torch's async_save, written by a thread or a process.

    Tuned: the plan is cached, and a stager that is kept copies in a thread (waited for before the update), for a
    process into shared memory.
    """

    def __init__(self, state: State, folder: Path, tuned: bool, process: bool) -> None:
        super().__init__(state, folder, tuned)
        self.group = dist.new_group(backend="gloo")
        kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.options: dict[str, Any] = {"async_checkpointer_type": kind}
        self.stager: DefaultStager | None = None
        if tuned:
            self.stager = DefaultStager(StagingOptions(False, process, True, False))
            self.options["async_stager"] = self.stager
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any] | None = None

    def begin(self, step: int) -> None:
        """See Saver."""
        response = dcp.async_save(
            self.state.state_dict(),
            storage_writer=_writer(self.folder, step),
            process_group=self.group,
            planner=_planner(self.tuned),
            **self.options,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged, self._uploaded = response.staging_completion, response.upload_completion
        else:
            self._uploaded = response
        self._uploaded.add_done_callback(self._note_time)

    def release(self) -> None:
        """See Saver."""
        if self._staged is not None:
            self._staged.result(TIMEOUT_S)

    def durable(self) -> float:
        """See Saver."""
        assert self._uploaded is not None
        self._uploaded.result(TIMEOUT_S)
        return self._at_s or time.monotonic()

    def close(self) -> None:
        """See Saver."""
        if self.stager is not None:
            self.stager.close()

    def _note_time(self, _: Future[Any]) -> None:
        self._at_s = time.monotonic()


class TorchCheckpointing:
    """`torch_checkpointing`, asynchronous, as far as it runs without CUDA.

    No resharder, since its metadata collective wants CUDA (so it loads on the layout it was saved on), and no direct
    I/O, which it does in unaligned pieces. Tuned: staging memory is allocated before the first save, two threads
    write. It does not fsync, which is done here for it: each rank its own files, and time counts until then.
    """

    def __init__(self, state: State, folder: Path, tuned: bool) -> None:
        from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointManager, CheckpointWriterConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.state = state
        self.folder = folder
        writer = CheckpointWriterConfig(file_write_max_threads=2 if tuned else 1)
        self.manager = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(writer_config=writer),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self._payload = {"state": dict(zip(state.tensors, [*state.locals, state.counter], strict=True))}
        if tuned:
            self.manager.prewarm_staging(self._payload)
        self._step = 0

    def begin(self, step: int) -> None:
        """See Saver."""
        self._step = step
        self._written = self.manager.save(str(step_folder(self.folder, step)), self._payload)

    def release(self) -> None:
        """See Saver. Its lock is what it offers to guard an update with."""
        with self.manager.lock():
            pass

    def durable(self) -> float:
        """See Saver."""
        assert self._written is not None
        self._written.result(TIMEOUT_S)
        dist.barrier()  # the first rank renames the folder when all have written
        fsync_tree(step_folder(self.folder, self._step), f"*_{dist.get_rank()}.pt")
        return time.monotonic()

    def load(self, step: int) -> None:
        """See Saver. What it does not fill in place is copied."""
        found = self.manager.load(str(step_folder(self.folder, step)), into=self._payload)["state"]
        with torch.no_grad():
            for name, tensor in self._payload["state"].items():
                if found[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(found[name])

    def close(self) -> None:
        """See Saver."""
        self.manager.close()


class MegatronAsync:
    """megatron-core's dist_checkpointing with its asynchronous queue. Tuned: structure and metadata are cached.

    It asks CUDA for its device and to synchronise even where all tensors are on the CPU; `without_cuda` answers. On
    the CPU it copies nothing: a forked process has the memory as it was, and the next update pays for the copy.
    """

    def __init__(self, state: State, folder: Path, tuned: bool) -> None:
        without_cuda()
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        self.state = state
        self.folder = folder
        self.checkpointing = dist_checkpointing
        self.strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=tuned)
        self.queue = AsyncCallsQueue()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        names = [name for name in state.tensors if name != "optimizer.step"]
        self.sharded = {
            name: ShardedTensor.from_rank_offsets(name, local, (0, rank, world_size))
            for name, local in zip(names, state.locals, strict=True)
        }
        self.sharded["optimizer.step"] = ShardedTensor.from_rank_offsets(
            "optimizer.step", state.counter, replica_id=rank
        )

    def begin(self, step: int) -> None:
        """See Saver."""
        folder = step_folder(self.folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        request = self.checkpointing.save(
            dict(self.sharded), str(folder), sharded_strategy=self.strategy, async_sharded_save=True
        )
        self.queue.schedule_async_request(request)

    def release(self) -> None:
        """See Saver. The forked process has its own view of the memory."""

    def durable(self) -> float:
        """See Saver."""
        self.queue.maybe_finalize_async_calls(blocking=True)
        return time.monotonic()

    def load(self, step: int) -> None:
        """See Saver."""
        found = self.checkpointing.load(dict(self.sharded), str(step_folder(self.folder, step)))
        with torch.no_grad():
            for name, wanted in self.sharded.items():
                if found[name].data_ptr() != wanted.data.data_ptr():
                    wanted.data.copy_(found[name])

    def close(self) -> None:
        """See Saver."""
        self.queue.close()


def without_cuda() -> None:
    """Answer what megatron-core asks of CUDA on a machine that has none: the device is the CPU, and all is done."""
    if not torch.cuda.is_available():
        cuda: Any = torch.cuda
        cuda.current_device = lambda: "cpu"
        cuda.synchronize = lambda device=None: None


def step_folder(folder: Path, step: int) -> Path:
    """Where a peer's checkpoint of a step lies."""
    return folder / f"step-{step}"


def _writer(folder: Path, step: int) -> dcp.FileSystemWriter:
    os.makedirs(step_folder(folder, step), exist_ok=True)
    return dcp.FileSystemWriter(step_folder(folder, step), overwrite=True)


def _planner(cached: bool) -> dcp.DefaultSavePlanner:
    return dcp.DefaultSavePlanner(enable_plan_caching=cached)
