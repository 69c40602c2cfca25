"""Device to host: the live tensors are copied straight into a slot of the RAM tier.

On CPU it is one copy per tensor, each checksummed while it is still in the cache. On CUDA the copies go over a stream
of their own into page-locked memory while the next forward and backward compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpointing.checksum import Checksum, checksum
from checkpointing.flatten import LocalTensor
from checkpointing.segment import Segment
from checkpointing.shardfile import ShardPlan


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


class Copier:
    """Copies one state into slots. On CUDA it has a stream of its own, which waits for `fence`."""

    def __init__(self, tensors: Sequence[LocalTensor]) -> None:
        self.tensors = tensors
        devices = {local.tensor.device for local in tensors if local.tensor.is_cuda}
        assert len(devices) <= 1, devices
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None

    def fence(self) -> torch.cuda.Event | None:
        """Call where the state is final, on the stream that computes it."""
        return torch.cuda.current_stream().record_event() if self._stream else None

    def copy(self, slot: SlotViews, fence: torch.cuda.Event | None, skip: frozenset[int]) -> str:
        """Copy all tensors but those numbered in `skip` (already there); returns the checksum of the whole shard."""
        if self._stream is not None:
            assert fence is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(fence)
                for number, local in enumerate(self.tensors):
                    if number not in skip:
                        slot.views[number].copy_(local.tensor, non_blocking=True)
            self._stream.synchronize()
            return checksum(slot.segment.data[: slot.plan.size_bytes])
        return self._copy_on_cpu(slot, skip)

    def _copy_on_cpu(self, slot: SlotViews, skip: frozenset[int]) -> str:
        running = Checksum()
        start = slot.plan.data_start_bytes
        running.update(slot.segment.data[:start])
        for number, (part, local) in enumerate(zip(slot.plan.slices, self.tensors, strict=True)):
            if number not in skip:
                slot.views[number].copy_(local.tensor)
            running.update(slot.segment.data[start + part.start_bytes : start + part.end_bytes])
        return running.hex()

    def pin(self, slot: SlotViews) -> None:
        """Prepare a slot for fast copies from the device; nothing to do on CPU."""
        if self._stream is not None:
            slot.pin()


def _view(data: memoryview, start: int, like: torch.Tensor) -> torch.Tensor:
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)
