"""Measures the way to another node: fetches bytes that mean nothing from its transfer server, and drops them.

The server knows nothing of it: its `find` gives a file of this module for a reference that no shard has. So what is
measured is what copies and gatherings really use, proofs, checksums and priorities included.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from checkpointing.checksum import Checksum, checksum
from checkpointing.copies import Located
from checkpointing.layout import ShardRef
from checkpointing.segment import Control
from checkpointing.transfer_auth import RequestHead
from checkpointing.transfer_link import CutError, Link, TransferError
from checkpointing.transfer_wire import decode_control, shard_path

PROBE_REF = ShardRef(generation=0, step=0, rank=10**17)
PROBE_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
_TRIES = 2


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """problem: why nothing came, "" if it did. latency_s: to connect and be answered once. mb_per_s: -1: not asked."""

    problem: str = ""
    latency_s: float = -1.0
    mb_per_s: float = -1.0


def make_probe() -> Located:
    """What answers for PROBE_REF: an anonymous file in memory that lives as long as this process."""
    data = bytes(range(256)) * (PROBE_BYTES // 256)
    control = Control(
        step=PROBE_REF.step, generation=PROBE_REF.generation, rank=PROBE_REF.rank, world_size=1,
        size_bytes=len(data), checksum=checksum(data), layout="0" * 32,
    )  # fmt: skip
    fd = os.memfd_create("everstep-probe")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return Located(Path(f"/proc/self/fd/{fd}"), 0, control)


def measure(address: str, key: bytes, for_s: float, timeout_s: float) -> Measured:
    """Fetch from "host:port" for at least for_s seconds (0: only see whether it answers).

    timeout_s: how long the node may say nothing. However slow the way is, it ends after for_s + timeout_s.
    """
    words = ""
    for _ in range(_TRIES):
        begun_s = time.monotonic()
        try:
            with contextlib.closing(Link(address, key, timeout_s)) as link:
                latency_s = time.monotonic() - begun_s
                return Measured(latency_s=latency_s, mb_per_s=_speed(link, for_s, timeout_s) if for_s > 0 else -1.0)
        except CutError as error:
            words = str(error)
        except TransferError as error:
            return Measured(problem=str(error).removeprefix(f"{address}: "))
    return Measured(problem=words)


def _speed(link: Link, for_s: float, timeout_s: float) -> float:
    """MB/s, from the first byte on. TransferError if the bytes that came are not those that were sent."""
    begun_s = time.monotonic()
    done_bytes, piece = 0, memoryview(bytearray(_PIECE_BYTES))
    while time.monotonic() - begun_s < for_s:
        link.send_head(RequestHead(method="GET", path=shard_path(PROBE_REF), counter=link.next_counter()))
        try:
            control = decode_control(link.answer().control, PROBE_REF)
        except ValueError as error:
            raise TransferError(f"{link.address}: sent no proper answer ({error})") from error
        running, left_bytes = Checksum(), control.size_bytes
        while left_bytes:
            part = link.read_into(piece[: min(len(piece), left_bytes)])
            running.update(part)
            left_bytes -= len(part)
            done_bytes += len(part)
            if time.monotonic() - begun_s > for_s + timeout_s:
                return done_bytes / 1e6 / (time.monotonic() - begun_s)
        if running.hex() != control.checksum:
            raise TransferError(f"{link.address}: the bytes that came are not those that were sent")
    return done_bytes / 1e6 / (time.monotonic() - begun_s)
