"""What goes on in a run at this very moment, seen from outside: its shared memory, its folders, its heartbeats."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME
from checkpointing.segment import CONTROL_BYTES, Control, SlotState, parse_segment_name, unpack_control
from trainer.events import HeartbeatFile, Phase
from trainer.paths import copies_dir, heartbeat_path, segments_dir

_POLL_S = 0.0005
_HELD_OFFSET = 256


class Slot:
    """A slot or copy in shared memory as it looks now."""

    def __init__(self, node: str, path: Path, block: bytes) -> None:
        self.node = node
        self.path = path
        self.held = bool(block[_HELD_OFFSET])
        self.state, self.control = unpack_control(block)

    @property
    def whole(self) -> Control | None:
        """What it holds, if it is whole."""
        return self.control if self.state in (SlotState.COMPLETE, SlotState.TO_PERSIST) else None

    @property
    def local_rank(self) -> int:
        """Of an own slot."""
        named = parse_segment_name(self.path.name)
        assert named is not None
        return named[0]


class Instants:
    """Looks at one run. ram_root: its folder in shared memory."""

    def __init__(self, run_dir: Path, ram_root: Path, ranks_per_node: int) -> None:
        self.run_dir = run_dir
        self.ram_root = ram_root
        self.ranks_per_node = ranks_per_node
        self._had_manifest: set[int] = set()

    def slots(self) -> Iterator[Slot]:
        """Every node's own slots."""
        for node in _names(self.ram_root):
            yield from _look(node, segments_dir(self.ram_root / node), "snapshot-")

    def copies(self) -> Iterator[Slot]:
        """Whole copies that nodes keep for others."""
        for node in _names(self.ram_root):
            yield from _look(node, copies_dir(self.ram_root / node), "copy-")

    def staging(self) -> bool:
        """A worker copies its state into memory."""
        return any(slot.state is SlotState.STAGING for slot in self.slots())

    def replicating(self) -> bool:
        """A slot is being sent to a peer."""
        return any(slot.held for slot in self.slots())

    def persisting(self) -> bool:
        """A shard is on its way to a disk."""
        return any(slot.state is SlotState.TO_PERSIST for slot in self.slots())

    def writing(self) -> bool:
        """A shard's file in the run directory is half there."""
        return any(name.endswith(".tmp") for _, names in self._steps() for name in names)

    def committing(self) -> bool:
        """All shards of a step are there, or some, and no manifest yet."""
        return any(MANIFEST_NAME not in names and any(n.endswith(".json") for n in names) for _, names in self._steps())

    def verifying(self) -> bool:
        """A snapshot is committed, and not all of it has been read back."""
        for _, names in self._steps():
            marks = sum(name.endswith(".verified") for name in names)
            if MANIFEST_NAME in names and marks < sum(name.endswith(".safetensors") for name in names):
                return True
        return False

    def pruning(self) -> bool:
        """A snapshot that was there when this was asked last has lost its manifest."""
        now = {step for step, names in self._steps() if MANIFEST_NAME in names}
        gone, self._had_manifest = self._had_manifest - now, now
        return bool(gone)

    def gathering(self) -> bool:
        """A shard is being fetched for a rank that lacks it."""
        return any(
            name.startswith("gathered-") for node in _names(self.ram_root) for name in _names(self.ram_root / node)
        )

    def in_phase(self, phase: Phase, after_generation: int) -> bool:
        """A worker of a generation after that one is in a phase."""
        for node in _names(self.ram_root):
            path = heartbeat_path(self.ram_root / node)
            if not path.exists() or path.stat().st_size == 0:
                continue
            beats = HeartbeatFile(path, self.ranks_per_node).open()
            try:
                found = [beats.read(local_rank) for local_rank in range(self.ranks_per_node)]
            finally:
                beats.close()
            if any(beat and beat.phase is phase and beat.generation > after_generation for beat in found):
                return True
        return False

    def _steps(self) -> Iterator[tuple[int, list[str]]]:
        for step in disk.all_steps(self.run_dir):
            yield step, _names(disk.step_dir(self.run_dir, step))


def wait_for(instant: Callable[[], bool], timeout_s: float) -> bool:
    """Look all the time until it is there; False if it did not come."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # it went while it was looked at
            if instant():
                return True
        pause.wait(_POLL_S)
    return False


def _look(node: str, folder: Path, prefix: str) -> Iterator[Slot]:
    for name in _names(folder):
        if name.startswith(prefix) and name.endswith(".seg"):
            try:
                with open(folder / name, "rb", buffering=0) as file:
                    block = file.read(CONTROL_BYTES)
            except FileNotFoundError:
                continue
            if len(block) == CONTROL_BYTES:
                yield Slot(node, folder / name, block)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
