"""Bits that flip in a real worker: in a gradient from within, in weights and optimizer state from outside.

Where a tensor lies in a worker's memory is found by what it holds: the snapshot of the same state is in shared memory.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from checkpointing.layout import SnapshotDamagedError
from checkpointing.segment import CONTROL_BYTES
from checkpointing.shardfile import header_size_bytes, parse_header
from cluster.rundir import RunDir
from tests.chaos import faults
from trainer.events import HeartbeatFile, Phase
from trainer.paths import heartbeat_path, segments_dir

if TYPE_CHECKING:
    from tests.chaos.jobs import Job

_PATTERN_BYTES = 64
_CHUNK_BYTES = 1 << 24
_PATIENCE_S = 60.0


def flip_gradient(text: str) -> None:
    """In a worker: the next gradient that this rank computes has a flipped bit, before it is mixed with others'.

    text: which bit of the fp32 number, 31 is the sign, 30 the top of the exponent.
    """
    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    reduce = _fsdp_param_group.foreach_reduce
    mask = 1 << int(text)

    def flipping(fsdp_params: Any, unsharded_grads: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        _fsdp_param_group.foreach_reduce = reduce
        words = unsharded_grads[-1].detach().reshape(-1).view(torch.int32)
        element = int(words.ne(0).nonzero()[0])
        words[element] ^= mask if mask < 1 << 31 else -mask
        return reduce(fsdp_params, unsharded_grads, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = flipping  # type: ignore[assignment]


def flip_state(
    job: Job, rank: int, prefix: str, dice: random.Random, ranks_per_node: int = 2, nodes: Sequence[str] = ()
) -> int:
    """Flip a random bit of a tensor whose name begins with `prefix`, in a running rank's memory; returns the step.

    nodes: those that hold the ranks, if no longer the first ones. It strikes while the rank computes gradients: what
    is in the snapshot of the step before is then what is in memory.
    """
    at, local_rank = divmod(rank, ranks_per_node)
    node = nodes[at] if nodes else f"node{at}"
    process = faults.rank_process(job.run_dir, node, rank)
    ram_dir = RunDir(job.run_dir.absolute()).ram_root("/dev/shm") / node
    beats = HeartbeatFile(heartbeat_path(ram_dir), ranks_per_node).open()
    deadline_s = time.monotonic() + _PATIENCE_S
    try:
        while time.monotonic() < deadline_s:
            beat = beats.read(local_rank)
            if beat is None or beat.phase is not Phase.FORWARD_BACKWARD:
                continue
            process.send_signal(signal.SIGSTOP)
            try:
                beat = beats.read(local_rank)
                if beat is not None and beat.phase is Phase.FORWARD_BACKWARD:
                    places = _places(process, ram_dir, local_rank, beat.step - 1, prefix, dice)
                    for place in places:
                        _flip(process.pid, place, 1 << dice.randrange(8))
                    if places:
                        return beat.step
            finally:
                process.send_signal(signal.SIGCONT)
    finally:
        beats.close()
    raise AssertionError(f"{prefix} of rank {rank} was not found in its memory")


def _places(
    process: psutil.Process, ram_dir: Path, local_rank: int, step: int, prefix: str, dice: random.Random
) -> list[int]:
    """Addresses, outside of shared memory, at which a random piece of the tensor lies; none if nothing is alike."""
    for slot in sorted(segments_dir(ram_dir).glob(f"snapshot-{local_rank}-*.seg")):
        data = slot.read_bytes()[CONTROL_BYTES:]
        try:
            start = header_size_bytes(data[:8], len(data), slot.name)
            meta = parse_header(data[:start], len(data), "", slot.name)
        except SnapshotDamagedError:
            continue
        fits = [part for part in meta.shard.tensors
                if part.name.startswith(prefix) and part.end_bytes - part.start_bytes >= _PATTERN_BYTES]  # fmt: skip
        if meta.step == step and fits:
            part = dice.choice(fits)
            at = start + dice.randrange(part.start_bytes, part.end_bytes - _PATTERN_BYTES + 1, 4)
            pattern = data[at : at + _PATTERN_BYTES]
            return list(_find(process.pid, pattern)) if pattern.count(0) < _PATTERN_BYTES // 2 else []
    return []


def _find(pid: int, pattern: bytes) -> Iterator[int]:
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if not rights.startswith("rw") or "/dev/shm" in line:
                continue
            begin, end = (int(part, 16) for part in span.split("-"))
            for at in range(begin, end, _CHUNK_BYTES):
                try:
                    chunk = os.pread(memory.fileno(), min(_CHUNK_BYTES + _PATTERN_BYTES, end - at), at)
                except OSError:
                    break
                found = chunk.find(pattern)
                while found >= 0:
                    if found < _CHUNK_BYTES:
                        yield at + found
                    found = chunk.find(pattern, found + 1)


def _flip(pid: int, address: int, mask: int) -> None:
    """Change bits of one byte of another process."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        byte = os.pread(memory.fileno(), 1, address)[0]
        assert os.pwrite(memory.fileno(), bytes([byte ^ mask]), address) == 1
