"""Runs `everstep run` as a person would, and looks at what it left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from cluster.journal import read_events, read_steps
from cluster.report import surviving
from cluster.rundir import RunDir
from trainer.events import StepRecord
from trainer.ledger import committed_samples

POLL_S = 0.02


class Job:
    """One run of a test: its folder, its command line, its supervisor process."""

    def __init__(self, home: Path, name: str, config: str, overrides: Sequence[str] = ()) -> None:
        self.home = home
        self.name = name
        # Each job remembers its nodes for itself: what one test does to a node is not held against it in the next.
        history = ("--cluster.node_history", str(home / "runs" / name / "nodes.jsonl"))
        self.arguments = ["run", config, "--run.name", name, "--telemetry.wandb", "off", *history, *overrides]
        self.output = home / f"{name}.out"
        self.environment: dict[str, str] = {}
        self.launcher: tuple[str, ...] = ()
        self.module = "cluster.cli"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.home / "runs" / self.name

    def start(self, *more: str) -> Job:
        """Start `everstep run` in the background."""
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.launcher, sys.executable, "-m", self.module, *self.arguments, *more],
                cwd=self.home,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.environment},
            )
        return self

    def finish(self, timeout_s: float = 240.0) -> int:
        """Wait for the supervisor's end; returns its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.name} did not end in {timeout_s:g} s:\n{self.said()[-4000:]}") from None

    def said(self) -> str:
        """All that the commands printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def steps(self) -> list[StepRecord]:
        """Logged steps, those computed twice twice."""
        return read_steps(self.run_dir / "metrics.jsonl")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
        """Wait for a condition while the supervisor (or, once it was killed, the job) goes on."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.process is not None and self.process.poll() not in (None, -signal.SIGKILL)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {what} did not happen:\n{self.said()[-4000:]}")
            time.sleep(POLL_S)

    def wait_for_step(self, step: int) -> None:
        """Wait until the step has been logged."""
        self.wait_until(lambda: any(record.step >= step for record in self.steps()), f"step {step}")

    def events(self) -> list[object]:
        """The journal."""
        return list(read_events(self.run_dir / "events.jsonl"))

    def causes(self) -> list[str]:
        """Causes of all verdicts so far."""
        return [event.verdict.cause.value for event in self.events() if hasattr(event, "verdict")]

    def actions(self) -> list[str]:
        """Actions so far."""
        return [event.action for event in self.events() if hasattr(event, "action")]

    def losses(self) -> dict[int, float | None]:
        """Loss of every step that counts, to the last bit."""
        return {record.step: record.loss_avg for record in surviving(self.steps())}

    def samples(self) -> dict[int, list[tuple[int, int, str]]]:
        """Samples that every step read: first number, count and digest of the bytes, by data-parallel rank."""
        read = committed_samples(self.run_dir)
        return {step: [(line.first, line.count, line.digest) for line in lines] for step, lines in read.items()}

    def weights(self, step: int) -> dict[str, str]:
        """Hash of every tensor in every rank's final shard, free of what a generation changes (its number)."""
        folder = self.run_dir / "checkpoints" / f"step-{step}"
        manifest = json.loads((folder / "manifest.json").read_text())
        shards = manifest["body"]["shards"]
        return {f"rank {shard['rank']}": _hash_tensors(folder / shard["file"]) for shard in shards}

    def processes(self) -> list[psutil.Process]:
        """All processes of this run but the supervisor: those that were started for it or write its logs."""
        found = []
        for process in psutil.process_iter():
            try:
                outs = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (1, 2)]
                mine = str(self.run_dir.resolve())
                if mine in process.cmdline() or any(out.startswith(f"{mine}/") for out in outs):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def end(self) -> None:
        """SIGKILL everything of this run that is alive."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            process.kill()

    def leftovers(self) -> list[str]:
        """Processes, shared memory and semaphores of this run that are still there (ports go with their processes)."""
        found = [f"process {process.pid}: {_words(process)}" for process in self.processes()]
        run_dir = RunDir(self.run_dir.absolute())
        ram = run_dir.ram_root("/dev/shm")
        found += [f"semaphore {path}" for path in Path("/dev/shm").glob(f"sem.{run_dir.semaphore_prefix()}*")]
        return found + ([f"shared memory {ram}"] if ram.exists() else [])


def _words(process: psutil.Process) -> str:
    """Its command line; "" if it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _hash_tensors(shard: Path) -> str:
    """Hash of a safetensors file's data section: everything behind its header."""
    with shard.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
