"""What `benchmarks.checkpoint_gpu` measures with: a state of so many parameters, and the device that has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch

GIB = 2**30
STATE_BYTES_PER_PARAMETER = 12


class Model(NamedTuple):
    """So many parameters: fp32 weights and both moments of AdamW."""

    name: str
    parameters: int

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.parameters * STATE_BYTES_PER_PARAMETER


class Failed(Exception):
    """A part of the program failed; the message says which, and how."""


class State:
    """Live tensors on a device."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        side = 4096 if model.parameters >= 10**8 else 256
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            left, number = model.parameters, 0
            while left >= side * side:
                self.tensors[f"{kind}.{number}"] = torch.randn(side, side, device=device)
                self.tensors[f"{kind}.{number}.norm"] = torch.randn(side, device=device)
                left, number = left - side * side - side, number + 1

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Any]:
        """See `checkpointing.flatten.Stateful`."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """They were filled in place."""

    def update(self) -> None:
        """What an optimizer does: every element is written."""
        torch._foreach_add_(list(self.tensors.values()), 1e-3)

    def bit_sums(self) -> list[int]:
        """One number for each tensor's bits."""
        return [int(tensor.view(torch.int32).sum(dtype=torch.int64).item()) for tensor in self.tensors.values()]


class Device:
    """Where it runs: a CUDA device, or in a rehearsal the CPU, on which nothing has to be waited for."""

    def __init__(self, rehearse: bool) -> None:
        self.cuda = not rehearse
        self.torch = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")

    def wait(self) -> None:
        """Until all that was given to it is done."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def free_bytes(self) -> int:
        """Of its own memory."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.cuda else psutil.virtual_memory().available

    def words(self) -> str:
        """What it is."""
        if not self.cuda:
            return "CPU (rehearsal)"
        found = torch.cuda.get_device_properties(self.torch)
        return (
            f"{found.name}, {found.total_memory / GIB:.0f} GiB, sm{found.major}{found.minor}, CUDA {torch.version.cuda}"
        )

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """Host memory that CUDA has page-locked."""
        found = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.cuda)
        if self.cuda and not found.is_pinned():
            raise Failed("torch.empty(pin_memory=True) gave memory that is not page-locked")
        return found

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds from an idle device to an idle device."""
        self.wait()
        began_s = time.monotonic()
        call()
        self.wait()
        return time.monotonic() - began_s
