"""GPU errors are read out of real messages: which kind, how sure, how far it reaches, which device."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from health.blame import Blame, blame, blame_words
from health.crash import first_cause, judge_exit
from health.cudatext import TROUBLES, find_cuda_error, named_device
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Phase, WorkerError

ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled {} error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n{}\nLast error:\n{}"
)
SYSTEM_CALL = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
WATCHDOG = (
    "[rank3]:[E PG ID 0 PG GUID 0(default_pg) Rank 3] Process group watchdog thread terminated with exception: "
    "CUDA error: an illegal memory access was encountered"
)
COLLECTIVE = (
    "[rank3]:[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE) ran for 600001 ms"
)


def judged(message: str = "", log: tuple[str, ...] = (), code: int | None = 1, number: int | None = None) -> Verdict:
    """The verdict on a rank that raised this message, or that left only a log."""
    error = WorkerError(
        rank=3, step=12, phase=Phase.FORWARD_BACKWARD, type="torch.AcceleratorError", message=message, traceback="...",
        exit_code=1,
    )  # fmt: skip
    return judge_exit("node1", 3, code, number, error if message else None, log, False, 11)


@pytest.mark.parametrize(
    ("message", "certainty", "severity", "who"),
    [
        ("CUDA error: an illegal memory access was encountered", "likely", "workers", Blame.SOFTWARE),
        ("CUDA error: device-side assert triggered", "likely", "workers", Blame.SOFTWARE),
        ("HIP error: an illegal memory access was encountered", "likely", "workers", Blame.SOFTWARE),
        ("CUDA error: misaligned address", "likely", "workers", Blame.SOFTWARE),
        ("CUDA error: no kernel image is available for execution on the device", "likely", "workers", Blame.SOFTWARE),
        ("CUDA error: uncorrectable ECC error encountered", "proof", "node", Blame.HARDWARE),
        ("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.", "proof", "node", Blame.HARDWARE),
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", "proof", "node", Blame.HARDWARE),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "likely", "node", Blame.HARDWARE),
        ("CUDA error: no CUDA-capable device is detected", "likely", "node", Blame.HARDWARE),
        ("CUDA error: system not yet initialized", "likely", "node", Blame.HARDWARE),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: unspecified launch failure", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: unknown error", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: an illegal instruction was encountered", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(...)`", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", "hint", "workers",
         Blame.UNKNOWN),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "hint", "workers", Blame.UNKNOWN),
        ("CUDA error: something that nobody has seen before", "hint", "workers", Blame.UNKNOWN),
        (NCCL.format("cuda", "ncclUnhandledCudaError: Call to CUDA function failed.",
                     "Cuda failure 719 'unspecified launch failure'"), "hint", "workers", Blame.UNKNOWN),
        (NCCL.format("cuda", "ncclUnhandledCudaError: Call to CUDA function failed.",
                     "Cuda failure 214 'uncorrectable ECC error encountered'"), "proof", "node", Blame.HARDWARE),
        (NCCL.format("system", SYSTEM_CALL, "Call to ibv_create_qp failed"), "hint", "workers", Blame.UNKNOWN),
    ],
)  # fmt: skip
def test_gpu_errors_are_sorted(message: str, certainty: str, severity: str, who: Blame) -> None:
    """Promise: each GPU error has one weight; where only the log has it, it is no proof."""
    raised = judged(message + ASYNC)
    logged = judged(log=("starting", *message.splitlines(), "Aborted"), code=None, number=signal.SIGABRT)
    for verdict, sure in ((raised, certainty), (logged, "likely" if certainty == "proof" else certainty)):
        assert (verdict.cause, verdict.certainty, verdict.severity) == (Cause.CUDA_ERROR, sure, severity)
        assert blame(verdict) is who
    assert raised.fingerprint == logged.fingerprint


def test_a_hint_never_reaches_further_than_the_workers() -> None:
    """Promise: no row of the table lets a hint send a node away."""
    assert all(row.severity is Severity.WORKERS for row in TROUBLES if row.certainty is Certainty.HINT)
    assert all(row.severity in (Severity.WORKERS, Severity.NODE) for row in TROUBLES)
    said_so = judged("CUDA error: unspecified launch failure", code=94)
    assert (said_so.severity, said_so.certainty) == (Severity.NODE, Certainty.LIKELY)


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 5 has a total capacity of 79.10 GiB", "gpu5"),
        ("RuntimeError: error on cuda:1: unspecified launch failure", "gpu1"),
        ("node7:811:902 [6] transport/net.cc:44 NCCL WARN Cuda failure 'unspecified launch failure'", "gpu6"),
        ("device 12: uncorrectable ECC error encountered", "gpu12"),
        ("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.", ""),
        ("NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.", ""),
        ("CUDA error: device-side assert triggered", ""),
        ("GPU memory 7 GiB", ""),
    ],
)
def test_the_device_is_the_one_that_the_text_names(line: str, device: str) -> None:
    """Promise: a device is named only if the text does; addresses and sizes are no devices."""
    assert named_device(line) == device


def test_memory_of_the_gpu_is_told_from_memory_of_the_host() -> None:
    """Promise: both are out of memory, and the verdict says whose."""
    gpu = judged("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 5 has a total capacity of 79.10 GiB of which")
    nccl = judged(NCCL.format("cuda", "ncclUnhandledCudaError: ...", "Cuda failure 2 'out of memory'"))
    blas = judged("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    host = judged("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")
    assert {each.cause for each in (gpu, nccl, blas, host)} == {Cause.OUT_OF_MEMORY}
    assert (gpu.device, host.device) == ("gpu5", "")
    assert "memory of gpu5, not of the host" in gpu.evidence
    assert "memory of a GPU, not of the host" in nccl.evidence
    assert "memory of a GPU, not of the host" in blas.evidence
    assert "memory of the host, not of a GPU" in host.evidence
    assert blame(gpu) is blame(host) is Blame.USER


def test_an_own_gpu_error_outweighs_the_loss_of_a_peer_only_if_it_came_first() -> None:
    """Promise: a rank whose watchdog died of a GPU error is no victim; one that lost a peer and then stumbled is."""
    aborted = "NCCL communicator was aborted on rank 3."
    assert judged(aborted, (WATCHDOG, aborted)).cause is Cause.CUDA_ERROR
    assert judged(aborted, (COLLECTIVE, "CUDA error: unspecified launch failure")).cause is Cause.PEER_LOST
    assert judged(log=(COLLECTIVE, WATCHDOG), code=None, number=signal.SIGABRT).cause is Cause.PEER_LOST
    assert judged(log=(WATCHDOG, COLLECTIVE), code=None, number=signal.SIGABRT).cause is Cause.CUDA_ERROR
    broken = (COLLECTIVE, "CUDA error: uncorrectable ECC error encountered")
    assert judged(log=broken, code=None, number=signal.SIGABRT).cause is Cause.CUDA_ERROR


@pytest.mark.parametrize(
    "last",
    [
        "socketProgress: Connection closed by remote peer node9<41234>",
        "Call to recv from 10.0.0.9<41234> failed : Connection reset by peer",
        "socketPollConnect: connect to 10.0.0.9<41234> returned Connection refused",
        "NET/IB: Got completion from peer 10.0.0.9<41234> with status=12 opcode=0 len=0 vendor err 129",
    ],
)
def test_nccls_words_for_a_peer_that_went_are_no_gpu_error(last: str) -> None:
    """Promise: the hundred ranks whose NCCL says `system error` because one went are not taken for causes."""
    message = NCCL.format("system", SYSTEM_CALL, last)
    echo = judged(message, tuple(message.splitlines()))
    assert echo.cause is Cause.PEER_LOST
    assert judged(log=tuple(message.splitlines()), code=None, number=signal.SIGABRT).cause is Cause.PEER_LOST
    root = judged("CUDA error: unspecified launch failure" + ASYNC)
    assert first_cause([echo, echo, root]) is root


@given(st.lists(st.text(max_size=60), max_size=8))
def test_any_text_can_be_read(lines: list[str]) -> None:
    """Promise: no log makes judging fail, and what is found is one of the lines."""
    found = find_cuda_error(lines)
    assert found is None or found.line == lines[found.at].strip()


def test_every_cause_has_somebody_to_act_on_it_and_hints_blame_nobody() -> None:
    """Promise: blame is a total function; words say how sure it is."""
    for cause in Cause:
        for certainty in Certainty:
            verdict = Verdict(
                node="node1", rank=3, cause=cause, severity=Severity.WORKERS, step=1, fingerprint="x",
                certainty=certainty,
            )  # fmt: skip
            assert blame_words(verdict)
            assert certainty is not Certainty.HINT or blame(verdict) is Blame.UNKNOWN
    assert blame_words(judged("CUDA error: uncorrectable ECC error encountered")).startswith("certainly hardware: ")
    assert blame_words(judged("IndexError: 5")).startswith("likely user: ")
    assert blame_words(judged(code=None, number=signal.SIGBUS)).startswith("not known whose fault: faulty memory")
