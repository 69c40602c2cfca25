"""What GPU errors look like in a message or a log, and what each of them says about its cause.

The words are those of the CUDA runtime's and driver's own error strings (HIP has the same), of cuBLAS, cuDNN and NCCL,
and of the kernel module's last words about a GPU. How each is sorted: what only a broken device can say is proof or
likely, and concerns the node; what a kernel's own mistake says is the software's; the rest is a hint that sends nobody
away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from health.verdict import Certainty, Severity


@dataclass(frozen=True)
class Trouble:
    """One kind of GPU error. A hint never reaches further than the workers.

    second_hand: said by a library that may only pass on that a peer has gone.
    """

    name: str
    pattern: re.Pattern[str]
    certainty: Certainty
    severity: Severity
    second_hand: bool = False


@dataclass(frozen=True)
class CudaError:
    """A GPU error that a text speaks of. line: where it does; at: index of that line; device: `gpu3`, or ""."""

    trouble: Trouble
    line: str
    at: int
    device: str


def _trouble(name: str, pattern: str, certainty: Certainty, severity: Severity) -> Trouble:
    return Trouble(name, re.compile(pattern, re.IGNORECASE), certainty, severity)


def _broken(name: str, pattern: str, certainty: Certainty = Certainty.LIKELY) -> Trouble:
    return _trouble(name, pattern, certainty, Severity.NODE)


def _software(name: str, pattern: str) -> Trouble:
    return _trouble(name, pattern, Certainty.LIKELY, Severity.WORKERS)


def _hint(name: str, pattern: str) -> Trouble:
    return _trouble(name, pattern, Certainty.HINT, Severity.WORKERS)


def _passed_on(name: str, pattern: str) -> Trouble:
    return replace(_hint(name, pattern), second_hand=True)


# The first row that a text matches counts: what the device says of itself comes before what NCCL makes of it.
TROUBLES: tuple[Trouble, ...] = (
    _broken("uncorrectable ECC error", r"uncorrectable ECC error encountered|cudaErrorECCUncorrectable"
            r"|ECC_UNCORRECTABLE|hipErrorECCNotCorrectable", Certainty.PROOF),
    _broken("GPU lost", r"GPU has fallen off the bus|\bGPU is lost\b|NVML_ERROR_GPU_IS_LOST|cudaErrorDeviceLost",
            Certainty.PROOF),
    _broken("NVLink error", r"uncorrectable NVLink error|cudaErrorNvlinkUncorrectable|NVLINK_UNCORRECTABLE"
            r"|\bNVLink (?:fatal )?error"),
    _broken("no device", r"no (?:CUDA|ROCm|HIP)-capable device|cudaErrorNoDevice|No (?:CUDA|HIP) GPUs are available"),
    _broken("device not ready", r"(?:CUDA|HIP) error: system not yet initialized|cudaErrorSystemNotReady"),
    _hint("device unavailable", r"busy or unavailable|(?:CUDA|HIP) error: device unavailable"
          r"|cudaErrorDevices?Unavailable|CUDA_ERROR_DEVICE_UNAVAILABLE"),
    _hint("peer memory error", r"invalid access of peer GPU memory over nvlink or a hardware error|cudaErrorContained"),
    _software("device-side assert", r"device-side assert(?!ion)|cudaErrorAssert\b|CUDA_ERROR_ASSERT"
              r"|\.(?:cu|cuh|hip):\d+: .*Assertion .* failed"),
    _software("illegal memory access", r"illegal memory access|cudaErrorIllegalAddress|CUDA_ERROR_ILLEGAL_ADDRESS"),
    _software("misaligned address", r"misaligned address|cudaErrorMisalignedAddress"),
    _software("no kernel for this device", r"no kernel image is available|invalid device function"
              r"|unsupported PTX version|unsupported toolchain"),
    _software("driver too old", r"driver version is insufficient|forward compatibility was attempted"
              r"|unsupported display driver / cuda driver combination"),
    _software("invalid launch", r"(?:CUDA|HIP) error: (?:invalid configuration argument|invalid argument"
              r"|too many resources requested for launch|invalid resource handle|peer access)"),
    _hint("unspecified launch failure", r"unspecified launch failure|cudaErrorLaunchFailure|CUDA_ERROR_LAUNCH_FAILED"),
    _hint("launch timed out", r"the launch timed out and was terminated|cudaErrorLaunchTimeout"),
    _hint("illegal instruction", r"an illegal instruction was encountered|cudaErrorIllegalInstruction"
          r"|hardware stack error|invalid program counter|operation not supported on global/shared address space"),
    _hint("unknown CUDA error", r"(?:CUDA|HIP) error: unknown error|cudaErrorUnknown|CUDA_ERROR_UNKNOWN"),
    _hint("cuBLAS error", r"(?:CU|HIP|ROC)BLAS(?:LT)?_STATUS_(?:INTERNAL_ERROR|EXECUTION_FAILED|NOT_INITIALIZED"
          r"|MAPPING_ERROR)"),
    _hint("cuDNN error", r"CUDNN_STATUS_(?:INTERNAL_ERROR|EXECUTION_FAILED|NOT_INITIALIZED|MAPPING_ERROR)"),
    _hint("CUDA error", r"\b(?:CUDA|HIP) (?:driver |runtime )?error: \w|\bCuda failure "),
    _passed_on("NCCL cuda error", r"unhandled cuda error|ncclUnhandledCudaError"),
    _passed_on("NCCL system error", r"unhandled system error|ncclSystemError"),
    _passed_on("NCCL internal error", r"NCCL error.*internal error|ncclInternalError"),
)  # fmt: skip

_DEVICE = re.compile(r"\b(?:GPU|device|cuda|hip)[ :#=]{0,2}(\d{1,3})(?!\w|[:.]\w)", re.IGNORECASE)
_NCCL_DEVICE = re.compile(r"\S+:\d+:\d+ \[(\d{1,3})\] .*NCCL")


def find_cuda_error(lines: Sequence[str]) -> CudaError | None:
    """The GPU error that these lines speak of, or None: of several the weightiest kind, and there the first line."""
    for trouble in TROUBLES:
        for at, line in enumerate(lines):
            if trouble.pattern.search(line):
                return CudaError(trouble, line.strip(), at, named_device(line))
    return None


def named_device(line: str) -> str:
    """The GPU that a line names, as `gpu3` (the process' own count), or "".

    A PCI address, which also begins with digits, is none.
    """
    found = _NCCL_DEVICE.search(line) or _DEVICE.search(line)
    return f"gpu{int(found[1])}" if found else ""
