"""Marks in the run directory: an empty file beside a shard says that its bytes were read back from the disk, whole.

Only retention believes a mark, and only to remove older snapshots; whoever loads reads the bytes again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from checkpointing import disk
from checkpointing.layout import Manifest, mark_name


def leave_mark(folder: Path, generation: int, rank: int) -> None:
    """Say that a shard in a step's folder has verified. OSError if the disk refuses."""
    os.close(os.open(folder / mark_name(generation, rank), os.O_WRONLY | os.O_CREAT, 0o644))
    disk.sync_dir(folder)


def remove_mark(folder: Path, generation: int, rank: int) -> None:
    """Say that a shard cannot be trusted any more, as far as the disk lets us."""
    with contextlib.suppress(OSError):  # a mark that stays only makes retention wait for one snapshot more
        (folder / mark_name(generation, rank)).unlink(missing_ok=True)


def all_marked(folder: Path, generation: int, ranks: Iterable[int]) -> bool:
    """Whether these ranks' shards have all verified. OSError if the folder cannot be read."""
    return {mark_name(generation, rank) for rank in ranks} <= set(os.listdir(folder))


def is_marked(folder: Path, manifest: Manifest) -> bool:
    """The same for all shards of a snapshot; a folder that cannot be read has no marks."""
    with contextlib.suppress(OSError):
        return all_marked(folder, manifest.generation, (shard.rank for shard in manifest.shards))
    return False
