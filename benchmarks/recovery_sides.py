"""The two sides of the recovery benchmark: how a job is started, watched, and one of its workers killed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks.common import Workspace
from benchmarks.recovery_lines import Begun, Finished, Reader
from cluster.events import ActionTaken, AnyEvent, GenerationPlanned, VerdictGiven
from cluster.journal import read_events, tail_steps
from cluster.rundir import RunDir
from tests.chaos.faults import rank_process
from trainer.events import HeartbeatFile, Phase, StepRecord
from trainer.paths import heartbeat_path

NODE = "node0"
Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class Step:
    """A finished step: in which life of the workers, and when."""

    life: int
    step: int
    t_wall_s: float


@dataclass(frozen=True)
class Recovery:
    """What one kill cost, seconds from SIGKILL; phases sum to first_step_s.

    first_step_s: to the first step that the new workers finished, which may be one that was finished before.
    new_step_s: to the first step that had not been finished before.
    repeated: steps computed again though they were finished. lives: how many generations it took.
    """

    first_step_s: float
    new_step_s: float
    repeated: int
    lives: int
    phases: Mapping[str, float]


class Side(Protocol):
    """One way to run the job."""

    name: str
    log: Path

    def start(self) -> None:
        """Start the job anew."""

    def steps(self) -> list[Step]:
        """Steps finished so far."""

    def victim(self, rank: int) -> int:
        """Pid of a rank, now."""

    def look(self) -> None:
        """Called all the time while a recovery is under way."""

    def phases(self, killed_s: float, life: int, first_step_s: float) -> Mapping[str, float]:
        """Where the time from the kill to the first step of that life went, in order."""

    def stop(self) -> None:
        """Kill the job."""


def between(marks: Mapping[str, float], begin_s: float) -> dict[str, float]:
    """Durations from times at which phases ended, in order."""
    ends = list(marks.values())
    return {name: end - start for name, end, start in zip(marks, ends, [begin_s, *ends[:-1]], strict=True)}


class Everstep:
    """`everstep run`, one node."""

    name = "everstep"

    def __init__(self, place: Workspace, job: Path, ranks: int) -> None:
        self.place = place
        self.job = job
        self.ranks = ranks
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """See Side."""
        name = f"recovery-{next(self._numbers)}"
        self.run_dir = RunDir(self.place.disk / "runs" / name)
        self._records: list[StepRecord] = []
        self._offset = 0
        self._beats: dict[tuple[int, int, Phase], float] = {}
        self._slots: HeartbeatFile | None = None
        arguments = [
            "-m", "cluster.cli", "run", str(self.job), "--run.dir", str(self.place.disk / "runs"), "--run.name", name,
            "--telemetry.wandb", "off", "--checkpoint.ram_dir", str(self.place.memory),
        ]  # fmt: skip
        self.log = self.place.disk / f"{name}.out"
        self.place.start(arguments, self.log)

    def steps(self) -> list[Step]:
        """See Side."""
        lines = tail_steps(self.run_dir.metrics, self._offset)
        self._records.extend(lines.records)
        self._offset = lines.offset
        return [Step(record.generation, record.step, record.t_wall_s) for record in self._records]

    def victim(self, rank: int) -> int:
        """See Side."""
        return rank_process(self.run_dir.path, NODE, rank).pid

    def look(self) -> None:
        """Note when each rank entered each phase."""
        if self._slots is None:
            ram = self.run_dir.ram_root(str(self.place.memory)) / NODE
            self._slots = HeartbeatFile(heartbeat_path(ram), self.ranks).open()
        for rank in range(self.ranks):
            beat = self._slots.read(rank)
            if beat is not None:
                wall_s = beat.monotonic_s + time.time() - time.monotonic()
                self._beats.setdefault((beat.generation, rank, beat.phase), wall_s)

    def phases(self, killed_s: float, life: int, first_step_s: float) -> Mapping[str, float]:
        """See Side."""
        events = [event for event in read_events(self.run_dir.events) if event.t_wall_s >= killed_s]
        verdict = _first(events, VerdictGiven)
        action = _first(events, ActionTaken)
        plan = next(e for e in events if isinstance(e, GenerationPlanned) and e.generation == life)
        marks = {
            "notice the exit": verdict.t_failed_wall_s,
            "judge and decide": action.t_wall_s,
            "stop workers, verify memory, plan": plan.t_wall_s,
            "fork": self._entered(life, Phase.STARTING),
            "read config, join the group": self._entered(life, Phase.BUILDING),
            "build the engine": self._entered(life, Phase.LOADING),
            "load the snapshot, open the data": self._entered(life, Phase.DATA),
            "first step": first_step_s,
        }
        return between(marks, killed_s)

    def _entered(self, life: int, phase: Phase) -> float:
        """When the last rank was first seen in a phase or beyond it (some are over before the next look)."""
        seen = [
            min(at_s for (of, who, at), at_s in self._beats.items() if (of, who) == (life, rank) and at >= phase)
            for rank in range(self.ranks)
        ]
        return max(seen)

    def stop(self) -> None:
        """See Side."""
        if self._slots is not None:
            self._slots.close()
        self.place.close()


class Torchrun:
    """torchrun with restarts, and torch's distributed checkpoint of every step in shared memory."""

    name = "torchrun"

    def __init__(self, place: Workspace, job: Path, ranks: int, saver: str) -> None:
        self.place = place
        self.job = job
        self.ranks = ranks
        self.saver = saver
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """See Side."""
        folder = self.place.memory / f"torchrun-{next(self._numbers)}"
        folder.mkdir()
        self._reader = Reader(folder / "lines.jsonl")
        arguments = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks),
            "--max-restarts", "1000", "--monitor-interval", "0.02",
            "-m", "benchmarks.recovery_peer", str(self.job), str(folder), self.saver,
        ]  # fmt: skip
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = self.place.disk / f"{folder.name}.out"
        self.place.start(arguments, self.log, environment)

    def steps(self) -> list[Step]:
        """See Side."""
        lines = self._reader.read()
        return [Step(line.attempt, line.step, line.t_wall_s) for line in lines if isinstance(line, Finished)]

    def victim(self, rank: int) -> int:
        """See Side."""
        begun = [line for line in self._reader.read() if isinstance(line, Begun) and line.rank == rank]
        return begun[-1].pid

    def look(self) -> None:
        """Its workers write down what they do."""

    def phases(self, killed_s: float, life: int, first_step_s: float) -> Mapping[str, float]:
        """See Side."""
        begun = [line for line in self._reader.read() if isinstance(line, Begun) and line.attempt == life]
        marks = {
            "notice, stop, start interpreters": max(line.process_s for line in begun),
            "import torch and the engine": max(line.imported_s for line in begun),
            "join the group": max(line.joined_s for line in begun),
            "build the engine (and import what it needs)": max(line.built_s for line in begun),
            "load the checkpoint, open the data": max(line.loaded_s for line in begun),
            "first step": first_step_s,
        }
        return between(marks, killed_s)

    def stop(self) -> None:
        """See Side."""
        self.place.close()


