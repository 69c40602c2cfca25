"""Real faults, done to a run on this machine from outside: signals, damaged files. `plants` has those from within."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.chaos.jobs import Job

_SLICE_S = 0.02


def processes_writing(log: Path) -> Iterator[psutil.Process]:
    """Processes whose standard output is this log file."""
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                yield process
        except (OSError, psutil.NoSuchProcess):
            continue


def rank_process(run_dir: Path, node: str, rank: int) -> psutil.Process:
    """The process of a rank."""
    found = list(processes_writing(run_dir.resolve() / "logs" / node / f"{rank}.log"))
    assert found, f"no process of rank {rank} on {node}"
    return max(found, key=lambda process: process.create_time())


def agent_process(run_dir: Path, node: str) -> psutil.Process:
    """The agent of a node."""
    for process in processes_writing(run_dir.resolve() / "logs" / node / "agent.log"):
        if os.getsid(process.pid) == process.pid:
            return process
    raise AssertionError(f"no agent of {node}")


def wait_a_part_of_a_step(job: Job, dice: random.Random) -> None:
    """Let a random part of about one step go by: the fault must not care where in a step it strikes."""
    recent = [record.step_s for record in job.steps()[-5:]]
    threading.Event().wait(dice.random() * max(recent, default=0.1))


def kill_worker(run_dir: Path, node: str, rank: int) -> None:
    """SIGKILL one rank."""
    rank_process(run_dir, node, rank).kill()


def crash_worker(run_dir: Path, node: str, rank: int, number: signal.Signals) -> None:
    """End one rank by a signal, as a crash would: SIGSEGV, SIGBUS, SIGABRT ... wherever it is in its step."""
    rank_process(run_dir, node, rank).send_signal(number)


def stop_worker(run_dir: Path, node: str, rank: int) -> None:
    """SIGSTOP one rank: it hangs, and everybody who waits for it."""
    rank_process(run_dir, node, rank).send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def slowed_worker(run_dir: Path, node: str, rank: int, share: float) -> Iterator[None]:
    """One rank gets only a part of its time: of each 20 ms it is stopped for this share."""
    victim, done = rank_process(run_dir, node, rank), threading.Event()

    def stop_and_go() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not done.wait(_SLICE_S * (1 - share)):
                victim.send_signal(signal.SIGSTOP)
                done.wait(_SLICE_S * share)
                victim.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def kill_node(run_dir: Path, node: str) -> None:
    """SIGKILL the agent and every process it started, at once: the node lost power."""
    os.killpg(agent_process(run_dir, node).pid, signal.SIGKILL)


def freeze_node(run_dir: Path, node: str) -> None:
    """SIGSTOP the agent and every process it started: nobody reports an exit, only heartbeats stop."""
    os.killpg(agent_process(run_dir, node).pid, signal.SIGSTOP)


def flip_byte(path: Path, offset: int) -> None:
    """Invert one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


class SmallDisk:
    """A file system of a fixed size at a path, which can be filled and freed. Needs root, as CI has."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes

    def __enter__(self) -> SmallDisk:
        self.path.mkdir(parents=True, exist_ok=True)
        options = f"size={self.size_bytes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "everstep-test", str(self.path)], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def fill(self) -> None:
        """Take all the room there is."""
        with (self.path / "ballast").open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()

    def free(self) -> None:
        """Give it back."""
        (self.path / "ballast").unlink()
