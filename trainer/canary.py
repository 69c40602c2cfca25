"""The canary: the first loss after a load must be the one that was logged for that step before.

Checksums prove that bytes are those that were saved; this proves that they are the state that the run had.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from trainer.events import StepRecord

_TAIL_BYTES = 1 << 20


class CanaryError(Exception):
    """The loaded snapshot does not reproduce the run's own loss; the next one down the ladder is tried."""


def logged_record(metrics: Path, step: int, since_generation: int) -> StepRecord | None:
    """The row of a step that continues the history of a generation's snapshots; None if it is not near the file's end.

    Rows of older generations belong to a history that this one has replaced: on another layout, or after a fault, it
    may rightly have had other losses. Of later generations the first is nearest: it was the one that went on from here.
    """
    try:
        with metrics.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(max(0, size_bytes - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    found: StepRecord | None = None
    for line in reversed(lines):
        try:
            record = msgspec.json.decode(line, type=StepRecord)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # torn by a full disk, or cut by this very window
        if record.step == step and record.generation >= since_generation:
            found = record if found is None or record.generation < found.generation else found
    return found


def differs(expected: float, found: float, tolerance: float) -> bool:
    """Whether a loss is further from the expected one than the part `tolerance` of it (not finite: always)."""
    return not math.isfinite(found) or abs(found - expected) > tolerance * max(abs(expected), 1e-6)