def kill_and_recover(side: Side, rank: int, delay_s: float, timeout_s: float) -> Recovery:
    """SIGKILL a rank after a delay and wait until training is past the step that was in flight.

    Raises:
        TimeoutError: if that did not happen.
    """
    pid = side.victim(rank)
    time.sleep(delay_s)
    killed_s = time.time()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        side.look()
        found = recovered(side.steps(), killed_s)
        if found is not None:
            before, first, new = found
            return Recovery(
                first_step_s=first.t_wall_s - killed_s,
                new_step_s=new.t_wall_s - killed_s,
                repeated=before.step - first.step + 1,
                lives=first.life - before.life,
                phases=side.phases(killed_s, first.life, first.t_wall_s),
            )
        time.sleep(0.002)
    raise TimeoutError(f"{side.name} did not train again within {timeout_s:g} s")


def recovered(steps: list[Step], killed_s: float) -> tuple[Step, Step, Step] | None:
    """The last step of the old life, the first of the new one, and the first new one; None as long as there is none."""
    before = max((s for s in steps if s.t_wall_s <= killed_s), key=lambda s: (s.life, s.step))
    before = max((s for s in steps if s.life == before.life), key=lambda s: s.step)
    after = [s for s in steps if s.life > before.life]
    new = next((s for s in after if s.step > before.step), None)
    return None if new is None else (before, next(s for s in after if s.life == new.life), new)


def _first(events: Sequence[AnyEvent], kind: type[Wanted]) -> Wanted:
    return next(event for event in events if isinstance(event, kind))
