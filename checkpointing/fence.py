"""The fence in the run directory: from which generation on a node may commit a snapshot there.

Whoever plans generations raises it before a new one begins. A node that was cut off never hears of that generation, so
what it writes is never committed, even if it finds the run directory again before it finds out that it was given up.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from checkpointing.disk import write_atomic
from checkpointing.layout import GARBLED

FENCE_NAME = "fence.json"


class Fence(msgspec.Struct, frozen=True):
    """The newest generation that was planned."""

    generation: int


def raise_fence(run_dir: Path, generation: int) -> None:
    """Let nobody commit any more who knows only older generations. It is never lowered. OSError."""
    if generation > fenced_below(run_dir):
        write_atomic(run_dir / FENCE_NAME, msgspec.json.encode(Fence(generation)))


def fenced_below(run_dir: Path) -> int:
    """The generation that a node must have heard of to commit; -1 if all may, as no fence can be read.

    A damaged fence keeps nobody out: a generation that is over loses to its successor by its number, too.
    """
    try:
        return msgspec.json.decode((run_dir / FENCE_NAME).read_bytes(), type=Fence).generation
    except (OSError, *GARBLED):
        return -1
