"""A job under one fault after another: strikes it, helps it as an operator would, and checks what must always hold."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.events import GenerationPlanned
from cluster.rundir import RunDir
from tests.chaos import faults
from tests.chaos.bucket import BesiegedBucket
from tests.chaos.damage import Age, Damage, good_snapshots
from tests.chaos.instants import Instants, wait_for
from tests.chaos.jobs import Job
from trainer.events import StepRecord
from trainer.exits import ExitCode

_POLL_S = 0.01
_RECOVERY_S = 120.0
_INSTANT_S = 3.0
_LOOKS = 10

Row = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: what every step logged, every step's state (hashes by rank), and what was read."""

    rows: dict[int, Row]
    states: dict[int, dict[str, str]]
    samples: dict[int, list[tuple[int, int, str]]]


@dataclass(frozen=True)
class Strike:
    """A kill that is ready to be done. restarts: whether training must go on in a new generation after it."""

    name: str
    act: Callable[[], None]
    restarts: bool


@dataclass(frozen=True)
class Mark:
    """How far the run was before a fault."""

    step: int
    generation: int


def row_of(record: StepRecord) -> Row:
    """What must be the same to the last bit."""
    return record.loss_avg, record.loss_max, record.grad_norm


class Siege:
    """One job. lift: ends what is wrong for a while, if anything is. unreadable: whether disks cannot be read now."""

    def __init__(self, job: Job, dice: random.Random, reference: Reference, bucket: BesiegedBucket) -> None:
        self.job = job
        self.dice = dice
        self.reference = reference
        self.bucket = bucket
        self.bucket_floor: Age = (-1, -1)
        self.done = False
        self.lift: Callable[[], None] = _nothing
        self.unreadable = False
        self.damages: list[Damage] = []
        self.destroyed: set[Age] = set()
        self.floor: Age = (-1, -1)
        self.run_dir = RunDir(job.run_dir.absolute())
        self.instants = Instants(job.run_dir, self.run_dir.ram_root("/dev/shm"), ranks_per_node=2)
        self._rows_checked = 0
        self._began_s = time.monotonic()

    # The operator -------------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Give the same command again where the supervisor died or ran out of spares."""
        assert self.job.process is not None
        code = self.job.process.poll()
        if code is None or self.done:
            return
        if code == ExitCode.DONE:
            self.done = True
            return
        expected = code in (ExitCode.REQUEUE, -signal.SIGKILL) or (code == ExitCode.DO_NOT_RESTART and self.unreadable)
        assert expected, f"the supervisor ended with {code}"
        self.tell(f"  the supervisor ended with {code}: the same command again")
        self.lift()
        self.job.start()

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = _RECOVERY_S) -> None:
        """Until it holds, or the run is done."""
        deadline, pause = time.monotonic() + timeout_s, threading.Event()
        while not self.done and not condition():
            self.tend()
            assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
            pause.wait(_POLL_S)

    def tell(self, line: str) -> None:
        """Say what is done, with the time: pytest shows it if the test fails."""
        sys.stdout.write(f"{self.job.name} {time.monotonic() - self._began_s:6.1f} s: {line}\n")
        sys.stdout.flush()

    # How far it is ------------------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The newest step that was logged, and the newest generation that was planned."""
        return Mark(max((record.step for record in self.job.steps()), default=0), self.generation())

    def generation(self) -> int:
        """The newest that was planned."""
        return max((plan.generation for plan in self.plans()), default=0)

    def plans(self) -> list[GenerationPlanned]:
        """All plans so far."""
        return [event for event in self.job.events() if isinstance(event, GenerationPlanned)]

    def members(self) -> tuple[str, ...]:
        """The nodes that train."""
        self.wait(lambda: bool(self.plans()), "the first plan")
        return self.plans()[-1].nodes

    def await_step(self, beyond: Mark, restarted: bool) -> None:
        """Until a step that was never logged before is: nothing is stuck, and no step is done for ever again."""

        def reached() -> bool:
            return any(
                record.step > beyond.step and (not restarted or record.generation > beyond.generation)
                for record in self.job.steps()
            )

        self.wait(reached, f"a step beyond {beyond.step}{' of a new generation' if restarted else ''}")

    def await_copies(self, beyond: Mark) -> None:
        """Until peers have every rank's copy of a newer step: nothing that sends or takes copies has died unseen."""

        def there() -> bool:
            held: dict[int, set[int]] = {}
            for copy in self.instants.copies():
                if copy.whole is not None and copy.whole.step > beyond.step:
                    held.setdefault(copy.whole.step, set()).add(copy.whole.rank)
            return any(len(ranks) == 2 * len(self.members()) for ranks in held.values())

        self.wait(there, f"copies of a step beyond {beyond.step}")

    def await_supervisor(self) -> None:
        """Until the one that was started last has the run."""

        def there() -> bool:
            endpoint = self.run_dir.read_endpoint()
            process = self.job.process
            alive = process is not None and process.poll() is None
            return alive and endpoint is not None and process is not None and endpoint.pid == process.pid

        self.wait(there, "a supervisor that has the run")

    # Kills --------------------------------------------------------------------------------------------------------

    def aim(self, target: str) -> Strike:
        """Find out whom to kill beforehand: looking takes longer than most instants last."""
        match target:
            case "worker":
                node, rank, pid = self._some_worker()
                return Strike(f"worker {rank} on {node}", lambda: _kill(os.kill, pid), True)
            case "node":
                return self.aim_at_node(self.dice.choice(self.members()))
            case "both nodes":
                pids = [self.agent_of(node) for node in self.members()]
                return Strike(" and ".join(self.members()), lambda: _kill_all(pids), True)
            case "supervisor":
                return Strike("the supervisor", self._kill_supervisor, False)
            case "supervisor and worker":
                node, rank, pid = self._some_worker()

                def both() -> None:
                    self._kill_supervisor()
                    _kill(os.kill, pid)

                return Strike(f"the supervisor and worker {rank} on {node}", both, True)
            case _:
                return Strike("everything", self.job.end, True)

    def aim_at_node(self, node: str) -> Strike:
        """A certain one."""
        pid = self.agent_of(node)
        return Strike(node, lambda: _kill(os.killpg, pid), True)

    def strike(self, strike: Strike, instant: str, look: Callable[[], bool] | None) -> str:
        """Kill at an instant, or at any time if there is nothing to look for; returns what was done, in words."""
        if look is None:
            threading.Event().wait(self.dice.random() * 0.3)
            words = f"{strike.name} killed at any time"
        else:
            seen = wait_for(look, _INSTANT_S)
            words = f"{strike.name} killed while {instant}{'' if seen else ' (not seen)'}"
            threading.Event().wait(self.dice.choice([0.0, 0.001, 0.01]) * self.dice.random())
        strike.act()
        return words

    def process_of(self, node: str, rank: int) -> int:
        """Of a rank."""
        return self._process(lambda: faults.rank_process(self.job.run_dir, node, rank).pid)

    def agent_of(self, node: str) -> int:
        """The agent's process, which leads the node's others."""
        return self._process(lambda: faults.agent_process(self.job.run_dir, node).pid)

    def _some_worker(self) -> tuple[str, int, int]:
        members = self.members()
        rank = self.dice.randrange(2 * len(members))
        return members[rank // 2], rank, self.process_of(members[rank // 2], rank)

    def _process(self, find: Callable[[], int]) -> int:
        found: list[int] = []

        def there() -> bool:
            with contextlib.suppress(AssertionError):
                found.append(find())
            return bool(found)

        self.wait(there, "a process to kill")
        return found[0] if found else -1

    def _kill_supervisor(self) -> None:
        assert self.job.process is not None
        self.job.process.kill()
        self.job.process.wait()

    # What must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every logged row is the undisturbed run's, and no good snapshot has disappeared."""
        self.check_rows()
        newest = self.newest_good()
        assert newest >= self.floor, (
            f"the newest good snapshot is {newest}; {self.floor} was there, and was not damaged"
        )
        self.floor = newest
        self.check_state(newest)
        newest = self.bucket.newest_good(self.bucket_floor)
        floor = self.bucket_floor
        assert newest >= floor, f"the newest good snapshot in the bucket is {newest}; {floor} was there, undamaged"
        self.bucket_floor = newest

    def check_rows(self) -> None:
        """To the last bit: a step from a wrong state has another loss or gradient."""
        records = self.job.steps()
        for record in records[self._rows_checked :]:
            found, right = row_of(record), self.reference.rows[record.step]
            assert found == right, f"step {record.step} of generation {record.generation} is {found}, not {right}"
            anew = record.step == 1 and max(self.floor, self.bucket_floor) > (0, 0)
            assert not anew, f"generation {record.generation} began anew, and there were snapshots"
        self._rows_checked = len(records)

    def check_state(self, age: Age) -> None:
        """A snapshot that verifies holds the undisturbed run's state of its step."""
        right = self.reference.states.get(age[1])
        with contextlib.suppress(FileNotFoundError):  # retention was faster
            assert right is None or self.job.weights(age[1]) == right, (
                f"snapshot {age} verifies, and holds another state"
            )

    def newest_good(self) -> Age:
        """Age of the newest snapshot in the run directory that verifies; at every moment there is one, if ever."""
        newest: Age = (-1, -1)
        for _ in range(_LOOKS):
            newest = max([newest, *good_snapshots(self.job.run_dir).values()])
            if newest >= self.floor:
                return newest
        return newest

    def remember_good(self) -> None:
        """Before a fault: what must still be there after it."""
        self.check_rows()
        self.floor = max(self.floor, self.newest_good())

    def lower_floor(self) -> None:
        """A fault destroyed the newest: the best of the others is what has to stay."""
        good = [age for age in good_snapshots(self.job.run_dir).values() if age not in self.destroyed]
        self.floor = max(good, default=(-1, -1))

    def check_end(self, steps: int) -> None:
        """The run is done: all of it is the undisturbed run's, and what was damaged has not been forgotten."""
        assert self.done, "the run did not end"
        self.check()
        assert self.newest_good()[1] == steps
        assert self.job.weights(steps) == self.reference.states[steps]
        assert self.bucket_floor == self.floor, f"the bucket ends with {self.bucket_floor}, not {self.floor}"
        assert self.job.losses() == {step: row[0] for step, row in self.reference.rows.items() if step <= steps}
        assert self.job.samples() == {s: lines for s, lines in self.reference.samples.items() if s <= steps}
        assert not self.bucket.unfinished(), f"uploads left behind: {self.bucket.unfinished()}"
        self.check_damages()
        assert "Traceback" not in self.job.said(), "a traceback in the output"
        for log in self.job.run_dir.glob("logs/*/agent.log"):
            text = log.read_text(errors="replace")
            assert not _tracebacks(text), f"a traceback in {log}:\n{text[-4000:]}"

    def check_damages(self) -> None:
        """What was damaged was repaired, overwritten or removed since, or is called damaged by whoever looks."""
        for damage in self.damages:
            assert damage.undone or damage.noticed(), f"{damage.what}: nobody says that it is damaged"


@contextlib.contextmanager
def told(job: Job) -> Iterator[None]:
    """A failure within says how the run stood."""
    try:
        yield
    except AssertionError as error:
        tail = job.said()[-6000:]
        raise AssertionError("\n".join([str(error), "--- the run's last words:", tail, *_journal(job)])) from error


def _tracebacks(log: str) -> list[str]:
    """Those of our own. Torch elastic says with one that a worker was killed, AWS' runtime that an upload was ended."""
    lines = log.splitlines()
    found = [n for n, line in enumerate(lines) if "Traceback" in line and "torch/distributed/elastic" not in line]
    return [lines[n] for n in found if "awscrt" not in "".join(lines[n + 1 : n + 2])]


def _journal(job: Job) -> list[str]:
    path = job.run_dir / "events.jsonl"
    lines = path.read_text(errors="replace").splitlines()[-40:] if path.exists() else []
    listing = sorted(str(p.relative_to(job.run_dir)) for p in Path(job.run_dir).glob("checkpoints/*/*"))
    return ["--- the journal's last lines:", *lines, "--- checkpoints:", *listing]


def _kill(how: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid > 0:
            how(pid, signal.SIGKILL)


def _kill_all(sessions: Sequence[int]) -> None:
    for pid in sessions:
        _kill(os.killpg, pid)


def _nothing() -> None:
    """Nothing is wrong."""
