"""How the policy speaks of a verdict: sentences for a person."""

from __future__ import annotations

from health.verdict import Cause, Severity, Verdict

_QUOTED = (Cause.USER_ERROR, Cause.OUT_OF_MEMORY, Cause.WORKER_CRASH, Cause.BAD_INPUT, Cause.NONFINITE)
_WORDS = {
    Cause.WORKER_CRASH: "a worker crashed",
    Cause.WORKER_KILLED: "a worker was killed",
    Cause.OUT_OF_MEMORY: "a worker ran out of memory",
    Cause.PEER_LOST: "a worker lost its peers and no rank is known as the cause",
    Cause.USER_ERROR: "a worker failed with an error",
    Cause.BAD_INPUT: "the configuration or the input is wrong",
    Cause.NODE_LOST: "the node stopped answering",
    Cause.HANG: "training hung",
    Cause.NONFINITE: "the loss or a gradient was not finite",
    Cause.STARTUP_TIMEOUT: "the first step was not finished in time",
    Cause.PREEMPTED: "the node was told to leave",
    Cause.CUDA_ERROR: "a GPU failed in a worker's hands",
    Cause.STRAGGLER: "a rank is slow",
    Cause.SLOW_NETWORK: "the network is slow",
    Cause.SLOW_DATA: "the data source is slow",
    Cause.SLOW_JOB: "all ranks became slower",
    Cause.SILENT_CORRUPTION: "a device computed or kept wrong numbers",
    Cause.SPIKE: "the loss or the gradient norm leapt",
    Cause.BAD_LAYER: "a layer is dead or explodes",
    Cause.EXPERT_COLLAPSE: "the experts' load has collapsed",
    Cause.GPU_FAULT: "a GPU is faulty",
    Cause.GPU_DEGRADED: "a GPU is impaired",
    Cause.NODE_FAULT: "the node is faulty",
    Cause.NODE_DEGRADED: "the node is impaired",
    Cause.LINK_FAULT: "a link is faulty",
    Cause.PREFLIGHT_FAILED: "the node failed its examination",
}


def what(verdict: Verdict) -> str:
    """What happened, where and when, without a full stop."""
    where = f" (rank {verdict.rank} on {verdict.node})" if verdict.rank >= 0 and verdict.node else ""
    if not where and verdict.node:
        where = f" ({verdict.node})"
    step = f" in step {verdict.step}" if verdict.step >= 0 else ""
    words = _WORDS[verdict.cause]
    return f"{words[0].upper()}{words[1:]}{where}{step}"


def quote(verdict: Verdict) -> str:
    """The error in its own words: the evidence's second line is the message where a worker left one."""
    lines = verdict.evidence
    line = lines[1] if len(lines) > 1 and verdict.cause in _QUOTED else (lines[0] if lines else verdict.fingerprint)
    return line.removeprefix("log: ").rstrip(". ")


def fact(verdict: Verdict) -> str:
    """A verdict as one line among the facts of a decision."""
    rank = f" rank {verdict.rank}" if verdict.rank >= 0 else ""
    device = f" {verdict.device}" if verdict.device else ""
    where = f" on {verdict.node}{rank}{device}" if verdict.node else rank
    step = f" in step {verdict.step}" if verdict.step >= 0 else ""
    reach = {Severity.NODE: "the node", Severity.JOB: "the job", Severity.WORKERS: "the workers"}
    about = f"{verdict.certainty.value}, about {reach.get(verdict.severity, 'nobody')}"
    evidence = f": {quote(verdict)}" if verdict.evidence else ""
    return f"{verdict.cause.value}{where}{step} ({about}){evidence}"


def ordinal(number: int) -> str:
    """`second`, `third`, `4th`."""
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit_s, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.1f} s"
