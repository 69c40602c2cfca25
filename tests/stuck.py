"""Ways for a rank to keep the others waiting, at a chosen place of its own program. For use inside a rank."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_OURS = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_WAITS = ("wait_tensor", "_wrap_tensor_autograd")


class Before(TorchDispatchMode):
    """Does something right before this thread's n-th communication in a group, which goes on unless that hangs.

    group: what the group is for, as torch has it (`mesh_tp`), or "" for any.
    """

    def __init__(self, group: str, count: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.group = group
        self.left = count
        self.act = act

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in _OURS and not any(word in str(func) for word in _NO_WAITS) and self._in_group(args):
            self.left -= 1
            if self.left == 0:
                self.act()
        return func(*args, **(kwargs or {}))

    def _in_group(self, args: tuple[Any, ...]) -> bool:
        return not self.group or self.group in {_about(arg) for arg in args}


def _about(argument: object) -> str:
    """What the group that an operation was called with is for, if the argument names one."""
    if isinstance(argument, str):
        known = {g.group_name: g for g in list(dist.distributed_c10d._world.pg_names)}
        return known[argument].group_desc if argument in known else ""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return dist.ProcessGroup.unbox(argument).group_desc
    return ""


def sleep_for_ever() -> None:
    """Wait for something that never comes; other threads run on."""
    threading.Event().wait()


def wait_for_release(pipe: Path) -> Callable[[], None]:
    """Wait until somebody writes into the named pipe, which is made here."""

    def wait() -> None:
        os.mkfifo(pipe)
        with pipe.open("rb") as file:
            file.read(1)

    return wait
