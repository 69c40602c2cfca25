"""The GPU probe, a process of its own: `python -m cluster.gpu_probe START NODE`, START being a `ProbeStart` as JSON.

It reads all of the node's GPUs again and again, waits for XIDs in between, and says what it sees in JSON lines. A
driver in trouble may keep any call forever; then the agent kills this process and not itself. A second thread says
which call does not return. NODE is for whoever looks at the list of processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from cluster.gpu_devices import visible_indices
from cluster.gpu_messages import Absent, GpuDevice, Hello, ProbeLine, ProbeStart, Waiting

if TYPE_CHECKING:
    from cluster.gpu_nvml import Handle, Nvml

_encoder = msgspec.json.Encoder()


def say(line: ProbeLine) -> None:
    """Write one line at once. Lines are shorter than what a pipe takes in one piece, so threads need no lock."""
    os.write(sys.stdout.fileno(), _encoder.encode(line) + b"\n")


def main() -> int:
    """Entry point."""
    # The agent decides on signals that a whole process group gets; it ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = msgspec.json.decode(sys.argv[1], type=ProbeStart)
    with contextlib.suppress(BrokenPipeError):  # the agent is gone, and so is the reason to probe
        absent = _probe(start)
        say(Absent(absent))
    return 0


def _probe(start: ProbeStart) -> str:
    """Probe until the agent is gone; returns why there is nothing to probe."""
    try:
        from cluster.gpu_nvml import NoDriverError, Nvml
    except ImportError as error:
        return f"{error}; install everstep[gpu] to have NVIDIA GPUs watched"
    nvml = Nvml()
    threading.Thread(target=_watch, args=(nvml, start, os.getppid()), daemon=True).start()
    try:
        nvml.open()
    except NoDriverError as error:
        return str(error)
    wanted = visible_indices(start.visible, {each.index: each.uuid for each in nvml.handles})[: start.ranks]
    by_index = {each.index: each for each in nvml.handles}
    handles = [by_index[index] for index in wanted]
    if not handles:
        return f"none of {len(nvml.handles)} GPUs is visible to the node's ranks"
    nvml.watch_events(handles)
    devices = tuple(GpuDevice(each.index, each.uuid, each.name, rank) for rank, each in enumerate(handles))
    say(Hello(nvml.driver, devices, nvml.watches_events))
    while True:
        _round(nvml, handles, start.interval_s)


def _round(nvml: Nvml, handles: list[Handle], interval_s: float) -> None:
    """Read all GPUs once, then wait for XIDs until the next reading is due."""
    due_s = time.monotonic() + interval_s
    for each in handles:
        sample = nvml.read(each)
        # An XID that explains a reading must be told before it.
        _tell_events(nvml, handles, time.monotonic())
        say(sample)
    _tell_events(nvml, handles, due_s)
    threading.Event().wait(max(0.0, due_s - time.monotonic()))


def _tell_events(nvml: Nvml, handles: list[Handle], until_s: float) -> None:
    """Tell all XIDs until then, each with a fresh reading of its GPU."""
    from cluster.gpu_nvml import EventsFailedError

    try:
        while nvml.watches_events and (event := nvml.next_event(max(0.0, until_s - time.monotonic()))) is not None:
            say(event)
            say(nvml.read(next(each for each in handles if each.index == event.index)))
    except EventsFailedError:
        # A lost GPU makes every wait fail at once: wait for the others from now on, and tell its loss.
        for event in nvml.watch_events(handles):
            say(event)
        for each in handles:
            say(nvml.read(each))


def _watch(nvml: Nvml, start: ProbeStart, parent: int) -> None:
    """Say which call does not return, and end with the agent; in a thread, because the other one may never return."""
    pause, every_s = threading.Event(), start.timeout_s / 8
    awake_since_s = last_s = time.monotonic()
    while not pause.wait(every_s):
        now_s = time.monotonic()
        if os.getppid() != parent:
            os._exit(0)
        if now_s - last_s > 2 * every_s:  # this process was stopped or starved: that is no call's fault
            awake_since_s = now_s
        last_s = now_s
        call = nvml.call
        for_s = 0.0 if call is None else now_s - max(awake_since_s, call.since_s + call.may_take_s)
        if call is None or for_s <= start.timeout_s:
            continue
        try:
            say(Waiting(call.name, call.index, for_s))
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
