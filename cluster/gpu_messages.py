"""What an agent's GPU probe says on its standard output, one JSON line each, and what it is told at its start."""

from __future__ import annotations

import msgspec

from health.gpu_facts import GpuSample, XidEvent

MAX_LINE_BYTES = 1 << 16


class ProbeStart(msgspec.Struct, frozen=True, kw_only=True):
    """How to probe. ranks: how many local ranks the node has. visible: the entries of CUDA_VISIBLE_DEVICES, None if
    it is not set. timeout_s: a call that takes longer is said to hang."""

    interval_s: float
    timeout_s: float
    ranks: int
    visible: tuple[str, ...] | None


class GpuDevice(msgspec.Struct, frozen=True):
    """One GPU: the driver's number of it, and the local rank that it serves."""

    index: int
    uuid: str
    name: str
    local_rank: int


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The driver answers; these GPUs are watched. events: whether XIDs will be told."""

    driver: str
    devices: tuple[GpuDevice, ...]
    events: bool


class Absent(msgspec.Struct, frozen=True, tag="absent"):
    """There is nothing to probe, and why: the last line."""

    reason: str


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """A call to the driver has not returned for this long. index -1: it is about no GPU in particular."""

    call: str
    index: int
    for_s: float


ProbeLine = Hello | Absent | Waiting | GpuSample | XidEvent

_decoder = msgspec.json.Decoder(ProbeLine)


def decode_line(line: bytes) -> ProbeLine:
    """One line of a probe.

    Raises:
        ValueError: if it is none.
    """
    return _decoder.decode(line)
