"""What a worker tells the world: its heartbeat slot, step records and facts. No torch here.

A heartbeat is one record in shared memory (`trainer.mappedslots`): no system call, no lock.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from collections import deque
from pathlib import Path

import msgspec

from configs.shrinking import Layout
from trainer.mappedslots import MappedSlots


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


class Beat(msgspec.Struct, frozen=True, array_like=True, gc=False):
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
    own disk, "" if it has none. layout: the mesh of this generation, None for the configuration's own. recipe: what the
    supervisor has lowered the precision recipe to, "" for the configured.
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
    layout: Layout | None = None
    recipe: str = ""


class StepTimes(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
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
    batch that it read, 0 if that is not known. z_loss: what was minimised beside the loss. expert_*: see
    `trainer.layers.Balance`, at the last look since the row before. ranks: how many computed it, 0 in lines of before
    that could change. mfu_pct is against the card's bf16 peak, mfu_recipe_pct against that of the recipe's own format,
    where it is less than bf16. recipe: what was computed in, "" if that is not known; converted: how many matrices of
    the model are multiplied in it.
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
    z_loss: float | None = None
    expert_entropy: float | None = None
    expert_max_over_mean: float | None = None
    ranks: int = 0
    mfu_recipe_pct: float | None = None
    recipe: str = ""
    converted: int = 0


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
    PRECISION = "precision"
    STOPPING = "stopping"
    EVALUATED = "evaluated"
    EVALUATION_FAILED = "evaluation_failed"


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """A single observation, in one line of words, with the step and seconds it is about.

    oddity: what is wrong, where it is about numbers. batches: how many are to be left out, from the step's own on.
    blamed: the rank that is proven to be the cause, -1 if none is. mended: nothing of it is left, training goes on.
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
    mended: bool = False


class WorkerError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a worker ended, written by itself just before it exits: the agent's evidence."""

    rank: int
    step: int
    phase: Phase
    type: str
    message: str
    traceback: str
    exit_code: int


SLOT_SIZE_BYTES = 64


class HeartbeatFile:
    """Heartbeat slots of one node: `local_ranks` slots of 64 bytes in one mapped file."""

    def __init__(self, path: Path, local_ranks: int) -> None:
        self.path = path
        self.local_ranks = local_ranks
        self._slots = MappedSlots(path, local_ranks, "qqddq", SLOT_SIZE_BYTES)

    def open(self) -> HeartbeatFile:
        """Create the file if it is absent, and map it."""
        self._slots.open()
        return self

    def close(self) -> None:
        """Unmap."""
        self._slots.close()

    def write(self, local_rank: int, beat: Beat) -> None:
        """Publish a beat. One writer a slot."""
        self._slots.write(
            local_rank, beat.step, int(beat.phase), beat.monotonic_s, beat.last_step_s, beat.generation
        )  # fmt: skip

    def read(self, local_rank: int) -> Beat | None:
        """The latest whole beat, or None if there is none yet or a write was cut off."""
        found = self._slots.read(local_rank)
        if found is None:
            return None
        step, phase, monotonic_s, last_step_s, generation = found
        return Beat(step, Phase(phase), monotonic_s, last_step_s, generation)


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
