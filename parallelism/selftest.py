"""Known-answer tests of this machine's devices: `python -m parallelism.selftest` prints a `SelfTest` as JSON.

Products with a stored answer (`parallelism.known_answers`), memory, and a short collective. Each device, and each rank
of the collective, is tested in a forked child: what hangs or dies there is a result. Importing this costs nothing;
torch is loaded by `examine`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import msgspec

from parallelism.known_answers import PROBLEMS, Problem, digest, integers, multiply, operands

CPU = "cpu"
_PR_SET_PDEATHSIG = 1
_MIB = 1 << 20
_REPEATS = 3
_SPEED_S = 0.1
_CPU_SIZE = 512
_GPU_SIZE = 8192
_ELEMENTS = 1 << 16


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """ranks: of the collective on a machine without GPUs (with them: one a GPU). timeout_s bounds everything.

    cpu_mib, gpu_mib: memory that is written with patterns and read back.
    nice: the lowest priority, for a test beside other work.
    """

    ranks: int = 2
    timeout_s: float = 60.0
    cpu_mib: int = 64
    gpu_mib: int = 512
    collective: bool = True
    nice: bool = False


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One test on one device. value: a throughput in `unit`, 0 where there is none. model: the device's own name.

    late: not ok because there was no answer in time.
    """

    test: str
    device: str
    ok: bool
    detail: str = ""
    value: float = 0.0
    unit: str = ""
    model: str = ""
    late: bool = False


class Named(msgspec.Struct, frozen=True):
    """A version that only torch knows."""

    name: str
    text: str


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """All results, and how long they took."""

    results: tuple[Result, ...]
    versions: tuple[Named, ...]
    seconds: float


def examine(settings: Settings) -> SelfTest:
    """Run all tests. Nothing that a device does ends this process; it takes timeout_s and a little at most."""
    import torch.distributed  # noqa: F401  once here, not once in each child

    begun_s = time.monotonic()
    deadline_s = begun_s + settings.timeout_s
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        found = _run([_Task("devices", CPU, _list_devices)], deadline_s)
        gpus = [result.device for result in found if result.ok and result.device != CPU]
        tasks = [_Task("device", CPU, partial(_test_device, CPU, settings.cpu_mib, settings.nice))]
        tasks += [_Task("device", gpu, partial(_test_device, gpu, settings.gpu_mib, settings.nice)) for gpu in gpus]
        if settings.collective:
            places = gpus or [CPU] * settings.ranks
            store = Path(folder) / "store"
            left_s = max(1.0, deadline_s - time.monotonic())
            tasks += [
                _Task("collective", place, partial(_collective, i, len(places), place, store, left_s))
                for i, place in enumerate(places)
            ]
        results = _run(tasks, deadline_s)
    named = [Named(result.test, result.detail) for result in found if result.unit == "version"]
    failed = [result for result in found if not result.ok]
    return SelfTest(
        results=(*failed, *_one_collective(results)), versions=tuple(named), seconds=time.monotonic() - begun_s
    )


def child(connection: Connection, settings: Settings) -> None:
    """For a process forked where torch is loaded already: sends the `SelfTest` as JSON bytes."""
    _die_with_parent()
    with contextlib.redirect_stdout(sys.stderr):
        connection.send_bytes(msgspec.json.encode(examine(settings)))


# In children ----------------------------------------------------------------------------------------------------------


