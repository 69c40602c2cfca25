"""What a worker tells the world: its heartbeat slot, step records and facts. No torch here.

A heartbeat is one fixed-size record in a file that worker and agent both map: writing it is a memory store, no
system call, no lock. A sequence number that is odd during a write lets the reader reject a torn read.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import struct
import time
from collections import deque
from pathlib import Path

import msgspec


class Phase(enum.IntEnum):
    """Where in its life a worker is; values grow along one step."""

    STARTING = 0
    BUILDING = 1
    LOADING = 2
    DATA = 3
    FORWARD_BACKWARD = 4
    VOTE = 5
    OPTIMIZER = 6
    VALIDATION = 7
    SNAPSHOT = 8
    FINISHED = 9


class Beat(msgspec.Struct, frozen=True):
    """One heartbeat: the phase entered last, in which step, when, and how long the last whole step took."""

    step: int
    phase: Phase
    monotonic_s: float
    last_step_s: float
    generation: int


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """All that an agent tells a worker it starts, beside torch elastic's environment.

    ram_step: the step that every rank's own RAM tier holds whole and verified, -1 if none; tried first.
    ram_dir: the node's folder in shared memory (segments, heartbeat slots, error files).
    rejected: snapshots (generation, step) that a loss has shown to be wrong, never to be loaded again. abandoned: what
    no snapshot of this or an earlier generation may be beyond. left_out: ranges (first, count) of batches that no step
    reads. All three: see `trainer.history`.
    peers: `host:port` of agents that may hold copies of this node's shards.
    wait_for_copies: whether anybody may ever take copies of this node's snapshots. node_dir: the node's folder on its
    own disk, "" if it has none.
    """

    run_dir: str
    node: str
    generation: int
    ram_dir: str
    ram_step: int
    rejected: tuple[tuple[int, int], ...] = ()
    abandoned: tuple[tuple[int, int], ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    peers: tuple[str, ...] = ()
    wait_for_copies: bool = False
    node_dir: str = ""


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where one rank's time went in one step. Seconds; computing is net of the time spent waiting for other ranks.

    wait_s: exposed communication, the time in which this rank stood still for another one. snapshot_s: standing still
    for the copy of the state. total_s: the whole step; what is not in the parts is in none of them.
    """

    step: int
    data_s: float
    forward_s: float
    backward_s: float
    wait_s: float
    optimizer_s: float
    snapshot_s: float
    total_s: float


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of metrics.jsonl. None means not known or not finite, never zero.

    t_wall_s: when the step ended, the validation after it included, which step_s is without. batch: position of the
    batch that it read, 0 if that is not known.
    """

    step: int
    steps: int
    generation: int
    t_wall_s: float
    step_s: float
    data_s: float
    stall_s: float
    loss_avg: float | None
    loss_max: float | None
    grad_norm: float | None
    lr: float
    tokens_seen: int
    tokens_per_sec_per_gpu: float
    tflops_per_gpu: float | None = None
    mfu_pct: float | None = None
    memory_gib: float | None = None
    memory_pct: float | None = None
    skipped: bool = False
    validation_loss: float | None = None
    validation_s: float = 0.0
    batch: int = 0


class Oddity(enum.StrEnum):
    """What can be wrong with numbers; the words are those of `health.verdict.Cause`."""

    NONFINITE = "nonfinite"
    SPIKE = "spike"
    BAD_LAYER = "bad_layer"
    EXPERT_COLLAPSE = "expert_collapse"


class FactKind(enum.StrEnum):
    """Things worth the journal that a worker or a node's snapshot store noticed."""

    GATHERED = "gathered"
    LOADING = "loading"
    LOADED = "loaded"
    SNAPSHOT_REJECTED = "snapshot_rejected"
    MEMORY_REJECTED = "memory_rejected"
    SNAPSHOT_COMMITTED = "snapshot_committed"
    SNAPSHOT_FAILED = "snapshot_failed"
    SNAPSHOT_DISTRUSTED = "snapshot_distrusted"
    SNAPSHOT_REPAIRED = "snapshot_repaired"
    SNAPSHOT_IN_S3 = "snapshot_in_s3"
    TIER_BEHIND = "tier_behind"
    TIER_CAUGHT_UP = "tier_caught_up"
    UPDATE_SKIPPED = "update_skipped"
    UPDATE_REPLAYED = "update_replayed"
    CORRUPTION_FOUND = "corruption_found"
    NUMBERS_ODD = "numbers_odd"
    ROLLBACK_WANTED = "rollback_wanted"
    FIRST_STEP = "first_step"
    STOPPING = "stopping"


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """A single observation, in one line of words, with the step and seconds it is about.

    oddity: what is wrong, where it is about numbers. batches: how many are to be left out, from the step's own on.
    blamed: the rank that is proven to be the cause, -1 if none is.
    """

    kind: FactKind
    node: str
    rank: int
    generation: int
    step: int
    t_wall_s: float
    detail: str = ""
    seconds: float = 0.0
    oddity: Oddity | None = None
    batches: int = 0
    blamed: int = -1


