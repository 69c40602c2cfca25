"""What a worker's end means: one exit, with its evidence, becomes one verdict; one incident gets one root cause."""

from __future__ import annotations

import enum
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from health.cudatext import CudaError, find_cuda_error, named_device
from health.logtext import GPU_OOM, KERNEL_OOM, OOM, PEER, final_burst, first_telling, last_words
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Phase, WorkerError
from trainer.exits import ExitCode

_FINGERPRINT_CHARS = 200

_NO_ROOM_BYTES = 1 << 20

_OOM_TYPES = frozenset({"OutOfMemoryError", "MemoryError"})

_TORCH_PEER_TYPES = frozenset({"DistNetworkError", "DistStoreError"})
_SOCKET_TYPES = frozenset({
    "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError", "BrokenPipeError",
})  # fmt: skip
_COLLECTIVE = re.compile(r"gloo|nccl|c10d|TCPStore|ProcessGroup|monitoredBarrier|connectFullMesh", re.IGNORECASE)
# Here a worker speaks with storage: it is not a peer that closes that connection.
_STORAGE_PHASES = frozenset({Phase.LOADING, Phase.DATA})
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


@dataclass(frozen=True)
class _End:
    """What is known of one end. Exactly one of exit_code and signal_number, or neither where the end was not seen."""

    node: str
    rank: int
    exit_code: int | None
    signal_number: int | None
    error: WorkerError | None
    log_tail: tuple[str, ...]
    oom_kill: bool
    oom_scope: str
    ram_free_bytes: int
    step: int


@dataclass(frozen=True)
class _Finding:
    cause: Cause
    certainty: Certainty = Certainty.LIKELY
    cuda: CudaError | None = None
    device: str = ""
    mark: str = ""
    note: str = ""


def judge_exit(
    node: str,
    rank: int,
    exit_code: int | None,
    signal_number: int | None,
    error: WorkerError | None,
    log_tail: Sequence[str],
    oom_kill: bool,
    step: int,
    oom_scope: str = "",
    ram_free_bytes: int = -1,
) -> Verdict:
    """What one worker's end says about its cause.

    A negative exit_code means a signal, as in Python's own process classes. error, written by the worker itself,
    outweighs the log, which proves nothing: only its final burst is read, and what it says is at most likely. step is
    used where there is no error. oom_scope: where the kernel counted an OOM kill.
    ram_free_bytes: what was left in the node's shared memory at the end, -1 for not known. An exit with 0 or 75 is no
    failure: severity `notice`. A verdict about the node is never a hint.
    """
    if exit_code is not None and exit_code < 0:
        signal_number, exit_code = -exit_code, None
    end = _End(
        node, rank, exit_code, signal_number, error, tuple(log_tail), oom_kill, oom_scope, ram_free_bytes, step
    )  # fmt: skip
    found = _find(end)
    severity = _severity(end, found)
    certainty = found.certainty
    if severity is Severity.NODE and certainty is Certainty.HINT:
        # The worker itself, by its exit code, says that the node is bad.
        certainty = Certainty.LIKELY
    return Verdict(
        node=node,
        rank=rank,
        cause=found.cause,
        severity=severity,
        step=step if error is None else error.step,
        fingerprint=found.mark or (fingerprint(error) if error else _exit_name(exit_code, signal_number)),
        evidence=_evidence(end, found),
        certainty=certainty,
        device=found.device,
    )


class Standing(enum.IntEnum):
    """How near to the root of an incident a verdict can be; lower is nearer.

    FURTHER needs more than a restart (a bad node, a job that cannot go on). DOUBTFUL may be the root, or what a lost
    peer looks like from within a library. TOLD was asked to leave. ECHO only lost a peer. NOTED is no failure.
    """

    FURTHER = 0
    ROOT = 1
    DOUBTFUL = 2
    TOLD = 3
    ECHO = 4
    NOTED = 5


