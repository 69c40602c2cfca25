"""Device to host: the live tensors are copied straight into a slot of the RAM tier.

On CPU they go in batches, each checksummed while it is still in the cache. On CUDA the copies go over a stream
of their own into page-locked memory while the next forward and backward compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from checkpointing.blocks import PlainReader
from checkpointing.checksum import CHUNK_BYTES, Checksum, checksum
from checkpointing.flatten import LocalTensor
from checkpointing.segment import CONTROL_BYTES, Segment
from checkpointing.shardfile import ShardPlan

BATCH_BYTES = 4 * 2**20


class SlotViews:
    """A slot's tensors, as torch sees them: views into the mapping, one for each tensor of the plan."""

    def __init__(self, segment: Segment, plan: ShardPlan, tensors: Sequence[LocalTensor]) -> None:
        self.segment = segment
        self.plan = plan
        self.pinned = False
        self.views = [
            _view(segment.data, plan.data_start_bytes + part.start_bytes, local.tensor)
            for part, local in zip(plan.slices, tensors, strict=True)
        ]

    def pin(self) -> None:
        """Page-lock the mapping for copies from CUDA devices. RuntimeError if the driver refuses."""
        if not self.pinned:
            base = torch.frombuffer(self.segment.data, dtype=torch.uint8)
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(base.data_ptr(), base.numel(), 0)))
            self.pinned = True

    def close(self) -> None:
        """Let go of the mapping."""
        if self.pinned:
            base = torch.frombuffer(self.segment.data, dtype=torch.uint8)
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(base.data_ptr())))
            del base
        self.views = []
        self.segment.close()


def read_back(slot: SlotViews, tensors: Sequence[LocalTensor], fd: int) -> str:
    """Fill the live tensors from a slot, open as fd. Returns the checksum of the whole shard as it was read.

    It is the caller's to compare: until then the tensors may hold anything. Those in host memory are read into, not
    copied from the mapping: mapping a slot takes longer than the copy. OSError if the slot does not give its bytes.
    """
    running, reader, at_bytes = Checksum(), PlainReader(fd), CONTROL_BYTES
    for buffer in [memoryview(bytearray(slot.plan.data_start_bytes)), *_buffers(slot, tensors)]:
        for begin in range(0, len(buffer), CHUNK_BYTES):
            piece = buffer[begin : begin + CHUNK_BYTES]
            if not piece.readonly:
                reader.read_into(piece, at_bytes + begin)
            running.update(piece)
        at_bytes += len(buffer)
    return running.hex()


def _buffers(slot: SlotViews, tensors: Sequence[LocalTensor]) -> Iterator[memoryview]:
    """Each tensor's bytes, in the order of the file: to be filled, or, once it was copied, as the slot has them."""
    for local, part, view in zip(tensors, slot.plan.slices, slot.views, strict=True):
        tensor, start = local.tensor.detach(), slot.plan.data_start_bytes + part.start_bytes
        if tensor.is_cuda or not tensor.is_contiguous():
            tensor.copy_(view)
            yield slot.segment.data[start : start + part.end_bytes - part.start_bytes].toreadonly()
        elif tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


class Copier:
    """Copies one state into slots. On CUDA it has a stream of its own, which waits for `fence`.

    volatile: numbers of the tensors that `copy` finds in the slot already, put there by `copy_volatile`.
    """

    def __init__(self, tensors: Sequence[LocalTensor], plan: ShardPlan, volatile: frozenset[int]) -> None:
        self.tensors = [local.tensor for local in tensors]
        self._volatile = sorted(volatile)
        self._batches = _batches(plan, volatile)
        devices = {tensor.device for tensor in self.tensors if tensor.is_cuda}
        assert len(devices) <= 1, devices
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None

    def copy_volatile(self, slot: SlotViews) -> None:
        """Copy now, in order with what the device computes."""
        self._copy_batch(slot, self._volatile)

    def fence(self) -> torch.cuda.Event | None:
        """Call where the state is final, on the stream that computes it."""
        return torch.cuda.current_stream().record_event() if self._stream else None

    def copy(self, slot: SlotViews, fence: torch.cuda.Event | None) -> str:
        """Copy all that is not volatile; returns the checksum of the whole shard."""
        if self._stream is not None:
            assert fence is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(fence)
                for numbers, _ in self._batches:
                    self._copy_batch(slot, numbers)
            self._stream.synchronize()
            return checksum(slot.segment.data[: slot.plan.size_bytes])
        running = Checksum()
        done = 0
        for numbers, end in self._batches:
            self._copy_batch(slot, numbers)
            running.update(slot.segment.data[done:end])
            done = end
        return running.hex()

    def _copy_batch(self, slot: SlotViews, numbers: Sequence[int]) -> None:
        if numbers:  # one call for many tensors: the GIL stays with the thread that trains
            into, out_of = [slot.views[i] for i in numbers], [self.tensors[i] for i in numbers]
            torch._foreach_copy_(into, out_of, non_blocking=True)

    def pin(self, slot: SlotViews) -> None:
        """Prepare a slot for fast copies from the device; nothing to do on CPU."""
        if self._stream is not None:
            slot.pin()


def _batches(plan: ShardPlan, volatile: frozenset[int]) -> list[tuple[list[int], int]]:
    """Numbers of the tensors to copy together, and where in the file each batch ends; the last ends with the file."""
    batches: list[tuple[list[int], int]] = []
    numbers: list[int] = []
    begun = 0
    for number, part in enumerate(plan.slices):
        if number not in volatile:
            numbers.append(number)
        if part.end_bytes - begun >= BATCH_BYTES:
            batches.append((numbers, plan.data_start_bytes + part.end_bytes))
            numbers, begun = [], part.end_bytes
    return [*batches, (numbers, plan.size_bytes)]


def _view(data: memoryview, start: int, like: torch.Tensor) -> torch.Tensor:
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)