def _list_devices() -> Iterator[Result]:
    """The GPUs that torch sees, and versions. In a child: asking CUDA makes a process unfit for forking."""
    import torch

    for i in range(torch.cuda.device_count()):
        yield Result(test="devices", device=f"cuda:{i}", ok=True)
    versions = {"cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name, text in versions.items():
        if text:
            yield Result(test=name, device=CPU, ok=True, detail=text, unit="version")


def _test_device(device: str, memory_mib: int, nice: bool) -> Iterator[Result]:
    import torch

    if nice:
        os.nice(19)
    torch.set_num_threads(1)
    # Sums in halves of a precision would round what is exact: they are a setting, not a device's fault.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    model = torch.cuda.get_device_name(device) if device != CPU else CPU
    for problem in PROBLEMS:
        yield _known_answer(problem, device)
    yield _memory(device, memory_mib, model)
    yield _speed(device, model)


def _known_answer(problem: Problem, device: str) -> Result:
    kind = "selection" if problem.sparse else "product"
    test = f"matmul {problem.dtype} {kind}"
    for repeat in range(_REPEATS):
        product = multiply(problem, device)
        if digest(product) != problem.answer:
            left, right = operands(problem)
            right_answer = left @ right
            wrong = (product != right_answer).nonzero()
            if not len(wrong):
                detail = "the host gives another answer than the one that is stored"
            else:
                at = tuple(wrong[0].tolist())
                detail = (
                    f"{len(wrong):,} of {product.numel():,} results are wrong in repeat {repeat + 1}, the first at "
                    f"{list(at)}: {int(product[at])} instead of {int(right_answer[at])}"
                )
            return Result(test=test, device=device, ok=False, detail=detail)
    return Result(test=test, device=device, ok=True)


def _memory(device: str, memory_mib: int, model: str) -> Result:
    """Write patterns, each word's own address among them, read them back; GB/s are of writing and reading."""
    import torch

    words = memory_mib * _MIB // 8
    address = torch.arange(words, dtype=torch.int64, device=device)
    block = torch.empty(words, dtype=torch.int64, device=device)
    _wait(device)
    begun_s, moved = time.perf_counter(), 0
    for pattern in (0, -1, 0x5555555555555555, -0x5555555555555556, None):
        if pattern is None:
            block.copy_(address).mul_(0x9E3779B97F4A7C1 | 1)
            block.sub_(address * (0x9E3779B97F4A7C1 | 1))
            wrong = int((block != 0).sum())
        else:
            block.fill_(pattern)
            wrong = int((block != pattern).sum())
        moved += 2 * words * 8
        if wrong:
            name = "addresses" if pattern is None else f"pattern {pattern & 0xFFFFFFFFFFFFFFFF:#018x}"
            return Result(test="memory", device=device, ok=False, detail=f"{wrong:,} of {words:,} words lost {name}")
    _wait(device)
    speed = moved / 1e9 / (time.perf_counter() - begun_s)
    detail = f"{memory_mib} MiB"
    return Result(test="memory", device=device, ok=True, detail=detail, value=speed, unit="GB/s", model=model)


def _speed(device: str, model: str) -> Result:
    """The best of several timings of a matmul: what disturbs only slows down."""
    import torch

    size, dtype = (_CPU_SIZE, torch.float32) if device == CPU else (_GPU_SIZE, torch.bfloat16)
    one = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.mm(one, one)
    _wait(device)
    best_s, spent_s = float("inf"), 0.0
    while spent_s < _SPEED_S:
        begun_s = time.perf_counter()
        torch.mm(one, one, out=product)
        _wait(device)
        took_s = time.perf_counter() - begun_s
        best_s, spent_s = min(best_s, took_s), spent_s + took_s
    name = "matmul speed"
    speed = 2 * size**3 / best_s / 1e12
    detail = f"{str(dtype).removeprefix('torch.')} {size}"
    return Result(test=name, device=device, ok=True, detail=detail, value=speed, unit="TFLOP/s", model=model)


def _wait(device: str) -> None:
    if device != CPU:
        import torch

        torch.cuda.synchronize(device)


def _collective(rank: int, size: int, device: str, store: Path, timeout_s: float) -> Iterator[Result]:
    """Sum integers over all ranks: one right answer, whatever the order."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend = "gloo" if device == CPU else "nccl"
    if device != CPU:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    mine = integers(10 + rank, _ELEMENTS, 1000).to(torch.float32).to(device)
    dist.all_reduce(mine)
    answer = sum(integers(10 + peer, _ELEMENTS, 1000) for peer in range(size))
    wrong = int((mine.cpu().to(torch.int64) != answer).sum())
    dist.destroy_process_group()
    detail = f"{wrong:,} of {_ELEMENTS:,} sums are wrong" if wrong else f"all-reduce over {size} ranks, {backend}"
    yield Result(test="collective", device=device, ok=not wrong, detail=detail)


# Around children ------------------------------------------------------------------------------------------------------


class _Task:
    """One child: a test of a device, whose results come through a pipe, as JSON."""

    def __init__(self, test: str, device: str, act: Callable[[], Iterator[Result]]) -> None:
        self.test = test
        self.device = device
        self.act = act
        self.process: ForkProcess | None = None
        self.pipe: Connection | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=self._main, args=(theirs,))
        self.process.start()
        theirs.close()

    def _main(self, pipe: Connection) -> None:
        _die_with_parent()
        results = []
        try:
            results = list(self.act())
        except (RuntimeError, OSError, AssertionError, MemoryError) as error:
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            results.append(Result(test=self.test, device=self.device, ok=False, detail=words))
        pipe.send_bytes(msgspec.json.encode(results))
        pipe.close()
        # Not `exit`: a GPU that is sick may never let its context go.
        os._exit(0)

    def result(self) -> list[Result]:
        """What the child sent; what its death says if it sent nothing."""
        assert self.pipe is not None
        assert self.process is not None
        try:
            return msgspec.json.decode(self.pipe.recv_bytes(), type=list[Result])
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return [self.failed(f"the test's process died ({how})")]

    def failed(self, detail: str, late: bool = False) -> Result:
        return Result(test=self.test, device=self.device, ok=False, detail=detail, late=late)


def _run(tasks: Sequence[_Task], deadline_s: float) -> list[Result]:
    """Results of all tasks, in their order; those of tasks that take too long say so."""
    results: dict[int, list[Result]] = {}
    try:
        for task in tasks:
            task.start()
        while len(results) < len(tasks):
            pipes = {task.pipe: i for i, task in enumerate(tasks) if i not in results}
            ready = multiprocessing.connection.wait(list(pipes), max(0.0, deadline_s - time.monotonic()))  # type: ignore[arg-type]
            if not ready:
                results |= {i: [tasks[i].failed("no answer in time", late=True)] for i in pipes.values()}
            for pipe in ready:
                index = pipes[pipe]  # type: ignore[index]
                results[index] = tasks[index].result()
    finally:
        for task in tasks:
            if task.process is not None:
                task.process.kill()
    return [result for i in range(len(tasks)) for result in results[i]]


def _one_collective(results: Sequence[Result]) -> list[Result]:
    """Of ranks that all did well, one line is enough; of others, those that did not."""
    ranks = [result for result in results if result.test == "collective"]
    bad = [result for result in ranks if not result.ok]
    return [*(result for result in results if result.test != "collective"), *(bad or ranks[:1])]


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    chosen = msgspec.json.decode(sys.argv[1], type=Settings) if len(sys.argv) > 1 else Settings()
    with contextlib.redirect_stdout(sys.stderr):
        outcome = examine(chosen)
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
