"""`python -m benchmarks.checkpoint_gpu`: how fast, and how much in the way, a GPU's state gets into shared memory.

The real manager copies into page-locked slots; beside it stand the bus's own limit (one large copy into memory that
CUDA itself has page-locked) and torch's copies of the same tensors into such memory. Needs a CUDA device; without one
it says so, measures nothing and writes nothing. `--rehearse` goes through the whole program on the CPU with a tiny
state, to see that it runs; its figures mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from benchmarks.checkpoint_gpu_parts import GIB, Device, Failed, Model, State
from benchmarks.common import Workspace, console, show, workspace
from benchmarks.results import Result, Series, Unit, machine, now, ratio, series, settings, versions, write_result
from checkpointing.manager import SnapshotManager
from checkpointing.segment import PersistTo

SLOTS, FEWEST_SLOTS = 3, 2
REPEATS, STEPS = 5, 8
SPARE_DEVICE_BYTES, SPARE_HOST_BYTES = 4 * GIB, 4 * GIB
BUS_PIECE_BYTES = 2 * GIB
LEAST_STEP_S = 0.5


MODELS = (Model("1B", 10**9), Model("3B", 3 * 10**9), Model("8B", 8 * 10**9))
TINY = Model("rehearsal", 4 * 10**6)

NOTES = (
    "one GPU, one rank; state: fp32 weights and two moments, in matrices of 4096 x 4096 and vectors of 4096.",
    "limit: one contiguous copy, device to host, into memory from cudaHostAlloc, as large as fits and scaled to the "
    "state's bytes. torch copies: the same tensors, one copy_ each, into such memory.",
    "copies into a slot: the same copies as the manager's, into a slot of it, without checksums. staged: stage() and "
    "wait() with nothing else to do: copies, then the checksum of all bytes on one core.",
    "stall: time in stage() and wait() in a step of bf16 matrix products about twice as long as staging takes; the "
    "host waits for the products first, as for a loss. step longer by: wall time of such a step over one without "
    "staging, in part because copies and products share the memory of the card.",
    "what was loaded back from the slot is compared with the state by bit sums on the device.",
)


def main() -> None:
    """Measure, show, write; exit 0 with one line where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run through it on the CPU; keep nothing")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        console.print(
            f"benchmarks.checkpoint_gpu needs a CUDA device and has found none (torch {torch.__version__}): it has not "
            "been run, and nothing is written"
        )
        return
    device = Device(options.rehearse)
    taken_at, began_s, here = now(), time.monotonic(), machine()
    words: list[str] = []
    found: list[Series] = []
    try:
        for model in (TINY,) if options.rehearse else MODELS:
            with workspace("checkpoint-gpu") as place:
                found += _model(model, device, place, words)
            if device.cuda:
                torch.cuda.empty_cache()
    except Failed as error:
        console.print(f"[bold red]failed[/] {error}", highlight=False)
        sys.exit(1)
    result = Result(
        benchmark="checkpoint_gpu",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({"device": device.words(), "repeats": REPEATS, "steps": STEPS}),
        series=tuple(found),
        ratios=tuple(each for model in (*MODELS, TINY) for each in _ratios(model, found)),
        notes=(*NOTES, *words),
    )
    show(result)
    if options.rehearse:
        console.print("rehearsed: the figures mean nothing, and nothing is written")
    elif found:
        console.print(f"written to {write_result(result)}")


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """A part of the program; what fails in it is told with its name. Failed."""
    console.print(f"- {name}", style="dim", markup=False)
    try:
        yield
    except Failed:
        raise
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise Failed(f"while {name}: {type(error).__name__}: {error}") from error


def _slots_that_fit(model: Model, device: Device) -> tuple[int, str]:
    """How many slots fit the host, or 0 and why the model cannot be measured."""
    need = model.state_bytes + SPARE_DEVICE_BYTES
    if device.cuda and device.free_bytes() < need:
        free = f"{device.free_bytes() / GIB:.0f} are free"
        return 0, f"{model.name} not measured: needs {need / GIB:.0f} GiB of the card's memory, {free}"
    host = min(psutil.virtual_memory().available, psutil.disk_usage("/dev/shm").free)
    for slots in (SLOTS, FEWEST_SLOTS):
        if slots * model.state_bytes + min(BUS_PIECE_BYTES, model.state_bytes) + SPARE_HOST_BYTES <= host:
            return (
                slots,
                "" if slots == SLOTS else f"{model.name}: {slots} slots instead of {SLOTS}, for want of memory",
            )
    need = FEWEST_SLOTS * model.state_bytes + SPARE_HOST_BYTES
    return 0, f"{model.name} not measured: needs {need / GIB:.0f} GiB of shared memory, {host / GIB:.0f} are free"