def standing(verdict: Verdict) -> Standing:
    """Where among the verdicts of an incident this one belongs."""
    if verdict.severity is Severity.NOTICE:
        return Standing.NOTED
    if verdict.cause is Cause.PEER_LOST:
        return Standing.ECHO
    if verdict.severity in (Severity.NODE, Severity.JOB):
        return Standing.FURTHER
    if verdict.cause is Cause.WORKER_KILLED and verdict.fingerprint == signal.SIGTERM.name:
        return Standing.TOLD
    aborted = verdict.cause is Cause.WORKER_CRASH and verdict.fingerprint == signal.SIGABRT.name
    return Standing.DOUBTFUL if aborted or verdict.certainty is Certainty.HINT else Standing.ROOT


def first_cause(verdicts: Sequence[Verdict]) -> Verdict:
    """The root of one incident, from its verdicts in the order in which they arrived.

    By standing, within that by certainty, within that the earliest to arrive. What happened counts before when: peers
    of a dead rank often report before it does, and clocks of nodes differ by more than the time between the two, so
    that no times are compared. Raises ValueError if there are none.
    """
    if not verdicts:
        raise ValueError("an incident without a verdict has no cause")
    return min(verdicts, key=lambda verdict: (standing(verdict), _DOUBT[verdict.certainty]))


_DOUBT = {Certainty.PROOF: 0, Certainty.LIKELY: 1, Certainty.HINT: 2}


def _find(end: _End) -> _Finding:
    log = final_burst(end.log_tail)
    if end.oom_kill:
        return _host_oom(f"the kernel's out-of-memory killer ended it{_in_scope(end.oom_scope)}")
    if end.error is not None:
        return _find_in_error(end.error, log)
    if end.signal_number is not None and end.signal_number not in _CRASH_SIGNALS:
        if first_telling(KERNEL_OOM, log) is not None:
            return _host_oom("the log has the kernel's out-of-memory killer")
        return _Finding(Cause.WORKER_KILLED)
    if end.exit_code == ExitCode.BAD_INPUT:
        return _Finding(Cause.BAD_INPUT, Certainty.PROOF)
    if end.signal_number == signal.SIGBUS:
        return _find_bus_error(end)
    if (oom_at := first_telling(OOM, log)) is not None:
        return _find_oom(log[oom_at])
    # NCCL's watchdog and gloo abort the process when a peer is gone: the abort is not this worker's fault.
    may_be_echo = end.signal_number in (None, signal.SIGABRT)
    peer_at = first_telling(PEER, log) if may_be_echo else None
    cuda = _logged(log)
    if cuda is not None and (peer_at is None or _comes_before(cuda, peer_at)):
        return _cuda(cuda)
    if peer_at is not None:
        return _Finding(Cause.PEER_LOST)
    return _Finding(Cause.USER_ERROR if end.exit_code == ExitCode.DO_NOT_RESTART else Cause.WORKER_CRASH)


def _logged(log: Sequence[str]) -> CudaError | None:
    """The GPU error that a log speaks of: anything may be quoted there, so it proves nothing."""
    cuda = find_cuda_error(log)
    if cuda is None or cuda.trouble.certainty is not Certainty.PROOF:
        return cuda
    return replace(cuda, trouble=replace(cuda.trouble, certainty=Certainty.LIKELY))


def _find_in_error(error: WorkerError, log: Sequence[str]) -> _Finding:
    kind = _short_type(error.type)
    if kind in _OOM_TYPES or OOM.search(error.message):
        found = _find_oom(error.message)
        return replace(found, mark="", certainty=Certainty.PROOF if kind in _OOM_TYPES else found.certainty)
    cuda = find_cuda_error(error.message.splitlines())
    peer = _lost_peer(kind, error)
    if cuda is not None and (not peer or cuda.trouble.certainty is not Certainty.HINT):
        return _cuda(cuda)
    if peer:
        # What the main thread saw may be an echo of what another thread of this very process logged before.
        logged, peer_at = _logged(log), first_telling(PEER, log)
        own = logged is not None and (peer_at is None or _comes_before(logged, peer_at))
        return _cuda(logged) if logged is not None and own else _Finding(Cause.PEER_LOST)
    early = error.phase in (Phase.STARTING, Phase.BUILDING)
    if error.exit_code == ExitCode.BAD_INPUT or (kind in _INPUT_TYPES and early):
        return _Finding(Cause.BAD_INPUT, Certainty.PROOF)
    return _Finding(Cause.USER_ERROR)


