"""Where the time of a step goes on this rank: a clock that is always in exactly one part of the step.

On CPU it reads the host's clock. On CUDA what computes is timed between events on the stream and read when they have
passed, a step or more later, so that nothing ever waits for the device. Waiting for other ranks is taken out of every
part (`parallelism.waiting`).
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from parallelism.waiting import DeviceWaits, HostWaits, Interval, timing


class Part(enum.IntEnum):
    """What a rank does. WAIT: it stands still for others in a way that is no collective. OTHER: anything else."""

    DATA = 0
    FORWARD = 1
    BACKWARD = 2
    OPTIMIZER = 3
    SNAPSHOT = 4
    WAIT = 5
    OTHER = 6


_ON_DEVICE = (Part.FORWARD, Part.BACKWARD, Part.OPTIMIZER)


@dataclass(frozen=True)
class Split:
    """One step in seconds; parts are net of waiting. wait_s: exposed communication. total_s: all of it."""

    step: int
    data_s: float
    forward_s: float
    backward_s: float
    wait_s: float
    optimizer_s: float
    snapshot_s: float
    total_s: float


class Clock:
    """A clock that does not run: what it is told costs nothing. `running_clock` makes one that does."""

    def begin(self, step: int) -> None:
        """A step begins, with DATA."""

    def switch(self, part: Part) -> None:
        """From here on the rank does this."""

    def finish(self) -> Split | None:
        """The step ended. Returns the newest step that is known by now and was not returned yet, None without one."""
        return None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within it belongs to no step."""
        yield


class HostClock(Clock):
    """Reads the host's clock at each switch."""

    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits
        self.running = False
        self._step = 0
        self._part = Part.OTHER
        self._seconds = [0.0] * len(Part)
        self._waited_s = 0.0
        self._since_s = 0.0
        self._waits_then_s = 0.0

    def begin(self, step: int) -> None:
        """See `Clock`."""
        self._step = step
        self._seconds = [0.0] * len(Part)
        self._waited_s = 0.0
        self._go_on()
        self._part = Part.DATA

    def switch(self, part: Part) -> None:
        """See `Clock`."""
        if self.running:
            self._stop()
            self._go_on()
            self._part = part

    def finish(self) -> Split | None:
        """See `Clock`."""
        if not self.running:
            return None
        self._stop()
        self.running = False
        seconds = self._seconds
        return Split(
            step=self._step,
            data_s=seconds[Part.DATA],
            forward_s=seconds[Part.FORWARD],
            backward_s=seconds[Part.BACKWARD],
            wait_s=self._waited_s + seconds[Part.WAIT],
            optimizer_s=seconds[Part.OPTIMIZER],
            snapshot_s=seconds[Part.SNAPSHOT],
            total_s=self._waited_s + sum(seconds),
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """See `Clock`."""
        if not self.running:
            yield
            return
        self.switch(Part.OTHER)
        self.running = False
        try:
            yield
        finally:
            self._go_on()

    def _stop(self) -> None:
        now_s, waits_s = time.perf_counter(), self.waits.seconds
        waited_s = waits_s - self._waits_then_s
        self._waited_s += waited_s
        self._seconds[self._part] += now_s - self._since_s - waited_s

    def _go_on(self) -> None:
        self._since_s, self._waits_then_s = time.perf_counter(), self.waits.seconds
        self.running = True


@dataclass(frozen=True)
class _Stretch:
    """A stretch of one part on the device: where it begins and ends, and the waits in it."""

    part: Part
    begin: torch.cuda.Event
    end: torch.cuda.Event
    waits: Sequence[Interval]


@dataclass(frozen=True)
class _Unread:
    """A step as the host saw it, and what is to be read from the device."""

    host: Split
    stretches: Sequence[_Stretch]


class DeviceClock(HostClock):
    """Times computing on the device; data, snapshots and the whole step stay the host's."""

    def __init__(self) -> None:
        self._spare: deque[torch.cuda.Event] = deque()
        self.device_waits = DeviceWaits(self._mark)
        super().__init__(self.device_waits)
        self._open: torch.cuda.Event | None = None
        self._stretches: list[_Stretch] = []
        self._unread: deque[_Unread] = deque()

    def _mark(self) -> torch.cuda.Event:
        event = self._spare.popleft() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def switch(self, part: Part) -> None:
        """See `Clock`."""
        if not self.running:
            return
        self._close_stretch()
        super().switch(part)
        self._open = self._mark() if part in _ON_DEVICE else None

    def finish(self) -> Split | None:
        """See `Clock`. A step is known when the device has passed its last event, which is never waited for."""
        self._close_stretch()
        host = super().finish()
        if host is not None:
            self._unread.append(_Unread(host, self._stretches))
            self._stretches = []
        if len(self._unread) < 2 or not all(each.end.query() for each in self._unread[0].stretches[-1:]):
            return None
        return self._read(self._unread.popleft())

    def _close_stretch(self) -> None:
        waits, self.device_waits.intervals = self.device_waits.intervals, []
        if self._open is not None:
            self._stretches.append(_Stretch(self._part, self._open, self._mark(), waits))
            self._open = None
        else:
            self._spare.extend(event for interval in waits for event in interval)

    def _read(self, step: _Unread) -> Split:
        seconds = dict.fromkeys(_ON_DEVICE, 0.0)
        waited_s = 0.0
        for each in step.stretches:
            waits_s = sum(begin.elapsed_time(end) for begin, end in each.waits) / 1e3
            seconds[each.part] += each.begin.elapsed_time(each.end) / 1e3 - waits_s
            waited_s += waits_s
            self._spare.extend([each.begin, each.end, *(event for interval in each.waits for event in interval)])
        return replace(
            step.host,
            forward_s=seconds[Part.FORWARD],
            backward_s=seconds[Part.BACKWARD],
            optimizer_s=seconds[Part.OPTIMIZER],
            wait_s=step.host.wait_s + waited_s,
        )


@contextlib.contextmanager
def running_clock(device: torch.device, pipelined: Sequence[nn.Module] = ()) -> Iterator[Clock]:
    """A clock that runs while the context does.

    pipelined: the parts of a model whose schedule decides when they compute. What it does outside their forward passes
    counts as backward.
    """
    clock = DeviceClock() if device.type == "cuda" else HostClock(HostWaits())

    def enter(*_: object) -> None:
        clock.switch(Part.FORWARD)

    def leave(*_: object) -> None:
        clock.switch(Part.BACKWARD)

    hooks = [part.register_forward_pre_hook(enter, prepend=True) for part in pipelined]
    hooks += [part.register_forward_hook(leave) for part in pipelined]
    try:
        with timing(clock.waits):
            yield clock
    finally:
        for hook in hooks:
            hook.remove()
