"""Runs the user's evaluations of saved snapshots, one after the other, beside training and never in its way.

Each snapshot that is due is held by hard links, so that retention may remove it from the run meanwhile. That takes
file operations for every shard, so a thread does it; exporting and running the command is the work of a process of its
own (`cluster.evaluate`). What that leaves becomes a fact.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import msgspec

from cluster import events
from cluster.rundir import GARBLED, RunDir, write_atomically
from configs.schema import EvaluationConfig, JobConfig
from trainer.events import Fact, FactKind
from trainer.exits import ExitCode

TASK, RESULT, LOG, HELD, MODEL = "task.json", "result.json", "log.txt", "checkpoints", "model"

_LAST_WORDS_S = 5.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to evaluate: a snapshot by step and generation, and how."""

    run: str
    step: int
    generation: int
    evaluation: EvaluationConfig


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. detail: one line for a person."""

    step: int
    generation: int
    ok: bool
    seconds: float
    detail: str


class Evaluations:
    """A watcher of the supervisor, see `cluster.watchers.Watcher`; `take_facts` gives what is for the journal."""

    def __init__(self, config: JobConfig, run_dir: RunDir) -> None:
        """ValueError if the command's program is not there."""
        self._config = config.evaluation
        self._run = config.run.name
        self._last_step = config.training.steps
        self._run_dir = run_dir
        self._waiting: deque[Path] = deque()
        self._running: tuple[Path, subprocess.Popen[bytes]] | None = None
        self._facts: list[Fact] = []
        self._known: set[tuple[int, int]] = set()
        self._held: queue.SimpleQueue[tuple[Task, OSError | None]] = queue.SimpleQueue()
        self._holding = 0
        self._linger_until_s = float("inf")
        if self._config.command and shutil.which(self._config.command[0]) is None:
            program = self._config.command[0]
            raise ValueError(f"evaluation.command: there is no program {program!r}; give its whole path")

    @property
    def folder(self) -> Path:
        """One folder below it for each evaluated snapshot."""
        return self._run_dir.path / "evaluations"

    def open(self) -> None:
        """Take up what an earlier supervisor did not finish."""
        if not self._config.interval_steps:
            return
        tasks = sorted(self.folder.glob(f"step-*/{TASK}"), key=lambda path: path.stat().st_mtime)
        self._waiting.extend(task.parent for task in tasks if read_result(task.parent) is None)
        # One that died may not have come to hold a snapshot, or not have heard of it.
        for manifest in sorted(self._run_dir.path.glob(f"{HELD}/step-*/manifest.json")):
            step, generation = manifest.parent.name.removeprefix("step-"), _generation_of(manifest)
            if step.isdecimal() and generation is not None:
                self._committed(int(step), generation)

    def on_event(self, event: events.AnyEvent) -> None:
        """A committed snapshot may be due."""
        if isinstance(event, events.WorkersReported) and event.fact.kind is FactKind.SNAPSHOT_COMMITTED:
            self._committed(event.fact.step, event.fact.generation)

    def on_tick(self) -> None:
        """See what ended, and begin the next."""
        while not self._held.empty():
            task, error = self._held.get()
            self._holding -= 1
            if error is None:
                self._waiting.append(self._folder_of(task))
            else:
                self._fail(task.step, task.generation, f"the snapshot cannot be held for it: {error}")
        if self._running is not None and self._running[1].poll() is not None:
            self._ended(*self._running)
            self._running = None
        if self._running is None and self._waiting:
            folder = self._waiting.popleft()
            try:
                self._running = folder, _start(folder)
            except OSError as error:
                self._fail(*_named(folder), f"cannot be started: {error}")

    def take_facts(self) -> list[Fact]:
        """What has happened since the last call."""
        found, self._facts = self._facts, []
        return found

    def lingers(self, exit_code: ExitCode, interrupts: int) -> bool:
        """Whether the end of the job should still wait: a run that is done, for its last evaluations, within bounds.

        False ends what runs; the next attempt of the run does it again.
        """
        wanted = exit_code is ExitCode.DONE and not interrupts
        if self._linger_until_s == float("inf"):
            self._linger_until_s = time.monotonic() + self._config.timeout_s
        busy = self._running or self._waiting or self._holding
        if wanted and busy and time.monotonic() < self._linger_until_s:
            return True
        if self._running is not None:
            _end(self._running[1])
            self._running = None
        return False

    def _committed(self, step: int, generation: int) -> None:
        interval = self._config.interval_steps
        if not interval or (step % interval and step != self._last_step):
            return
        task = Task(run=self._run, step=step, generation=generation, evaluation=self._config)
        if (step, generation) in self._known or (self._folder_of(task) / TASK).exists():
            return
        self._known.add((step, generation))
        self._holding += 1
        threading.Thread(target=self._hold, args=(task,), name="evaluations", daemon=True).start()

    def _hold(self, task: Task) -> None:
        try:
            _hold(self._run_dir, self._folder_of(task), task)
        except OSError as error:
            self._held.put((task, error))
        else:
            self._held.put((task, None))

    def _folder_of(self, task: Task) -> Path:
        return self.folder / f"step-{task.step}-g{task.generation}"

    def _ended(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        result = read_result(folder)
        if result is None:
            self._fail(*_named(folder), f"ended with {process.returncode} and no result; see {folder / LOG}")
            return
        kind = FactKind.EVALUATED if result.ok else FactKind.EVALUATION_FAILED
        self._facts.append(_fact(kind, result.step, result.generation, result.detail, result.seconds))

    def _fail(self, step: int, generation: int, why: str) -> None:
        self._facts.append(_fact(FactKind.EVALUATION_FAILED, step, generation, why))


def read_result(folder: Path) -> Result | None:
    """What an evaluation left, None if it left nothing readable."""
    try:
        return msgspec.json.decode((folder / RESULT).read_bytes(), type=Result)
    except (OSError, *GARBLED):
        return None


class _Body(msgspec.Struct, frozen=True):
    generation: int


class _Manifest(msgspec.Struct, frozen=True):
    body: _Body


def _generation_of(manifest: Path) -> int | None:
    """Of a committed snapshot, None if its manifest cannot be read; whether it is whole, the export will see."""
    try:
        return msgspec.json.decode(manifest.read_bytes(), type=_Manifest).body.generation
    except (OSError, *GARBLED):
        return None


def _named(folder: Path) -> tuple[int, int]:
    """Step and generation in a folder's name."""
    step, _, generation = folder.name.removeprefix("step-").partition("-g")
    return int(step), int(generation)


def _hold(run_dir: RunDir, folder: Path, task: Task) -> None:
    """Make `folder` a run directory with this one snapshot, of files that the run's retention cannot take away.

    Where the file system has no hard links, the snapshot itself is referred to: then it must be kept long enough.
    """
    name = f"step-{task.step}"
    source, held = run_dir.path / HELD / name, folder / HELD / name
    shutil.rmtree(folder / HELD, ignore_errors=True)
    held.parent.mkdir(parents=True)
    shutil.copyfile(run_dir.config, folder / "config.toml")
    try:
        shutil.copytree(source, held, copy_function=os.link)
    except shutil.Error:
        shutil.rmtree(held, ignore_errors=True)
        held.symlink_to(source)
    write_atomically(folder / TASK, msgspec.json.encode(task))


def _start(folder: Path) -> subprocess.Popen[bytes]:
    """In a session of its own: it outlives a supervisor that dies, and whoever follows waits for it."""
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.evaluate", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have an evaluation end, and with it what it runs."""
    process.terminate()
    try:
        process.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _fact(kind: FactKind, step: int, generation: int, detail: str, seconds: float = 0.0) -> Fact:
    return Fact(
        kind=kind, node="", rank=-1, generation=generation, step=step, t_wall_s=time.time(), detail=detail,
        seconds=seconds,
    )  # fmt: skip
