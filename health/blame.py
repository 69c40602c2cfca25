"""Whose fault a verdict makes it: the user's, the software's or the hardware's; only as sure as the verdict is."""

from __future__ import annotations

import enum
import signal

from health.verdict import Cause, Certainty, Severity, Verdict


class Blame(enum.StrEnum):
    """Who should act: the job's owner, whoever maintains the software, whoever repairs machines; or not known yet."""

    USER = "user"
    SOFTWARE = "software"
    HARDWARE = "hardware"
    UNKNOWN = "unknown"


_BY_CAUSE = {
    Cause.WORKER_CRASH: (Blame.SOFTWARE, "native code crashed: a library, a kernel or an extension"),
    Cause.WORKER_KILLED: (Blame.UNKNOWN, "somebody outside the job sent a signal: an operator, a limit, another job"),
    Cause.OUT_OF_MEMORY: (Blame.USER, "the job asks for more memory than there is: a smaller microbatch, more ranks, "
                          "activation checkpointing, or a larger limit"),
    Cause.PEER_LOST: (Blame.UNKNOWN, "only that another rank went is known, not why"),
    Cause.USER_ERROR: (Blame.USER, "the job's own code, data or configuration raised an error"),
    Cause.BAD_INPUT: (Blame.USER, "the configuration or the input cannot be used"),
    Cause.NODE_LOST: (Blame.HARDWARE, "the machine, its power or its network went"),
    Cause.HANG: (Blame.UNKNOWN, "a rank stopped moving; its stack says where"),
    Cause.NONFINITE: (Blame.USER, "the data or the learning rate, unless a replay says otherwise"),
    Cause.STARTUP_TIMEOUT: (Blame.UNKNOWN, "the node is slow to start, or the limit is short"),
    Cause.PREEMPTED: (Blame.UNKNOWN, "nobody's fault: the node was needed elsewhere"),
    Cause.CUDA_ERROR: (Blame.SOFTWARE, "a kernel of the job did what it may not"),
    Cause.STRAGGLER: (Blame.HARDWARE, "one rank's machine is slower than those of its peers"),
    Cause.SLOW_NETWORK: (Blame.HARDWARE, "a link, a switch or a congested network"),
    Cause.SLOW_DATA: (Blame.UNKNOWN, "the storage, or too little reading ahead"),
    Cause.SLOW_JOB: (Blame.UNKNOWN, "all ranks alike: nothing points at one of them"),
    Cause.SILENT_CORRUPTION: (Blame.HARDWARE, "a device computed or kept wrong numbers"),
    Cause.SPIKE: (Blame.USER, "the data or the learning rate"),
    Cause.BAD_LAYER: (Blame.USER, "the model, its initialisation or the learning rate"),
    Cause.EXPERT_COLLAPSE: (Blame.USER, "the router, its balancing or the learning rate"),
    Cause.GPU_FAULT: (Blame.HARDWARE, "a GPU must be reset or replaced"),
    Cause.GPU_DEGRADED: (Blame.HARDWARE, "a GPU is hot, throttled or wearing out"),
    Cause.NODE_FAULT: (Blame.HARDWARE, "the machine must be repaired"),
    Cause.NODE_DEGRADED: (Blame.HARDWARE, "the machine is short of something"),
    Cause.LINK_FAULT: (Blame.HARDWARE, "a cable, a port or a switch"),
    Cause.PREFLIGHT_FAILED: (Blame.HARDWARE, "the machine failed its examination"),
}  # fmt: skip

_HOW_SURE = {Certainty.HINT: "perhaps", Certainty.LIKELY: "likely", Certainty.PROOF: "certainly"}


def blame(verdict: Verdict) -> Blame:
    """Whose fault it is, from the cause, how sure it is, and how far it reaches.

    A hint blames nobody, whatever the cause. A crash that concerns the whole node is the hardware's.
    """
    return _judge(verdict)[0]


def blame_words(verdict: Verdict) -> str:
    """The same for a person, in a line: `likely hardware: ...`."""
    who, words = _judge(verdict)
    if who is Blame.UNKNOWN:
        return f"not known whose fault: {words}"
    return f"{_HOW_SURE[verdict.certainty]} {who.value}: {words}"


def _judge(verdict: Verdict) -> tuple[Blame, str]:
    who, words = _BY_CAUSE[verdict.cause]
    if verdict.cause in (Cause.CUDA_ERROR, Cause.WORKER_CRASH) and verdict.severity is Severity.NODE:
        return Blame.HARDWARE, "the GPU, its driver or its links; the node should be looked at"
    if verdict.cause is Cause.WORKER_CRASH and verdict.fingerprint == signal.SIGBUS.name:
        return Blame.UNKNOWN, "faulty memory, or a file or shared memory that shrank or had no room"
    if verdict.certainty is Certainty.HINT:
        if verdict.cause is Cause.CUDA_ERROR:
            return Blame.UNKNOWN, "a kernel or the GPU; the same again on another node would say software"
        return Blame.UNKNOWN, words
    return who, words
