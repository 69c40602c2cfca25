"""Sums of all that a rank sends while it computes a step, so that two computations of it can be compared.

What a rank sends is a function of its device, its data, and of what it received before. So of all ranks whose sends
differ between two computations, the one to blame is the one that had received nothing different yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallelism.checksums import checksums
from parallelism.initialise import derive_seed

# Operators by what their arguments mean. Input of all members: the position of what this rank contributes.
_GROUP_INPUTS = {
    "c10d::allreduce_": 0, "c10d::allreduce_coalesced_": 0, "c10d::reduce_": 0, "c10d::_allgather_base_": 1,
    "c10d::allgather_": 1, "c10d::allgather_coalesced_": 1, "c10d::allgather_into_tensor_coalesced_": 1,
    "c10d::_reduce_scatter_base_": 1, "c10d::reduce_scatter_": 1, "c10d::reduce_scatter_tensor_coalesced_": 1,
    "c10d::alltoall_": 1, "c10d::alltoall_base_": 1, "c10d::gather_": 1,
    "_c10d_functional::all_reduce": 0, "_c10d_functional::all_reduce_": 0,
    "_c10d_functional::all_reduce_coalesced": 0, "_c10d_functional::all_reduce_coalesced_": 0,
    "_c10d_functional::all_gather_into_tensor": 0, "_c10d_functional::all_gather_into_tensor_out": 0,
    "_c10d_functional::all_gather_into_tensor_coalesced": 0, "_c10d_functional::reduce_scatter_tensor": 0,
    "_c10d_functional::reduce_scatter_tensor_out": 0, "_c10d_functional::reduce_scatter_tensor_coalesced": 0,
    "_c10d_functional::all_to_all_single": 0,
}  # fmt: skip
_SEND, _RECEIVE = "c10d::send", "c10d::recv_"


class Sent(msgspec.Struct, frozen=True):
    """One send, or (sum None) one receipt from a single rank.

    channel: a number for the group, or for a pair of ranks in it; number: its place among those of the channel. Both
    are the same on every rank that takes part.
    """

    channel: int
    number: int
    sum: int | None


Tape = tuple[Sent, ...]


class Recorder(TorchDispatchMode):
    """While it is entered, notes what this rank sends through c10d, in order; everything computes as it would without.

    Only what is sent is summed, nothing is waited for. Every operator costs a few microseconds of Python meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._notes: list[tuple[str, int, Tensor | None]] = []
        self._numbers: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled; its collectives are seen all the same."""
        return True

    def note(self, channel: str, tensors: list[Tensor] | None) -> None:
        """Write down a send, or a receipt (None). channel: the group's name, or `group:from>to`."""
        self._notes.append((channel, self._numbers[channel], None if tensors is None else checksums(tensors)))
        self._numbers[channel] += 1

    def tape(self) -> Tape:
        """All that was noted. Waits for the device."""
        _wait_for_all_streams()
        return tuple(
            Sent(derive_seed("channel", channel), number, None if sums is None else fold(sums.tolist()))
            for channel, number, sums in self._notes
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first it becomes what it is made of, collectives among it
        if func.namespace in ("c10d", "_c10d_functional"):
            self._watch(func.name().partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _watch(self, name: str, args: Any) -> None:
        position = _GROUP_INPUTS.get(name)
        if position is not None:
            self.note(_group_name(args), list(_tensors(args[position])))
        elif name in (_SEND, _RECEIVE):
            group = dist.ProcessGroup.unbox(args[1])
            pair = (group.rank(), args[2]) if name == _SEND else (args[2], group.rank())
            channel = f"{group.group_name}:{pair[0]}>{pair[1]}"
            self.note(channel, list(_tensors(args[0])) if name == _SEND else None)
        elif name == "c10d::broadcast_":
            group = dist.ProcessGroup.unbox(args[1])
            self.note(group.group_name, list(_tensors(args[0])) if args[2] == group.rank() else None)


class GradientWatch(DefaultReduceScatter):
    """FSDP's reduce-scatter, and, when asked to, a sum of what this rank puts into each.

    These are the gradients of this rank's own samples before they are mixed with others': another rank that computes
    the same samples puts in the same. FSDP asks for two buffers in turn, one to put gradients in and one for what comes
    out, also where nothing is sharded and no reduce-scatter follows: the first is full when it asks for the second.
    """

    def __init__(self) -> None:
        self.on = False
        self._sums: list[Tensor] = []
        self._filling: Tensor | None = None

    def watch(self, parts: Iterable[nn.Module]) -> GradientWatch:
        """Stand in for the reduce-scatter of all modules of FSDP."""
        for part in parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    # Its own setter refuses modules sharded over two meshes, for the sake of what depends on a mesh.
                    for group in _param_groups(module._get_fsdp_state()):
                        group._reduce_scatter_comm = self
        return self

    def take(self) -> list[int]:
        """The sums since the last call. Waits for the device."""
        _wait_for_all_streams()
        sums, self._sums = self._sums, []
        return [int(value) for each in sums for value in each.tolist()]

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for FSDP."""
        filled, buffer = self._filling, super().allocate(size, dtype=dtype, device=device)
        self._filling = buffer if filled is None else None
        if filled is not None and self.on:
            self._sums.append(checksums([filled]))
        return buffer


def fold(sums: Iterable[int]) -> int:
    """One signed 64-bit number that any single change among the sums changes."""
    total = 0
    for position, value in enumerate(sums):
        total += value * (2 * position + 1)
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _param_groups(state: Any) -> Iterable[Any]:
    """Older torch has one group of parameters a module, or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _wait_for_all_streams() -> None:
    """Collectives are issued from streams of their own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _group_name(args: Any) -> str:
    """Of a c10d operator, whose first object is the group; functional ones have the name itself, as last string."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument).group_name
    names = [argument for argument in args if isinstance(argument, str)]
    return names[-1]


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for each in value:
            yield from _tensors(each)
