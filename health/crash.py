"""What a worker's end means: one exit, with its evidence, becomes one verdict; one incident gets one root cause."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from health.verdict import Cause, Severity, Verdict
from trainer.events import Phase, WorkerError
from trainer.exits import ExitCode

EVIDENCE_LOG_LINES = 6
_FINGERPRINT_CHARS = 200

_OOM_TYPES = frozenset({"OutOfMemoryError", "MemoryError"})
_OOM = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't|not enough)|can('t|not) allocate memory|std::bad_alloc",
    re.IGNORECASE,
)
_KERNEL_OOM = re.compile(r"out of memory: kill(ed)? process|oom-kill:", re.IGNORECASE)

_PEER_TYPES = frozenset({
    "DistNetworkError", "DistStoreError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError",
    "BrokenPipeError",
})  # fmt: skip
_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|abort)|closed by peer|broken pipe|socket (closed|timeout)"
    r"|failed to (recv|send|connect)|connectFullMesh failed"
    r"|timed out waiting|wait timeout|application timeout caused pair closure|remote process exited"
    r"|nccl(remote|system)error|nccl communicator was aborted|watchdog caught collective operation timeout"
    r"|collective operation timeout",
    re.IGNORECASE,
)
_INPUT_TYPES = frozenset({"ConfigError", "ValueError"})
_CRASH_SIGNALS = frozenset({
    signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS,
})  # fmt: skip

_PATH = re.compile(r"(?:[\w.~-]*/)+[\w.~-]*")
_HEX = re.compile(r"\b0x[0-9a-f]+\b|\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


def fingerprint(error: WorkerError) -> str:
    """The error's type and its message's first line, without what differs from place to place: paths, hex, numbers."""
    lines = error.message.strip().splitlines()
    text = lines[0] if lines else ""
    for pattern in (_PATH, _HEX, _NUMBER):
        text = pattern.sub("#", text)
    return f"{_short_type(error.type)}: {' '.join(text.split())}"[:_FINGERPRINT_CHARS]


def judge_exit(
    node: str,
    rank: int,
    exit_code: int | None,
    signal_number: int | None,
    error: WorkerError | None,
    log_tail: Sequence[str],
    oom_kill: bool,
    step: int,
) -> Verdict:
    """What one worker's end says about its cause.

    A negative exit_code means a signal, as in Python's own process classes. error, written by the worker itself,
    outweighs the log; step is used where there is no error. An exit with 0 or 75 is no failure: severity `notice`.
    """
    if exit_code is not None and exit_code < 0:
        signal_number = -exit_code
        exit_code = None
    cause = _cause(exit_code, signal_number, error, log_tail, oom_kill)
    mark = fingerprint(error) if error is not None else _exit_name(exit_code, signal_number)
    if cause is Cause.OUT_OF_MEMORY and error is None:
        mark = "out of memory"
    return Verdict(
        node=node,
        rank=rank,
        cause=cause,
        severity=_severity(exit_code, cause),
        step=step if error is None else error.step,
        fingerprint=mark,
        evidence=_evidence(node, rank, exit_code, signal_number, error, log_tail, oom_kill, step),
    )


def first_cause(verdicts: Sequence[Verdict]) -> Verdict:
    """The root of one incident, from its verdicts in the order in which they arrived.

    What needs more than a restart (a lost or bad node, a job that cannot go on) comes first, then whatever can be a
    root, then workers that were told to leave, then those that only lost a peer; within each the earliest.
    Raises ValueError if there are none.
    """
    if not verdicts:
        raise ValueError("an incident without a verdict has no cause")
    return min(verdicts, key=_distance_from_root)


def _distance_from_root(verdict: Verdict) -> int:
    if verdict.severity is Severity.NOTICE:
        return 4
    if verdict.cause is Cause.PEER_LOST:
        return 3
    if verdict.cause is Cause.WORKER_KILLED and verdict.fingerprint == signal.SIGTERM.name:
        return 2
    return 0 if verdict.severity in (Severity.NODE, Severity.JOB) else 1


def _cause(
    exit_code: int | None,
    signal_number: int | None,
    error: WorkerError | None,
    log_tail: Sequence[str],
    oom_kill: bool,
) -> Cause:
    if oom_kill:
        return Cause.OUT_OF_MEMORY
    if error is not None:
        return _error_cause(error)
    tail = "\n".join(log_tail)
    if signal_number is not None and signal_number not in _CRASH_SIGNALS:
        return Cause.OUT_OF_MEMORY if _KERNEL_OOM.search(tail) else Cause.WORKER_KILLED
    if exit_code == ExitCode.BAD_INPUT:
        return Cause.BAD_INPUT
    if _OOM.search(tail):
        return Cause.OUT_OF_MEMORY
    # NCCL's watchdog and gloo abort the process when a peer is gone: the abort is not this worker's fault.
    if _PEER.search(tail) and signal_number in (None, signal.SIGABRT):
        return Cause.PEER_LOST
    if exit_code == ExitCode.DO_NOT_RESTART:
        return Cause.USER_ERROR
    return Cause.WORKER_CRASH


def _error_cause(error: WorkerError) -> Cause:
    kind = _short_type(error.type)
    if kind in _OOM_TYPES or _OOM.search(error.message):
        return Cause.OUT_OF_MEMORY
    if kind in _PEER_TYPES or _PEER.search(error.message):
        return Cause.PEER_LOST
    early = error.phase in (Phase.STARTING, Phase.BUILDING)
    if error.exit_code == ExitCode.BAD_INPUT or (kind in _INPUT_TYPES and early):
        return Cause.BAD_INPUT
    return Cause.USER_ERROR


def _severity(exit_code: int | None, cause: Cause) -> Severity:
    if exit_code in (ExitCode.DONE, ExitCode.REQUEUE):
        return Severity.NOTICE
    if exit_code == ExitCode.BAD_NODE:
        return Severity.NODE
    if exit_code == ExitCode.DO_NOT_RESTART or cause is Cause.BAD_INPUT:
        return Severity.JOB
    return Severity.WORKERS


def _evidence(
    node: str,
    rank: int,
    exit_code: int | None,
    signal_number: int | None,
    error: WorkerError | None,
    log_tail: Sequence[str],
    oom_kill: bool,
    step: int,
) -> tuple[str, ...]:
    how = f"by {_exit_name(exit_code, signal_number)}" if signal_number is not None else f"with {_exit_name(exit_code)}"
    where = f"in step {step}" if error is None else f"in step {error.step}, phase {error.phase.name.lower()}"
    lines = [f"rank {rank} on {node} ended {how} {where}"]
    if oom_kill:
        lines.append("the kernel's out-of-memory killer ended it")
    if error is not None:
        message = error.message.strip().splitlines() or [""]
        lines.append(f"{_short_type(error.type)}: {message[0]}")
    else:
        tail = [line.rstrip() for line in log_tail if line.strip()]
        lines.extend(f"log: {line}" for line in tail[-EVIDENCE_LOG_LINES:])
    return tuple(lines)


def _exit_name(exit_code: int | None, signal_number: int | None = None) -> str:
    if signal_number is None:
        return "an unknown exit code" if exit_code is None else f"exit code {exit_code}"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(signal_number, f"signal {signal_number}")


def _short_type(name: str) -> str:
    return name.rsplit(".", 1)[-1]