def _model(model: Model, device: Device, place: Workspace, words: list[str]) -> list[Series]:
    """All figures of one size."""
    slots, note = _slots_that_fit(model, device)
    if note:
        words.append(note)
        console.print(note, style="yellow", markup=False)
    if not slots:
        return []
    figures: defaultdict[tuple[str, str, Unit], list[float]] = defaultdict(list)
    with part(f"{model.name}: making the state on {device.words()}"), torch.no_grad():
        state = State(model, device.torch)
        device.wait()
    with torch.no_grad():
        with part(f"{model.name}: the bus's limit"):
            _bus(device, state.size_bytes, figures)
        with part(f"{model.name}: torch's copies into page-locked memory"):
            _torch_copies(device, state, figures)
        with part(f"{model.name}: preparing {slots} slots in shared memory and page-locking them"):
            manager = SnapshotManager(
                {"state": state}, place.memory, 0, 0, 1, 1, place.disk, {"dp_shard": 1}, slots=slots
            )
            began_s = time.monotonic()
            manager.prepare()
            figures["everstep", "preparing the slots", "s"].append(time.monotonic() - began_s)
            _check_pinned(manager, device)
        try:
            with part(f"{model.name}: copies into a slot, without checksums"):
                _slot_copies(device, state, manager, figures)
            with part(f"{model.name}: staging with nothing else to do"):
                step = _staged(device, manager, slots, figures)
            with part(f"{model.name}: loading back and comparing"):
                _load(device, state, manager, step, figures)
            with part(f"{model.name}: staging while a step computes"):
                _overlapped(device, state, manager, step, figures)
        finally:
            manager.close()
    figures["limit", "state", "MB"].append(state.size_bytes / 1e6)
    return [series(side, f"{model.name}: {name}", unit, values) for (side, name, unit), values in figures.items()]


Samples = defaultdict[tuple[str, str, Unit], list[float]]


def _bus(device: Device, size_bytes: int, figures: Samples) -> None:
    piece = min(size_bytes, BUS_PIECE_BYTES)
    host, source = device.pinned(piece), torch.zeros(piece, dtype=torch.uint8, device=device.torch)
    for number in range(REPEATS + 1):
        seconds = device.timed(lambda: host.copy_(source, non_blocking=True))
        if number:
            figures["limit", "one copy of the state's bytes", "ms"].append(1e3 * seconds * size_bytes / piece)
            figures["limit", "device to host", "GB/s"].append(piece / seconds / 1e9)
    for number in range(REPEATS + 1):
        seconds = device.timed(lambda: source.copy_(host, non_blocking=True))
        if number:
            figures["limit", "host to device", "GB/s"].append(piece / seconds / 1e9)


def _torch_copies(device: Device, state: State, figures: Samples) -> None:
    """Piece by piece into one page-locked buffer, which is used again: the whole state would not fit twice."""
    buffer = device.pinned(max(tensor.nbytes for tensor in state.tensors.values()))
    views = [buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor in state.tensors.values()]

    def copy() -> None:
        for view, tensor in zip(views, state.tensors.values(), strict=True):
            view.copy_(tensor, non_blocking=True)

    for number in range(REPEATS + 1):
        seconds = device.timed(copy)
        if number:
            figures["torch copies", "page-locked memory", "ms"].append(1e3 * seconds)


def _check_pinned(manager: SnapshotManager, device: Device) -> None:
    """That CUDA knows the slots as page-locked: else every copy would go through a buffer, and wait."""
    for slot in manager._slots if device.cuda else ():
        first, last = slot.views[0], slot.views[-1]
        if not (slot.pinned and first.is_pinned() and last.is_pinned()):
            raise Failed(
                f"{slot.segment.path.name} is not page-locked (said: {slot.pinned}, first tensor {first.is_pinned()}, "
                f"last {last.is_pinned()}): look at `ulimit -l` and at cudaHostRegister in checkpointing/staging.py"
            )


def _slot_copies(device: Device, state: State, manager: SnapshotManager, figures: Samples) -> None:
    """Into the slot that the first snapshot will take, which holds nothing yet."""
    views, tensors = manager._slots[0].views, manager._copier.tensors
    for number in range(REPEATS + 1):
        seconds = device.timed(lambda: torch._foreach_copy_(views, tensors, non_blocking=True))
        if number:
            figures["everstep", "copies into a slot", "ms"].append(1e3 * seconds)


