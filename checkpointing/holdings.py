"""Which shards lie in memory and on the disk of the nodes of this machine, as far as names and headers say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from checkpointing.layout import SnapshotDamagedError, Tier
from checkpointing.node_disk import NodeDisk
from checkpointing.segment import READABLE, Control, read_control
from checkpointing.slots import opened


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier holds of one snapshot. ranks: whose shards, in order; size_bytes: of these. Nothing has been read."""

    tier: Tier
    step: int
    generation: int
    world_size: int
    ranks: tuple[int, ...]
    size_bytes: int


def memory_holdings(segments: Iterable[Path], tier: Tier) -> list[Holding]:
    """Snapshots in segment files (slots of workers, or copies for peers), newest first."""
    found = []
    for path in segments:
        with contextlib.suppress(OSError), opened(path) as fd:
            state, control = read_control(fd)
            if state in READABLE and control is not None:
                found.append(control)
    return _grouped(found, tier)


def disk_holdings(disks: Iterable[NodeDisk]) -> list[Holding]:
    """Snapshots on nodes' own disks, newest first."""
    found = []
    for node_disk in disks:
        for ref in node_disk.refs():
            with contextlib.suppress(OSError, SnapshotDamagedError):
                found.append(node_disk.control(ref))
    return _grouped(found, Tier.NODE)


def node_disks(root: Path) -> list[NodeDisk]:
    """Those of the nodes that have run on this machine, below the run's folder on its disk."""
    try:
        return [NodeDisk(root / name) for name in sorted(os.listdir(root)) if (root / name).is_dir()]
    except OSError:
        return []


def _grouped(controls: Sequence[Control], tier: Tier) -> list[Holding]:
    groups: dict[tuple[int, int, int], dict[int, int]] = {}
    for control in controls:
        groups.setdefault((*control.age, control.world_size), {})[control.rank] = control.size_bytes
    return [
        Holding(
            tier=tier,
            step=step,
            generation=generation,
            world_size=world_size,
            ranks=tuple(sorted(sizes)),
            size_bytes=sum(sizes.values()),
        )
        for (generation, step, world_size), sizes in sorted(groups.items(), reverse=True)
    ]
