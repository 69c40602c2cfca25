"""A worker's end is judged by its evidence, and an incident is charged to its root."""

from __future__ import annotations

import signal
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from health.crash import Standing, fingerprint, first_cause, judge_exit, standing
from health.logtext import shorten_log
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Phase, WorkerError

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:41234. "
    "This may indicate a remote failure"
)


def error(type_: str, message: str, phase: Phase = Phase.FORWARD_BACKWARD, exit_code: int = 1) -> WorkerError:
    return WorkerError(
        rank=3, step=12, phase=phase, type=type_, message=message, traceback="Traceback ...", exit_code=exit_code
    )


def judged(
    exit_code: int | None = 1,
    signal_number: int | None = None,
    why: WorkerError | None = None,
    log: tuple[str, ...] = (),
    oom_kill: bool = False,
) -> Verdict:
    return judge_exit("node1", 3, exit_code, signal_number, why, log, oom_kill, 11)


@pytest.mark.parametrize(
    ("verdict", "cause", "severity"),
    [
        (judged(None, signal.SIGKILL), Cause.WORKER_KILLED, Severity.WORKERS),
        (judged(-9), Cause.WORKER_KILLED, Severity.WORKERS),
        (judged(None, signal.SIGTERM), Cause.WORKER_KILLED, Severity.WORKERS),
        (judged(None, signal.SIGKILL, oom_kill=True), Cause.OUT_OF_MEMORY, Severity.WORKERS),
        (
            judged(None, signal.SIGKILL, log=("CUDA out of memory: retrying with a smaller batch",)),
            Cause.WORKER_KILLED,
            Severity.WORKERS,
        ),
        (judged(None, signal.SIGSEGV), Cause.WORKER_CRASH, Severity.WORKERS),
        (judged(None, signal.SIGBUS), Cause.WORKER_CRASH, Severity.WORKERS),
        (judged(None, signal.SIGABRT, log=("terminate called", GLOO)), Cause.PEER_LOST, Severity.WORKERS),
        (judged(None, signal.SIGABRT, log=("what(): std::bad_alloc",)), Cause.OUT_OF_MEMORY, Severity.WORKERS),
        (judged(why=error("torch.OutOfMemoryError", "CUDA out of memory.")), Cause.OUT_OF_MEMORY, Severity.WORKERS),
        (judged(why=error("MemoryError", "")), Cause.OUT_OF_MEMORY, Severity.WORKERS),
        (
            judged(why=error("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")),
            Cause.OUT_OF_MEMORY,
            Severity.WORKERS,
        ),
        (judged(why=error("RuntimeError", GLOO)), Cause.PEER_LOST, Severity.WORKERS),
        (judged(why=error("torch.distributed.DistNetworkError", "oops")), Cause.PEER_LOST, Severity.WORKERS),
        (judged(why=error("RuntimeError", "Timed out waiting 5000ms for recv")), Cause.PEER_LOST, Severity.WORKERS),
        (judged(why=error("RuntimeError", "Gloo connectFullMesh failed: ...")), Cause.PEER_LOST, Severity.WORKERS),
        (judged(why=error("ConnectionResetError", "[Errno 104]")), Cause.PEER_LOST, Severity.WORKERS),
        (judged(why=error("ValueError", "tp 3", Phase.BUILDING)), Cause.BAD_INPUT, Severity.JOB),
        (judged(2, why=error("ConfigError", "no corpus", Phase.STARTING, 2)), Cause.BAD_INPUT, Severity.JOB),
        (judged(2), Cause.BAD_INPUT, Severity.JOB),
        (judged(why=error("ValueError", "bad value")), Cause.USER_ERROR, Severity.WORKERS),
        (judged(why=error("IndexError", "index 5 is out of range")), Cause.USER_ERROR, Severity.WORKERS),
        (judged(93, why=error("RuntimeError", "never again", exit_code=93)), Cause.USER_ERROR, Severity.JOB),
        (judged(94, why=error("RuntimeError", "row remap failed", exit_code=94)), Cause.USER_ERROR, Severity.NODE),
        (judged(94), Cause.WORKER_CRASH, Severity.NODE),
        (judged(1), Cause.WORKER_CRASH, Severity.WORKERS),
    ],
)  # fmt: skip
def test_the_cause_follows_from_the_evidence(verdict: Verdict, cause: Cause, severity: Severity) -> None:
    assert (verdict.cause, verdict.severity) == (cause, severity)


