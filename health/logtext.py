"""What a dead worker's log tells: the words for memory and lost peers, and which of its many lines are worth keeping.

A crash in native code leaves hundreds of lines: what the library said, and then the stacks of all threads. What comes
last is the outermost frame; what tells is above it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from health.cudatext import TROUBLES

LAST_LINES = 40
TELLING_LINES = 40
BURST_LINES = 60
EVIDENCE_LINES = 6
_STACK_LINES = 5
_LONGEST_LINE = 500

OOM = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't|not enough)|can('t|not) allocate memory|std::bad_alloc"
    r"|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
GPU_OOM = re.compile(
    r"\b(CUDA|HIP)\b.*out of memory|Cuda failure (\d+ )?'out of memory'|BLAS\w*_STATUS_ALLOC_FAILED", re.I
)
KERNEL_OOM = re.compile(r"out of memory: kill(ed)? process|oom-kill:", re.IGNORECASE)
PEER = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|abort)|closed by (remote )?peer|broken pipe"
    r"|socket (closed|timeout)|connection timed out|no route to host|host is unreachable"
    r"|failed to (recv|send|connect)|connectFullMesh failed"
    r"|timed out waiting|wait timeout|application timeout caused pair closure|remote process exited"
    r"|failed to pass monitoredBarrier|client socket has (failed|timed out)"
    r"|ncclRemoteError|remote process exiting|nccl communicator was aborted|got completion .*with (status|error)"
    r"|watchdog caught collective operation timeout|collective operation timeout",
    re.IGNORECASE,
)

# Whoever wrote this went on: it is not what it died of.
_SURVIVED = re.compile(
    r"\bretrying\b|\bwill (be )?retr(y|ied)\b|\btrying again\b|\bskipp(ed|ing)\b|\bignor(ed|ing)\b"
    r"|\breconnect(ed|ing)\b|\bfalling back\b|\brecovered\b",
    re.IGNORECASE,
)
# Not only at the start of a line: what was written before it may lack its end.
_DUMP = re.compile(r"Fatal Python error: ")
_FATAL_LINES = 4
_FATAL = re.compile(r"^Fatal Python error: |^terminate called |^ +what\(\):")
_CURRENT_THREAD = re.compile(r"^Current thread 0x")
TELLING = (OOM, KERNEL_OOM, PEER, *(trouble.pattern for trouble in TROUBLES))
# Every line that one of them finds has one of these in it: looking for them first is fifty times as fast.
_STEMS = (
    "memory", "alloc", "oom", "connect", "closed", "pipe", "socket", "route", "reachable", "failed", "timed out",
    "timeout", "peer", "remote", "nccl", "completion", "cuda", "hip", "rocm", "gpu", "ecc", "nvml", "nvlink", "busy",
    "device", "assert", "address", "kernel", "ptx", "toolchain", "driver", "compatibility", "launch", "instruction",
    "stack error", "program counter", "blas", "cudnn", "unhandled",
)  # fmt: skip


def shorten_log(lines: Sequence[str]) -> tuple[str, ...]:
    """The last lines, and before them those that tell something; long ones are cut.

    Of each kind of line that a cause is read from the first of the final burst is kept, so that a shortened log says
    the same.
    """
    cut = [line[:_LONGEST_LINE] for line in lines]
    start, burst = max(0, len(cut) - LAST_LINES), _burst_at(cut)
    told = [*(burst + at for at in _firsts(cut[burst:])), *_stack(cut), *_dumps(cut)[-1:], *_fatal(cut)[-_FATAL_LINES:]]
    telling = [at for at in told if burst <= at < start]
    kept = sorted(dict.fromkeys(telling[:TELLING_LINES]))
    return tuple(cut[at] for at in [*kept, *range(start, len(cut))])


def final_burst(lines: Sequence[str]) -> Sequence[str]:
    """What a log ends with, as far as it may tell of the end: the stacks of all threads that a crash printed, and
    BURST_LINES before them. What is older was survived."""
    return lines[_burst_at(lines) :]


def _burst_at(lines: Sequence[str]) -> int:
    dumps = _dumps(lines)
    return max(0, (dumps[-1] if dumps else len(lines)) - BURST_LINES)


def _dumps(lines: Sequence[str]) -> list[int]:
    return [at for at, line in enumerate(lines) if _DUMP.search(line)]


def first_telling(kind: re.Pattern[str], lines: Sequence[str]) -> int | None:
    """Index of the first line of this kind; one about memory or a peer that says that work went on is none."""
    return next((at for at, line in enumerate(lines) if kind.search(line) and not _passed_over(kind, line)), None)


def _firsts(lines: Sequence[str]) -> list[int]:
    likely = [at for at, line in enumerate(lines) if may_tell(line)]
    told = [lines[at] for at in likely]
    found = (first_telling(kind, told) for kind in TELLING)
    return [likely[at] for at in found if at is not None]


def _passed_over(kind: re.Pattern[str], line: str) -> bool:
    return kind in (OOM, PEER) and _SURVIVED.search(line) is not None


def last_words(lines: Sequence[str]) -> tuple[str, ...]:
    """The lines that a person should read: of a crash what it was and the innermost frames, else the last ones."""
    said = [line.rstrip() for line in lines if line.strip()]
    stack = _stack(said)
    if not stack:
        return tuple(said[-EVIDENCE_LINES:])
    return tuple(said[at] for at in [*_fatal(said)[-1:], *stack][:EVIDENCE_LINES])


def may_tell(line: str) -> bool:
    """Whether one of `TELLING` could find something in this line. Quick; false means no."""
    lowered = line.lower()
    return any(stem in lowered for stem in _STEMS)


def _fatal(lines: Sequence[str]) -> list[int]:
    return [at for at, line in enumerate(lines) if _FATAL.search(line)]


def _stack(lines: Sequence[str]) -> list[int]:
    """The innermost frames of the thread that crashed, as Python's fault handler prints them."""
    found = [at for at, line in enumerate(lines) if _CURRENT_THREAD.search(line)]
    return [at for begin in found[-1:] for at in range(begin, min(begin + _STACK_LINES, len(lines)))]