class WorkerError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a worker ended, written by itself just before it exits: the agent's evidence."""

    rank: int
    step: int
    phase: Phase
    type: str
    message: str
    traceback: str
    exit_code: int


_SLOT = struct.Struct("<QqqddqQ")
SLOT_SIZE_BYTES = 64


class HeartbeatFile:
    """Heartbeat slots of one node: `local_ranks` slots of 64 bytes in one mapped file."""

    def __init__(self, path: Path, local_ranks: int) -> None:
        self.path = path
        self.local_ranks = local_ranks
        self._map: mmap.mmap | None = None

    def open(self) -> HeartbeatFile:
        """Create the file if it is absent, and map it."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, self.local_ranks * SLOT_SIZE_BYTES)
            self._map = mmap.mmap(fd, self.local_ranks * SLOT_SIZE_BYTES)
        finally:
            os.close(fd)
        return self

    def close(self) -> None:
        """Unmap."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def write(self, local_rank: int, beat: Beat) -> None:
        """Publish a beat. One writer a slot."""
        assert self._map is not None
        offset = local_rank * SLOT_SIZE_BYTES
        sequence = struct.unpack_from("<Q", self._map, offset)[0] | 1
        struct.pack_into("<Q", self._map, offset, sequence)
        _SLOT.pack_into(
            self._map, offset, sequence, beat.step, int(beat.phase), beat.monotonic_s, beat.last_step_s,
            beat.generation, sequence + 1,
        )  # fmt: skip
        struct.pack_into("<Q", self._map, offset, sequence + 1)

    def read(self, local_rank: int) -> Beat | None:
        """The latest whole beat, or None if there is none yet or a write was cut off."""
        assert self._map is not None
        offset = local_rank * SLOT_SIZE_BYTES
        for _ in range(100):
            before, step, phase, monotonic_s, last_step_s, generation, tail = _SLOT.unpack_from(self._map, offset)
            after = struct.unpack_from("<Q", self._map, offset)[0]
            if before == after == tail and before % 2 == 0 and before > 0:
                return Beat(step, Phase(phase), monotonic_s, last_step_s, generation)
        return None


class Heart:
    """A worker's side of its slot."""

    def __init__(self, slots: HeartbeatFile, local_rank: int, generation: int) -> None:
        self.slots = slots
        self.local_rank = local_rank
        self.generation = generation
        self.step = 0
        self.phase = Phase.STARTING
        self.last_step_s = 0.0

    def beat(self, phase: Phase, step: int | None = None, last_step_s: float | None = None) -> None:
        """Say that a phase begins."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.last_step_s = self.last_step_s if last_step_s is None else last_step_s
        self.slots.write(self.local_rank, Beat(self.step, phase, time.monotonic(), self.last_step_s, self.generation))


def append_line(path: Path, record: msgspec.Struct) -> None:
    """Append one record as a JSON line, in a single write so that lines of several writers never mix.

    Raises OSError if it could not be written whole.
    """
    LineFile(path).write(record)


class LineFile:
    """A file of JSON lines with one writer, which a full disk delays and does not break.

    Lines that wait die with the process: what reads them must bear a gap.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._torn = _ends_torn(path)

    def keep(self, record: msgspec.Struct) -> OSError | None:
        """Append the record, or keep it in memory until a later call finds room; returns what was in the way."""
        try:
            self.write(record)
        except OSError as error:
            return error
        return None

    def write(self, record: msgspec.Struct) -> None:
        """Append the record behind all that still waits. Raises OSError, and the line waits, if there is no room."""
        self._waiting.append(msgspec.json.encode(record) + b"\n")
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            while self._waiting:
                # Behind a line that was cut off, a fresh one begins: readers skip the torn one.
                line = (b"\n" if self._torn else b"") + self._waiting[0]
                written = os.write(fd, line)
                self._torn = 0 < written < len(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                self._waiting.popleft()
        finally:
            os.close(fd)


def _ends_torn(path: Path) -> bool:
    """Whether an earlier writer left a line cut off at the end."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False
