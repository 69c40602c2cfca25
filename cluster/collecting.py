"""An agent collects what its workers can say while they hang: stacks, flight records, and what /proc knows.

Everything is asked for twice, a moment apart, so that whoever reads it can tell a rank that works from one that hangs.
Nothing is ever waited for beyond the time that was given, and nothing is done to a worker that could end it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.messages import Evidence, Order
from health.collectives import FlightRecord, Operation, decode_flight, encode_record
from health.hang_evidence import STOPPED, ProcessFacts, facts_name, flight_name, join_looks, stack_name
from trainer.flight import flight_path, request_path, stacks_path

FILE_LIMIT_BYTES = 64 << 10
# A report with all files must stay below what a message may have.
_TOTAL_LIMIT_BYTES = 3 << 20
_POLL_S = 0.01
_BETWEEN_LOOKS = 0.25
_FOR_THE_WITNESS = 0.7
_LEAST_S = 0.2
_SIGUSR2_BIT = 1 << (signal.SIGUSR2 - 1)
_LONGEST_STACK_BYTES = 24 << 10


@dataclass(frozen=True)
class Worker:
    """A local worker: its place on the node, its rank, its process."""

    local_rank: int
    rank: int
    pid: int


@dataclass(frozen=True)
class _Look:
    """One look at a worker."""

    state: str
    runnable: int
    stack: str
    stack_from: str
    record: FlightRecord | None
    problem: str


class Collector:
    """Answers `Order.collect`: each new number with one `Evidence`, from a thread of its own."""

    def __init__(
        self,
        ram_dir: Path,
        workers: Callable[[], Sequence[Worker]],
        show: Callable[[Evidence], None],
        timeout_s: float,
    ) -> None:
        self.ram_dir = ram_dir
        self.workers = workers
        self.show = show
        self.timeout_s = timeout_s
        self._number = 0

    def obey(self, order: Order) -> None:
        """Begin to collect if that is asked for and was not before; returns at once."""
        if order.collect == self._number:
            return
        self._number = order.collect
        if not order.collect:
            # What was shown travels with every report until then.
            self.show(Evidence(0, {}))
            return
        threading.Thread(target=self._answer, args=(order.collect,), name="collect", daemon=True).start()

    def _answer(self, number: int) -> None:
        files = collect(self.ram_dir, self.workers(), number, self.timeout_s)
        if number == self._number:
            self.show(Evidence(number, files))


def collect(ram_dir: Path, workers: Sequence[Worker], number: int, timeout_s: float) -> dict[str, bytes]:
    """Files about all workers, by the names of `health.hang_evidence`; takes at most about timeout_s.

    number: marks the answers to this request; any number that is not used twice.
    """
    if not workers:
        return {}
    limit = min(FILE_LIMIT_BYTES, _TOTAL_LIMIT_BYTES // (2 * len(workers)))
    deadline_s = time.monotonic() + timeout_s
    with ThreadPoolExecutor(max_workers=len(workers), thread_name_prefix="collect") as pool:
        asked = [pool.submit(_about, ram_dir, worker, number, deadline_s, limit) for worker in workers]
        return {name: data for each in asked for name, data in each.result().items()}


def _about(ram_dir: Path, worker: Worker, number: int, deadline_s: float, limit: int) -> dict[str, bytes]:
    """The files of one worker."""
    begun_s = time.monotonic()
    first = _look(ram_dir, worker, 2 * number, begun_s + (deadline_s - begun_s) / 2)
    # What looking costs the worker itself is no work of its.
    from_s, work_s = time.monotonic(), _cpu_s(worker.pid)
    threading.Event().wait(min(_BETWEEN_LOOKS, max(0.0, deadline_s - from_s) / 2))
    looked_s, work_s = time.monotonic() - from_s, max(0.0, _cpu_s(worker.pid) - work_s)
    second = _look(ram_dir, worker, 2 * number + 1, deadline_s)
    facts = ProcessFacts(
        rank=worker.rank,
        pid=worker.pid,
        state="R" if "R" in (first.state, second.state) and second.state not in STOPPED else second.state,
        cpu_s=work_s,
        looked_s=looked_s,
        stack_from=second.stack_from,
        record_moved=first.record is not None and second.record is not None and _mark(first) != _mark(second),
        threads=_threads(worker.pid),
        runnable=min(first.runnable, second.runnable),
        kernel=_kernel(worker.pid),
        problem=second.problem,
    )
    files = {
        facts_name(worker.rank): msgspec.json.encode(facts),
        stack_name(worker.rank): join_looks([first.stack, second.stack]).encode()[-limit:],
    }
    if second.record is not None:
        files[flight_name(worker.rank)] = encode_record(second.record, limit)
    return files


def _look(ram_dir: Path, worker: Worker, request: int, until_s: float) -> _Look:
    """Ask the worker itself; if it does not answer, look at its stack from outside."""
    state, runnable = _state(worker.pid), _runnable(worker.pid)
    path, record, stack = flight_path(ram_dir, worker.local_rank), None, ""
    problem = _ask_record(request_path(ram_dir, worker.local_rank), request)
    patience_s = time.monotonic() + _FOR_THE_WITNESS * (until_s - time.monotonic())
    while state not in STOPPED and record is None and not problem and time.monotonic() < patience_s:
        record, stack, problem = _answer_in(path, request)
        threading.Event().wait(_POLL_S)
    if record is not None:
        return _Look(state, runnable, stack, "witness", record, record.problem)
    timeout_s = max(_LEAST_S, until_s - time.monotonic())
    stack, trouble = _py_spy(worker.pid, timeout_s)
    if stack:
        return _Look(state, runnable, stack, "py-spy", None, problem)
    # Frames of threads that run may change under it: only where all of them sleep.
    if state not in STOPPED and not _runnable(worker.pid):
        stack = _faulthandler(worker.pid, stacks_path(ram_dir, worker.local_rank), timeout_s)
    return _Look(state, runnable, stack, "faulthandler" if stack else "", None, problem or trouble)


def _ask_record(pipe: Path, request: int) -> str:
    """Ask the witness; returns why that was not possible, "" if it was."""
    try:
        fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return f"the worker's witness does not listen ({errno.errorcode.get(error.errno or 0, error)})"
    try:
        os.write(fd, b"%d\n" % request)
    except OSError as error:
        return f"the worker's witness takes no request ({error.strerror})"
    finally:
        os.close(fd)
    return ""


def _answer_in(path: Path, request: int) -> tuple[FlightRecord | None, str, str]:
    """The record and the stacks, if they are there and the answer to this request; or why they cannot be read."""
    try:
        record, stacks = decode_flight(path.read_bytes())
    except OSError:
        return None, "", ""
    except ValueError as error:
        return None, "", f"the flight record cannot be read: {error}"
    return (record, stacks, "") if record.request == request else (None, "", "")


def _faulthandler(pid: int, path: Path, timeout_s: float) -> str:
    """The stack as faulthandler writes it, for a worker that cannot answer otherwise; see `trainer.witness`."""
    # A signal whose handler is not there yet would end the process.
    if not _handles_usr2(pid):
        return ""
    before = path.stat().st_size if path.exists() else 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    until_s, stack, growing = time.monotonic() + timeout_s, "", ""
    while not stack and time.monotonic() < until_s:
        # It is written line by line, and whole when nothing more comes.
        text = _written_since(path, before)
        stack, growing = (text if text == growing else ""), text
        threading.Event().wait(_POLL_S)
    return stack


def _written_since(path: Path, before: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(before)
            text = file.read(_LONGEST_STACK_BYTES)
    except OSError:
        return ""
    return text.decode(errors="replace") if text.endswith(b"\n") and b"most recent call first" in text else ""


def _py_spy(pid: int, timeout_s: float) -> tuple[str, str]:
    """The stack as py-spy reads it from outside, without stopping the process; or why there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "no stack: the worker does not answer, and py-spy is not installed (extra: everstep[hang])"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"no stack: py-spy did not end in {timeout_s:.1f} s"
    text = done.stdout.decode(errors="replace")[-_LONGEST_STACK_BYTES:]
    return (text, "") if done.returncode == 0 else ("", f"no stack: py-spy ended with {done.returncode}")


def _mark(look: _Look) -> tuple[Operation, ...]:
    """What must be equal at two looks if nothing moves."""
    assert look.record is not None
    return look.record.operations[-64:]


def _status(pid: int) -> Mapping[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _state(pid: int) -> str:
    return _status(pid).get("State", "X")[:1]


def _threads(pid: int) -> int:
    return int(_status(pid).get("Threads", "0"))


def _runnable(pid: int) -> int:
    """How many threads run or would run if they had a processor."""
    found = 0
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found += task.read_text().rpartition(")")[2].split()[0] == "R"
    return found


def _handles_usr2(pid: int) -> bool:
    return bool(int(_status(pid).get("SigCgt", "0"), 16) & _SIGUSR2_BIT)


def _cpu_s(pid: int) -> float:
    """Processor time of all threads so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kernel(pid: int) -> str:
    """The kernel function that the main thread waits in, and its kernel stack where that may be read."""
    parts = []
    for name in ("wchan", "stack"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text().strip()
            if text and text != "0":
                parts.append(" < ".join(text.splitlines()[:4]))
    return "; ".join(parts)