def _staged(device: Device, manager: SnapshotManager, slots: int, figures: Samples) -> int:
    """One save into each slot first; returns the last step."""
    for step in range(1, slots + REPEATS + 1):
        device.wait()
        began_s = time.monotonic()
        manager.stage(step, PersistTo.NOTHING, {})
        begun_s = time.monotonic() - began_s
        manager.wait()
        if step > slots:
            figures["everstep", "call of stage()", "ms"].append(1e3 * begun_s)
            figures["everstep", "staged, nothing overlaps", "ms"].append(1e3 * (time.monotonic() - began_s))
    return slots + REPEATS


def _load(device: Device, state: State, manager: SnapshotManager, step: int, figures: Samples) -> None:
    expected = state.bit_sums()
    for tensor in state.tensors.values():
        tensor.zero_()
    device.wait()
    began_s = time.monotonic()
    loaded = manager.load(step, lambda ok: ok, lambda values: values)
    device.wait()
    figures["everstep", "restored from memory", "s"].append(time.monotonic() - began_s)
    if loaded is None or loaded.step != step:
        raise Failed(f"step {step} could not be loaded from the slot: {loaded}")
    if wrong := sum(a != b for a, b in zip(expected, state.bit_sums(), strict=True)):
        raise Failed(
            f"{wrong} of {len(expected)} tensors came back with other bits: a copy did not wait for the state, or the "
            "checksum was taken before the copies were done (Copier.copy)"
        )


def _overlapped(device: Device, state: State, manager: SnapshotManager, step: int, figures: Samples) -> None:
    staged_s = statistics.median(figures["everstep", "staged, nothing overlaps", "ms"]) / 1e3
    compute = _compute(device, max(2 * staged_s, LEAST_STEP_S if device.cuda else 0.01))

    def one(number: int) -> tuple[float, float]:
        """Wall time of a step, and the part of it in stage() and wait(). number 0: without staging."""
        device.wait()
        began_s = time.monotonic()
        held_s = 0.0
        if number:
            manager.stage(number, PersistTo.NOTHING, {})
            held_s = time.monotonic() - began_s
        compute()
        device_done = torch.cuda.current_stream().record_event() if device.cuda else None
        if device_done is not None:
            device_done.synchronize()
        held_s += manager.wait()
        state.update()
        device.wait()
        return time.monotonic() - began_s, held_s

    one(0)
    for number in range(1, STEPS + 1):
        plain_s, _ = one(0)
        with_s, held_s = one(step + number)
        figures["limit", "step without staging", "ms"].append(1e3 * plain_s)
        figures["everstep", "step with staging", "ms"].append(1e3 * with_s)
        figures["everstep", "stall in the step", "ms"].append(1e3 * held_s)
        figures["everstep", "step longer by", "percent"].append(100 * (with_s / plain_s - 1))


def _compute(device: Device, step_s: float) -> Callable[[], None]:
    """bf16 matrix products that keep the device busy for about so long; given to it without waiting."""
    side = 8192 if device.cuda else 256
    a, b = (torch.randn(side, side, device=device.torch, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    probe = 10
    one_s = device.timed(lambda: [torch.mm(a, b, out=out) for _ in range(probe)]) / probe
    count = max(round(step_s / one_s), 1)

    def run() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return run


def _ratios(model: Model, found: list[Series]) -> list[Any]:
    named = {(each.side, each.name): each for each in found}

    def over(name: str, ours: tuple[str, str], theirs: tuple[str, str]) -> list[Any]:
        numerator, denominator = (named.get((side, f"{model.name}: {what}")) for side, what in (ours, theirs))
        return (
            [] if numerator is None or denominator is None else [ratio(f"{name}, {model.name}", numerator, denominator)]
        )

    copy = ("limit", "one copy of the state's bytes")
    return [
        *over("torch copies of one copy", ("torch copies", "page-locked memory"), copy),
        *over("copies into a slot of one copy", ("everstep", "copies into a slot"), copy),
        *over("staged of one copy, nothing overlaps (aim 1.2)", ("everstep", "staged, nothing overlaps"), copy),
        *over(
            "stall of the step, a step overlaps (aim 0.01)",
            ("everstep", "stall in the step"),
            ("everstep", "step with staging"),
        ),
        *over("step with staging of one without", ("everstep", "step with staging"), ("limit", "step without staging")),
    ]


if __name__ == "__main__":
    main()
