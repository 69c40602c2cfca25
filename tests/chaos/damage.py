"""Damage done to snapshots, wherever they lie, and what became of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, ShardRef, parse_shard_name, parse_step_dir
from checkpointing.node_disk import NodeDisk
from checkpointing.segment import CONTROL_BYTES, Control
from checkpointing.verify import verify_snapshot
from tests.chaos.instants import Slot

Age = tuple[int, int]
_CONTROL_IN_USE_BYTES = 344


@dataclass(frozen=True)
class Damage:
    """One file that was made bad. digest: of what it holds since then, "" if it was removed. noticed: whether who
    looks through its tier now calls it damaged."""

    what: str
    path: Path
    digest: str
    noticed: Callable[[], bool] = lambda: False

    @property
    def undone(self) -> bool:
        """Whether it was repaired, overwritten or removed since then."""
        return _digest(self.path) != self.digest or (self.digest == "" and not self.path.parent.exists())


def good_snapshots(run_dir: Path) -> dict[int, Age]:
    """Ages of the snapshots in the run directory whose every byte verifies now, by step."""
    ages = {step: (generation, step) for generation, step in disk.committed_ages(run_dir)}
    return {step: age for step, age in ages.items() if not verify_snapshot(run_dir, step)}


def flip_bit(path: Path, offset: int, dice: random.Random) -> None:
    """Invert one bit in place."""
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ (1 << dice.randrange(8))]), offset)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """SIGSTOP for a moment: nothing may be written over what is being damaged, or it would get a right checksum."""
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(1000):
            if _all_stopped(pid):
                break
            threading.Event().wait(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _all_stopped(pid: int) -> bool:
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return all(state in "TXZ" for state in states)


def damage_segment(slot: Slot, control: Control, part: str, dice: random.Random) -> str:
    """Flip a bit of a whole slot or copy whose owner is paused; returns what was done, "" if it is another by now."""
    with slot.path.open("rb", buffering=0) as file:
        now = Slot(slot.node, slot.path, file.read(CONTROL_BYTES))
    if now.whole != control:
        return ""
    header_bytes = 8 + int.from_bytes(_read(slot.path, CONTROL_BYTES, 8), "little")
    offset = {
        "control block": dice.randrange(_CONTROL_IN_USE_BYTES),
        "header": CONTROL_BYTES + dice.randrange(header_bytes),
        "body": CONTROL_BYTES + dice.randrange(header_bytes, control.size_bytes),
    }[part]
    flip_bit(slot.path, offset, dice)
    return f"a bit at {offset} ({part}) of {slot.path.name} on {slot.node}, step {control.step}, rank {control.rank}"


def noticed_in_run(run_dir: Path, path: Path) -> Callable[[], bool]:
    """Whether verifying the snapshot that a file is of finds a problem."""
    step = parse_step_dir(path.parent.name)
    assert step is not None
    return lambda: bool(verify_snapshot(run_dir, step))


def noticed_on_node(node_dir: Path, path: Path) -> Callable[[], bool]:
    """Whether the shard that a file is of is left out of what its node says it holds."""
    step, named = parse_step_dir(path.parent.name), parse_shard_name(path.name)
    assert step is not None
    assert named is not None
    ref = ShardRef(named[0], step, named[1])
    return lambda: ref not in [shard.ref for shard in NodeDisk(node_dir).held()]


def damage_file(path: Path, how: str, dice: random.Random, noticed: Callable[[], bool]) -> Damage | None:
    """Flip a bit of a file, cut it off or remove it; None if it went before that."""
    try:
        size = path.stat().st_size
        match how:
            case "flipped":
                flip_bit(path, dice.randrange(size), dice)
            case "truncated":
                os.truncate(path, dice.randrange(size))
            case "removed":
                path.unlink()
        return Damage(f"{path.parent.name}/{path.name} {how}", path, _digest(path), noticed)
    except FileNotFoundError:
        return None


def shard_files(folder: Path) -> list[Path]:
    """Shards and sidecars below a folder of steps, those of a node's disk for instance."""
    found = []
    for path in folder.glob("step-*/*"):
        if parse_step_dir(path.parent.name) is not None and parse_shard_name(path.name) and path.suffix != ".tmp":
            found.append(path)
    return sorted(path for path in found if path.suffix in (".safetensors", ".json"))


def snapshot_files(run_dir: Path, step: int, which: str) -> list[Path]:
    """The manifest, or the shards that it names, of a step in the run directory."""
    folder = disk.step_dir(run_dir, step)
    if which == "manifest":
        return [folder / MANIFEST_NAME]
    return [folder / shard.file for shard in disk.read_manifest(run_dir, step).shards]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
