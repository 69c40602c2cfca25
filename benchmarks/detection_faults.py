"""The faults of `benchmarks.detection`: how each is done to a running job, and what should come of it."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.events import GenerationPlanned
from health.verdict import Cause
from tests.chaos import faults
from tests.chaos.flips import flip_state
from tests.chaos.jobs import Job
from tests.chaos.plants import Plant, plant
from tests.fake_gpus import FakeGpus

RANKS = 4
RANKS_PER_NODE = 2
REPLAY_STEPS = 4
CHECK_STEPS = 1
_QUIET_STEPS = 60
_SLOW_STEPS = 20
_SLOWER_S = 0.5


@dataclass(frozen=True)
class Struck:
    """What was done: when (wall clock), in which step, to which rank of which node."""

    t_wall_s: float
    step: int
    node: str
    rank: int


@dataclass(frozen=True)
class Aim:
    """What should come of it. rank_matters: the verdict names a rank, not only a node. within: the aim, in words."""

    causes: frozenset[Cause]
    actions: frozenset[str]
    within: str
    rank_matters: bool = True


class Fault(Protocol):
    """One kind of fault."""

    name: str
    aim: Aim
    overrides: tuple[str, ...]

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """Before the job starts."""

    def strike(self, job: Job, number: int, dice: random.Random) -> contextlib.AbstractContextManager[Struck]:
        """Do it for the number-th time (from 0), in a running job; it may go on until the context is left."""


def members(job: Job) -> tuple[str, ...]:
    """The nodes that hold ranks now, by rank."""
    return [event for event in job.events() if isinstance(event, GenerationPlanned)][-1].nodes


def last_step(job: Job) -> int:
    """The newest step that was logged."""
    return job.steps()[-1].step


def _anybody(job: Job, dice: random.Random) -> tuple[str, int]:
    rank = dice.randrange(RANKS)
    return members(job)[rank // RANKS_PER_NODE], rank


class Signalled:
    """A signal to a worker: SIGKILL ends it, after SIGSTOP everybody waits for it."""

    overrides: tuple[str, ...] = ()

    def __init__(self, name: str, number: signal.Signals, cause: Cause, within: str) -> None:
        self.name = name
        self.number = number
        self.aim = Aim(frozenset({cause}), frozenset({"restart", "replace"}), within)

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault."""

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault."""
        node, rank = _anybody(job, dice)
        victim = faults.rank_process(job.run_dir, node, rank)
        faults.wait_a_part_of_a_step(job, dice)
        struck = Struck(time.time(), last_step(job) + 1, node, rank)
        victim.send_signal(self.number)
        yield struck


class NodeDead:
    """A node falls silent as a whole: nobody reports an exit."""

    name = "a node dies"
    aim = Aim(frozenset({Cause.NODE_LOST}), frozenset({"replace"}), "3 s", rank_matters=False)
    overrides: tuple[str, ...] = ()

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault."""

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault. Frozen, not killed: the local scheduler would see a dead process at once, no real one does."""
        node, rank = _anybody(job, dice)
        faults.wait_a_part_of_a_step(job, dice)
        struck = Struck(time.time(), last_step(job) + 1, node, rank)
        faults.freeze_node(job.run_dir, node)
        yield struck


class Slowed:
    """The forward of one rank takes longer for a while: far more than 20% of a step, as noise here is as large."""

    name = "a rank is slow"
    aim = Aim(frozenset({Cause.STRAGGLER}), frozenset({"nothing", "replace"}), "3 steps")
    overrides: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.plants: list[Plant] = []

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault."""
        self.plants = [
            Plant(rank=dice.randrange(RANKS), step=_QUIET_STEPS * (number + 1) + dice.randrange(8), deed="slow forward",
                  text=f"{_SLOWER_S} {_SLOW_STEPS}", generation=0)
            for number in range(strikes)
        ]  # fmt: skip
        plant(job, *self.plants)

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault."""
        yield _planted(job, self.plants[number])


def _planted(job: Job, due: Plant) -> Struck:
    """Wait for the step that the fault was planted in."""
    job.wait_for_step(due.step - 1)
    begun_s = next(row.t_wall_s for row in reversed(job.steps()) if row.step == due.step - 1)
    return Struck(begun_s, due.step, members(job)[due.rank // RANKS_PER_NODE], due.rank)


class GradientFlipped:
    """One bit of one rank's gradient flips, before it is mixed with the others'. Found at the next replayed step."""

    name = "a gradient bit flips"
    aim = Aim(frozenset({Cause.SILENT_CORRUPTION}), frozenset({"replace"}), f"{REPLAY_STEPS} steps, the interval")
    overrides: tuple[str, ...] = ("--integrity.replay_interval_steps", str(REPLAY_STEPS))

    def __init__(self) -> None:
        self.plants: list[Plant] = []

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault. A flip in a step that is not computed twice leaves nothing to compare: it strikes those."""
        steps = [REPLAY_STEPS * (5 + 5 * number + dice.randrange(3)) for number in range(strikes)]
        self.plants = [
            Plant(rank=dice.randrange(RANKS), step=step, deed="flip gradient", text=str(dice.randrange(32)),
                  generation=number + 1)
            for number, step in enumerate(steps)
        ]  # fmt: skip
        plant(job, *self.plants)

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault."""
        yield _planted(job, self.plants[number])


class MemoryFlipped:
    """One bit of the memory that holds a rank's weights or optimizer state flips. Found before the next update.

    Every step is checked: a flip between checks that lie further apart is worked into the state by an update, unseen.
    """

    aim = Aim(frozenset({Cause.SILENT_CORRUPTION}), frozenset({"replace"}), f"{CHECK_STEPS} steps, the interval")
    overrides: tuple[str, ...] = ("--integrity.interval_steps", str(CHECK_STEPS))

    def __init__(self, name: str, prefix: str) -> None:
        self.name = name
        self.prefix = prefix

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault."""

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault."""
        node, rank = _anybody(job, dice)
        faults.wait_a_part_of_a_step(job, dice)
        step = flip_state(job, rank, self.prefix, dice, nodes=members(job))
        yield Struck(time.time(), step, node, rank)


class GpuLost:
    """The driver reports XID 79: the GPU has fallen off the bus."""

    name = "a GPU falls off the bus"
    aim = Aim(frozenset({Cause.GPU_FAULT}), frozenset({"replace"}), "the sampling interval", rank_matters=False)
    overrides: tuple[str, ...] = ("--health.gpu_interval_s", "0.5")

    def __init__(self, gpus: FakeGpus) -> None:
        self.gpus = gpus

    def prepare(self, job: Job, strikes: int, dice: random.Random) -> None:
        """See Fault."""
        nodes = [f"node{number}" for number in range(RANKS // RANKS_PER_NODE + strikes)]
        self.gpus.add(*nodes)
        for node in nodes:
            self.gpus.heal(node)
        job.environment.update(self.gpus.environment())

    @contextlib.contextmanager
    def strike(self, job: Job, number: int, dice: random.Random) -> Iterator[Struck]:
        """See Fault."""
        node, rank = _anybody(job, dice)
        faults.wait_a_part_of_a_step(job, dice)
        struck = Struck(time.time(), last_step(job) + 1, node, rank)
        self.gpus.xid(node, rank % RANKS_PER_NODE, 79)
        yield struck