def _lost_peer(kind: str, error: WorkerError) -> bool:
    """Whether an error only says that another rank has gone."""
    if kind in _TORCH_PEER_TYPES:
        return True
    if error.phase in _STORAGE_PHASES and not _COLLECTIVE.search(error.message):
        return False
    return kind in _SOCKET_TYPES or PEER.search(error.message) is not None


def _comes_before(cuda: CudaError, peer_at: int) -> bool:
    """Whether a GPU error is older than the loss of a peer; one that only a broken device reports is no echo anyway."""
    return (cuda.at < peer_at and not cuda.trouble.second_hand) or cuda.trouble.severity is Severity.NODE


def _cuda(cuda: CudaError) -> _Finding:
    name = cuda.trouble.name
    note = f"GPU error: {name}" + (f" on {cuda.device}" if cuda.device else "")
    return _Finding(
        Cause.CUDA_ERROR, cuda.trouble.certainty, cuda, cuda.device, f"gpu: {name}", f"{note} ({cuda.line})"
    )


def _find_oom(text: str) -> _Finding:
    if not GPU_OOM.search(text):
        return _host_oom("memory of the host, not of a GPU")
    device = named_device(text)
    note = f"memory of {device or 'a GPU'}, not of the host"
    return _Finding(Cause.OUT_OF_MEMORY, device=device, mark="GPU out of memory", note=note)


def _host_oom(note: str) -> _Finding:
    return _Finding(Cause.OUT_OF_MEMORY, mark="out of memory", note=note)


def _find_bus_error(end: _End) -> _Finding:
    if 0 <= end.ram_free_bytes < _NO_ROOM_BYTES:
        return _host_oom(f"shared memory is full: {end.ram_free_bytes} bytes were left, and a page of it was touched")
    left = f" ({end.ram_free_bytes >> 20} MiB of shared memory are free now)" if end.ram_free_bytes >= 0 else ""
    note = f"candidates: faulty memory, a file that shrank while it was mapped, or shared memory that was full{left}"
    return _Finding(Cause.WORKER_CRASH, note=note)


def _in_scope(scope: str) -> str:
    return f" (counted in {scope})" if scope else ""


def _severity(end: _End, found: _Finding) -> Severity:
    if end.exit_code in (ExitCode.DONE, ExitCode.REQUEUE):
        return Severity.NOTICE
    if end.exit_code == ExitCode.BAD_NODE:
        return Severity.NODE
    if end.exit_code == ExitCode.DO_NOT_RESTART or found.cause is Cause.BAD_INPUT:
        return Severity.JOB
    return found.cuda.trouble.severity if found.cuda is not None else Severity.WORKERS


def _evidence(end: _End, found: _Finding) -> tuple[str, ...]:
    how = _exit_name(end.exit_code, end.signal_number)
    how = f"by {how}" if end.signal_number is not None else f"with {how}"
    error = end.error
    where = f"in step {end.step}" if error is None else f"in step {error.step}, phase {error.phase.name.lower()}"
    lines = [f"rank {end.rank} on {end.node} ended {how} {where}"]
    if error is not None:
        message = error.message.strip().splitlines() or [""]
        lines.append(f"{_short_type(error.type)}: {message[0]}")
    if found.note:
        lines.append(found.note)
    if error is None:
        lines.extend(f"log: {line}" for line in last_words(end.log_tail))
    return tuple(lines)


def _exit_name(exit_code: int | None, signal_number: int | None = None) -> str:
    if signal_number is None:
        return "an unknown exit code" if exit_code is None else f"exit code {exit_code}"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(signal_number, f"signal {signal_number}")


def _short_type(name: str) -> str:
    return name.rsplit(".", 1)[-1]
