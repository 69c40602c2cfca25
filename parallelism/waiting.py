"""How long this rank stands still for other ranks, measured where the standing still happens.

All of torch waits in two places, and both are Python's: `Work.wait` (every collective of torch.distributed, FSDP2, the
sends and receives of pipelines) and the operator `_c10d_functional.wait_tensor` (functional collectives, with them
DTensor, tensor and expert parallelism). On CUDA FSDP2 has its computing stream wait for an event instead: a third. Code
that torch.compile made calls that operator without Python, and is not seen.

Written against torch 2.11 to 2.13; `tests/distributed/test_waiting.py` fails where these names stop being the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


class HostWaits:
    """Counts the seconds in which the process itself stood still, as it does for gloo."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """`wait`, with its duration added up here."""
        now = time.perf_counter

        def run(*args: Any, **kwargs: Any) -> Any:
            began_s = now()
            try:
                return wait(*args, **kwargs)
            finally:
                self.seconds += now() - began_s

        return run


Interval = tuple[torch.cuda.Event, torch.cuda.Event]


class DeviceWaits(HostWaits):
    """Also marks, on the stream that computes, where it begins and ends to wait for NCCL. Reading is the caller's."""

    def __init__(self, mark: Callable[[], torch.cuda.Event]) -> None:
        """mark: records an event on the current stream."""
        super().__init__()
        self.computing = torch.cuda.current_stream()
        self.intervals: list[Interval] = []
        self._mark = mark

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """`wait`, timed on the host and between events."""
        on_host = super().timed(wait)

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.current_stream() != self.computing:
                return on_host(*args, **kwargs)
            begin = self._mark()
            try:
                return on_host(*args, **kwargs)
            finally:
                self.intervals.append((begin, self._mark()))

        return run

    def timed_event(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """`Stream.wait_event`, timed if it is the computing stream that waits."""
        timed = self.timed(wait)

        def run(stream: torch.cuda.Stream, *args: Any, **kwargs: Any) -> Any:
            # Streams of communication wait for computing all the time: that exposes nothing.
            return (timed if stream == self.computing else wait)(stream, *args, **kwargs)

        return run


@contextlib.contextmanager
def timing(waits: HostWaits) -> Iterator[None]:
    """Within it every wait for another rank, of any thread of this process, counts in `waits`. Not to be nested."""
    operator: Any = torch.ops._c10d_functional.wait_tensor
    work: Any = dist.Work
    wait_work, wait_tensor = work.wait, operator._op
    work.wait, operator._op = waits.timed(wait_work), waits.timed(wait_tensor)
    try:
        with _timing_events(waits) if isinstance(waits, DeviceWaits) else contextlib.nullcontext():
            yield
    finally:
        work.wait, operator._op = wait_work, wait_tensor


@contextlib.contextmanager
def _timing_events(waits: DeviceWaits) -> Iterator[None]:
    stream: Any = torch.cuda.Stream
    wait_event = stream.wait_event
    stream.wait_event = waits.timed_event(wait_event)
    try:
        yield
    finally:
        stream.wait_event = wait_event