STEPS = tuple(f"step {number}" for number in range(100))
TRACE = ("Fatal Python error: Aborted", "", *(f"  File x, line {number}" for number in range(100)))
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("number", "log", "cause", "severity"),
    [
        (signal.SIGSEGV, ("  Volatile uncorrectable ECC errors: 0",), Cause.WORKER_CRASH, Severity.WORKERS),
        (signal.SIGABRT, ("s3: Connection reset by peer, retrying", ILLEGAL), Cause.CUDA_ERROR, Severity.WORKERS),
        (signal.SIGABRT, ("s3: Connection reset by peer", *STEPS, ILLEGAL, *TRACE), Cause.CUDA_ERROR, Severity.WORKERS),
        (signal.SIGABRT, (*STEPS, GLOO, *TRACE), Cause.PEER_LOST, Severity.WORKERS),
        (signal.SIGABRT, (GLOO, *STEPS, *TRACE), Cause.WORKER_CRASH, Severity.WORKERS),
        (signal.SIGSEGV, ("batch skipped, out of memory in cache",), Cause.WORKER_CRASH, Severity.WORKERS),
        (signal.SIGSEGV, ("std::bad_alloc", *STEPS), Cause.WORKER_CRASH, Severity.WORKERS),
        (signal.SIGSEGV, ("std::bad_alloc",), Cause.OUT_OF_MEMORY, Severity.WORKERS),
        (signal.SIGKILL, ("oom-kill: constraint=1", *STEPS), Cause.WORKER_KILLED, Severity.WORKERS),
    ],
)  # fmt: skip
def test_only_the_final_burst_of_a_log_tells_of_the_end(
    number: int, log: tuple[str, ...], cause: Cause, severity: Severity
) -> None:
    """Promise: what was logged and survived decides nothing, in the whole log and in what an agent sends of it."""
    for lines in (log, shorten_log(log)):
        verdict = judged(None, number, log=lines)
        assert (verdict.cause, verdict.severity) == (cause, severity)


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.LOADING])
def test_storage_that_closes_a_connection_is_no_lost_peer(phase: Phase) -> None:
    """Promise: an error of the data source is a root of its own; only what names a collective is an echo there."""
    for type_, message in (("ConnectionResetError", "[Errno 104]"), ("OSError", "s3: connection timed out")):
        assert judged(why=error(type_, message, phase)).cause is Cause.USER_ERROR
    for type_, message in (("RuntimeError", GLOO), ("torch.distributed.DistNetworkError", "oops")):
        assert judged(why=error(type_, message, phase)).cause is Cause.PEER_LOST


def test_a_log_proves_nothing() -> None:
    """Promise: a line in a log, which may quote anything, is at most likely; the worker's own error may be a proof."""
    ecc = "CUDA error: uncorrectable ECC error encountered"
    logged, raised = judged(None, signal.SIGABRT, log=(ecc,)), judged(why=error("AcceleratorError", ecc))
    assert (logged.severity, logged.certainty) == (Severity.NODE, Certainty.LIKELY)
    assert (raised.severity, raised.certainty) == (Severity.NODE, Certainty.PROOF)
    echo = judged(why=error("RuntimeError", GLOO), log=(ecc, GLOO))
    assert (echo.cause, echo.certainty) == (Cause.CUDA_ERROR, Certainty.LIKELY)


def test_leaving_when_asked_is_no_failure() -> None:
    assert judged(75).severity is Severity.NOTICE
    assert judged(0).severity is Severity.NOTICE


def test_evidence_says_who_how_where_and_quotes_the_error() -> None:
    verdict = judged(why=error("builtins.IndexError", "index 5 is out of range\nsecond line"))
    assert verdict.evidence == (
        "rank 3 on node1 ended with exit code 1 in step 12, phase forward_backward",
        "IndexError: index 5 is out of range",
    )
    assert verdict.step == 12
    silent = judged(None, signal.SIGSEGV, log=("a", "", "last words"))
    assert silent.evidence[0] == "rank 3 on node1 ended by SIGSEGV in step 11"
    assert silent.evidence[-1] == "log: last words"
    assert silent.fingerprint == "SIGSEGV"


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 2**48), st.integers(0, 2**48))
def test_the_same_error_elsewhere_has_the_same_fingerprint(rank: int, other: int, address: int, second: int) -> None:
    """Ranks, sizes, addresses and paths differ between nodes; what remains is equal."""
    text = "shape mismatch at row {} of /data/node{}/corpus.bin (object at 0x{:x})\nrank {}"
    one = error("pkg.ShapeError", text.format(rank, rank, address, rank))
    two = error("ShapeError", text.format(other, other, second, other))
    assert fingerprint(one) == fingerprint(two)


