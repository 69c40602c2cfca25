"""The node's RAM tier as the agent sees it: finding slots, verifying them, putting a fetched one among them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from checkpointing.checksum import checksum_range
from checkpointing.copies import Located
from checkpointing.layout import HeldShard, ShardRef, Tier
from checkpointing.segment import (
    CONTROL_BYTES,
    READABLE,
    SLOTS,
    Control,
    SlotState,
    parse_segment_name,
    read_control,
    segment_name,
)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A slot's descriptor, for reading and for handing it over."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def segment_paths(ram_dir: Path, with_unfinished: bool = False) -> list[Path]:
    """Every slot in a node's folder, by name; half-made ones only if asked for."""
    try:
        names = sorted(os.listdir(ram_dir))
    except FileNotFoundError:
        return []
    return [
        ram_dir / name
        for name in names
        if parse_segment_name(name) is not None and (with_unfinished or not name.endswith(".tmp"))
    ]


def slots_to_persist(ram_dir: Path) -> list[Path]:
    """Slots that wait for the agent, oldest snapshot first."""
    waiting = []
    for path in segment_paths(ram_dir):
        state, control = _look_at(path)
        if state is SlotState.TO_PERSIST:
            waiting.append((control.age if control else (-1, -1), path))
    return [path for _, path in sorted(waiting)]


def verified_slot(path: Path) -> HeldShard | None:
    """What a slot holds if every byte of it is right, and stayed right while it was read."""
    with contextlib.suppress(FileNotFoundError), opened(path) as fd:
        state, control = read_control(fd)
        if state not in READABLE or control is None:
            return None
        found = checksum_range(fd, CONTROL_BYTES, control.size_bytes)
        state, now = read_control(fd)
        if found == control.checksum and state in READABLE and now == control:
            return held_shard(control, Tier.RAM)
    return None


def held_shard(control: Control, tier: Tier) -> HeldShard:
    """What a control block says, for an inventory."""
    return HeldShard(
        rank=control.rank,
        world_size=control.world_size,
        step=control.step,
        generation=control.generation,
        layout=control.layout,
        tier=tier,
    )


def find_slot(ram_dir: Path, ref: ShardRef) -> Located | None:
    """Where a slot with this shard is, if there is one. Whoever reads it verifies it."""
    for path in segment_paths(ram_dir):
        state, control = _look_at(path)
        if state in READABLE and control and ShardRef(control.generation, control.step, control.rank) == ref:
            return Located(path, CONTROL_BYTES, control)
    return None


def adopt_segment(ram_dir: Path, segment: Path, control: Control, local_rank: int) -> None:
    """Rename a whole, verified segment file over the least valuable slot of a local rank.

    An older copy of the same shard goes first, then a slot that holds nothing, then the oldest; never the newest of
    another snapshot, never one that waits to be persisted. The worker must not run. OSError if it cannot be renamed,
    ValueError if the file is not what `control` says.
    """
    with opened(segment) as fd:
        if read_control(fd) != (SlotState.COMPLETE, control):
            raise ValueError(f"{segment.name} is not a whole segment of step {control.step}, rank {control.rank}")
    slots = {slot: _look_at(ram_dir / segment_name(local_rank, slot)) for slot in _slot_numbers(ram_dir, local_rank)}
    whole = {slot: held for slot, (state, held) in slots.items() if state in READABLE and held is not None}
    newest = max(whole, key=lambda slot: whole[slot].age, default=-1)
    same = [slot for slot, held in whole.items() if (held.age, held.rank) == (control.age, control.rank)]
    free = [
        (slot not in same, whole[slot].age if slot in whole else (-1, -1), slot)
        for slot, (state, _) in slots.items()
        if state is not SlotState.TO_PERSIST and (slot != newest or slot in same)
    ]
    assert free, "more than one slot waits to be persisted"
    segment.replace(ram_dir / segment_name(local_rank, min(free)[2]))


def _slot_numbers(ram_dir: Path, local_rank: int) -> list[int]:
    there = [parse_segment_name(path.name) for path in segment_paths(ram_dir)]
    return sorted({named[1] for named in there if named and named[0] == local_rank} | set(range(SLOTS)))


def _look_at(path: Path) -> tuple[SlotState, Control | None]:
    try:
        with opened(path) as fd:
            return read_control(fd)
    except FileNotFoundError:
        return SlotState.EMPTY, None
