"""Faults that only a rank itself can cause, planted in real workers from outside: in one rank, at one step, once."""

from __future__ import annotations

import builtins
import ctypes
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from tests.chaos.flips import flip_gradient
from trainer.events import Phase

if TYPE_CHECKING:
    from tests.chaos.jobs import Job

_ROOT = Path(__file__).parents[2]
_VARIABLE = "EVERSTEP_TEST_PLANTS"


class Plant(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank does to itself when it has begun a step. generation 0: each time it comes to that step.

    deed: see `DEEDS`. text: what the deed needs: a message, a path.
    """

    rank: int
    step: int
    deed: str
    generation: int = 1
    text: str = ""


def plant(job: Job, *plants: Plant) -> None:
    """Have a job that was not started yet meet these faults."""
    for each in plants:
        assert each.deed in DEEDS, each.deed
    job.home.mkdir(parents=True, exist_ok=True)
    path = job.home / f"{job.name}.plants.json"
    path.write_bytes(msgspec.json.encode(plants))
    folders = [str(Path(__file__).parent / "planting"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    job.environment[_VARIABLE] = str(path.absolute())
    job.environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


def take_root(loop: ModuleType) -> None:
    """In a worker: do what is planted for this rank when its step begins."""
    plants = msgspec.json.decode(Path(os.environ[_VARIABLE]).read_bytes(), type=list[Plant])
    run_step = loop.run_step

    def run_step_and_fall(rank: Any, step: int, *more: Any) -> Any:
        here = (rank.context.rank, step)
        for each in plants:
            if (each.rank, each.step) == here and each.generation in (0, rank.context.start.generation):
                rank.context.heart.beat(Phase.DATA, step)
                DEEDS[each.deed](each.text)
        return run_step(rank, step, *more)

    loop.run_step = run_step_and_fall  # type: ignore[attr-defined]


def _raise(text: str) -> None:
    name, _, message = text.partition(": ")
    raise getattr(builtins, name)(message)


def _exit(text: str) -> None:
    os._exit(int(text))


def _abort(text: str) -> None:
    """As a library does: its last words go to the log."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    os.abort()


def _segfault(_: str) -> None:
    ctypes.string_at(0)


def _bus_error(_: str) -> None:
    """Touch a page of a mapped file that was cut off behind the mapping's back."""
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        mapped[0] = 1


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _eat(text: str) -> None:
    """Join the memory control group at that path and take memory until its limit ends it."""
    Path(text, "cgroup.procs").write_text(str(os.getpid()))
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(1 << 20)))


def _sleep_before(text: str) -> None:
    """Go on, up to the n-th communication in a group: `mesh_tp 3`; then never come to it."""
    from tests.stuck import Before, sleep_for_ever

    group, _, count = text.partition(" ")
    Before(group, int(count), sleep_for_ever).__enter__()


def _leave_out(_: str) -> None:
    """Leave the next plain all-reduce over all ranks out, as a program with a bug would."""
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def left_out(tensor: Any, *more: Any, **named: Any) -> Any:
        if more or named:
            return all_reduce(tensor, *more, **named)
        dist.all_reduce = all_reduce
        return None

    dist.all_reduce = left_out


def _sleep(text: str) -> None:
    threading.Event().wait(float(text) if text else None)


def _compute(text: str) -> None:
    """Be busy for so many seconds."""
    until_s = time.monotonic() + float(text)
    while time.monotonic() < until_s:
        sum(range(10_000))


def _hold_lock(_: str) -> None:
    """A deadlock in C, with the interpreter's lock in hand: no thread of this process runs any more."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def _slow_forward(text: str) -> None:
    """Take so many seconds longer in each of the next so many microbatches: `0.3 40`."""
    from parallelism import titan

    titan.token_loss_sum = _slowly(titan.token_loss_sum, text)


def _slow_reads(text: str) -> None:
    """Take so many seconds longer for each of the next so many batches that are read: `0.3 40`."""
    from trainer.data import StepReader

    StepReader.read = _slowly(StepReader.read, text)  # type: ignore[method-assign]


def _slowly(function: Callable[..., Any], text: str) -> Callable[..., Any]:
    seconds, times = float(text.partition(" ")[0]), iter(range(int(text.partition(" ")[2])))

    def run(*args: Any, **kwargs: Any) -> Any:
        if next(times, None) is not None:
            threading.Event().wait(seconds)
        return function(*args, **kwargs)

    return run


DEEDS: dict[str, Callable[[str], None]] = {
    "raise": _raise,
    "exit": _exit,
    "abort": _abort,
    "segfault": _segfault,
    "bus error": _bus_error,
    "kill": _kill,
    "eat": _eat,
    "flip gradient": flip_gradient,
    "sleep": _sleep,
    "sleep before": _sleep_before,
    "leave out": _leave_out,
    "hold lock": _hold_lock,
    "compute": _compute,
    "slow forward": _slow_forward,
    "slow reads": _slow_reads,
}