def test_different_errors_have_different_fingerprints() -> None:
    marks = {
        fingerprint(error("KeyError", "'loss'")),
        fingerprint(error("KeyError", "'grad'")),
        fingerprint(error("IndexError", "'loss'")),
        fingerprint(error("RuntimeError", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")),
        fingerprint(error("RuntimeError", "")),
    }
    assert len(marks) == 5


def test_an_incident_is_charged_to_its_root_not_to_those_who_lost_a_peer() -> None:
    """The peers of a killed worker often report first."""
    peer = judged(why=error("RuntimeError", GLOO))
    told = judged(None, signal.SIGTERM)
    killed = judged(None, signal.SIGKILL)
    crashed = judged(None, signal.SIGSEGV)
    assert first_cause([peer, told, killed, crashed]) is killed
    assert first_cause([peer, peer]) is peer
    assert first_cause([judged(75), peer]) is peer
    bad_node = judged(94)
    assert first_cause([killed, bad_node]) is bad_node
    with pytest.raises(ValueError, match="verdict"):
        first_cause([])


def test_the_root_is_found_in_whatever_order_verdicts_arrive() -> None:
    """Promise: neither the many victims nor the order of reports decides; a root wins over a hundred echoes."""
    echoes = [judged(why=error("RuntimeError", GLOO)) for _ in range(100)]
    aborted = judged(None, signal.SIGABRT, log=("terminate called without an active exception",))
    told = judged(None, signal.SIGTERM)
    for root in (judged(why=error("IndexError", "5")), judged(None, signal.SIGSEGV), judged(None, signal.SIGKILL)):
        arrived = [*echoes[:50], aborted, told, root, *echoes[50:]]
        assert first_cause(arrived) is root
        assert first_cause(arrived[::-1]) is root
        assert standing(root) is Standing.ROOT
    assert first_cause([*echoes, aborted]) is aborted


VERDICTS = st.builds(
    Verdict,
    node=st.sampled_from(["node0", "node1"]),
    rank=st.integers(0, 7),
    cause=st.sampled_from(list(Cause)),
    severity=st.sampled_from(list(Severity)),
    step=st.just(1),
    fingerprint=st.sampled_from(["SIGABRT", "SIGTERM", "SIGSEGV"]),
    certainty=st.sampled_from(list(Certainty)),
)


@given(st.lists(VERDICTS, min_size=1), st.randoms(use_true_random=False))
def test_a_lost_peer_never_wins_over_a_root(verdicts: list[Verdict], dice: Random) -> None:
    """Promise: the root's standing does not depend on the order, and no echo is chosen where there is a failure."""
    chosen = first_cause(verdicts)
    shuffled = dice.sample(verdicts, len(verdicts))
    assert standing(first_cause(shuffled)) is standing(chosen)
    failures = [each for each in verdicts if each.severity is not Severity.NOTICE]
    if any(each.cause is not Cause.PEER_LOST for each in failures):
        assert chosen.cause is not Cause.PEER_LOST


def test_a_bus_error_names_its_candidates() -> None:
    """Promise: a full shared memory is out of memory; else faulty memory is only one of the candidates."""
    full = judge_exit("node1", 3, None, signal.SIGBUS, None, (), False, 11, ram_free_bytes=4096)
    assert (full.cause, full.fingerprint) == (Cause.OUT_OF_MEMORY, "out of memory")
    assert "shared memory is full: 4096 bytes were left" in full.evidence[1]
    other = judge_exit("node1", 3, None, signal.SIGBUS, None, (), False, 11, ram_free_bytes=5 << 20)
    assert (other.cause, other.fingerprint) == (Cause.WORKER_CRASH, "SIGBUS")
    assert "faulty memory" in other.evidence[1]
    assert "(5 MiB of shared memory are free now)" in other.evidence[1]


def test_an_oom_kill_says_where_the_kernel_counted_it() -> None:
    """Promise: it can be seen whose limit it was."""
    verdict = judge_exit("node1", 3, None, signal.SIGKILL, None, (), True, 11, oom_scope="cgroup /job/rank3")
    assert verdict.evidence[1] == "the kernel's out-of-memory killer ended it (counted in cgroup /job/rank3)"
