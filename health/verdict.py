"""A verdict: what failed, where, and why a person should believe it."""

from __future__ import annotations

import enum

import msgspec


class Cause(enum.StrEnum):
    """What went wrong, as sure as the evidence allows."""

    WORKER_CRASH = "worker_crash"
    WORKER_KILLED = "worker_killed"
    OUT_OF_MEMORY = "out_of_memory"
    PEER_LOST = "peer_lost"
    USER_ERROR = "user_error"
    BAD_INPUT = "bad_input"
    NODE_LOST = "node_lost"
    HANG = "hang"
    NONFINITE = "nonfinite"
    STARTUP_TIMEOUT = "startup_timeout"
    PREEMPTED = "preempted"
    CUDA_ERROR = "cuda_error"
    STRAGGLER = "straggler"
    SLOW_NETWORK = "slow_network"
    SLOW_DATA = "slow_data"
    SLOW_JOB = "slow_job"
    SILENT_CORRUPTION = "silent_corruption"
    SPIKE = "spike"
    BAD_LAYER = "bad_layer"
    EXPERT_COLLAPSE = "expert_collapse"
    GPU_FAULT = "gpu_fault"
    GPU_DEGRADED = "gpu_degraded"
    NODE_FAULT = "node_fault"
    NODE_DEGRADED = "node_degraded"
    LINK_FAULT = "link_fault"
    PREFLIGHT_FAILED = "preflight_failed"


class Severity(enum.StrEnum):
    """How far the consequence reaches: nothing to do, the workers, the node, the job."""

    NOTICE = "notice"
    WORKERS = "workers"
    NODE = "node"
    JOB = "job"


class Certainty(enum.StrEnum):
    """How much one verdict proves. A hint alone never evicts anybody; proof needs no second witness."""

    HINT = "hint"
    LIKELY = "likely"
    PROOF = "proof"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One judgement. rank -1 and node "" mean: not known or not one.

    fingerprint is equal for the same error wherever it happens (type and first line, numbers stripped): the crash-loop
    breaker compares it. evidence: lines for a person. device: what on the node is meant (`gpu3`, `eth0`), "" for none.
    slowdown: by which part of itself a step takes longer because of this (0.2: 20%), 0 if that is not what it is about;
    the policy prices it. mended: what was wrong has been put right already, and training goes on as it should.
    """

    node: str
    rank: int
    cause: Cause
    severity: Severity
    step: int
    fingerprint: str
    evidence: tuple[str, ...] = ()
    certainty: Certainty = Certainty.LIKELY
    device: str = ""
    slowdown: float = 0.0
    mended: bool = False
