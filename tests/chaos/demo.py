"""`make demo`: a job on three nodes of this machine. Half-way one node is killed, and training ends all the same."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

from cluster.journal import read_events, read_steps
from cluster.rundir import RunDir
from cluster.state import replay
from configs.load import load_job
from tests.chaos.faults import kill_node

PRESET = "configs/demo.toml"


def kill_a_node_half_way(run_dir: RunDir, steps: int, job: subprocess.Popen[bytes]) -> None:
    """Wait for half of the steps, then take the power from the node of the last ranks."""
    already = max((record.step for record in read_steps(run_dir.metrics)), default=0)
    while job.poll() is None:
        newest = max((record.step for record in read_steps(run_dir.metrics)), default=0)
        if newest > max(already, steps // 2):
            victim = replay(read_events(run_dir.events)).order[-1]
            sys.stdout.write(f">>>>>>>> demo: killing {victim}, its agent and all its workers (SIGKILL)\n")
            sys.stdout.flush()
            kill_node(run_dir.path, victim)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.2)


def main() -> int:
    """Run the demonstration; returns the job's exit code."""
    config = load_job(Path(PRESET))
    run_dir = RunDir.of(config)
    if any(record.step >= config.training.steps for record in read_steps(run_dir.metrics)):
        sys.stdout.write(f"{run_dir.path} holds a finished demo; remove it to see it again\n")
    job = subprocess.Popen([sys.executable, "-m", "cluster.cli", "run", PRESET])
    # Ctrl-C reaches the job too, which saves and leaves; this process only waits for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    killer = threading.Thread(target=kill_a_node_half_way, args=(run_dir, config.training.steps, job), daemon=True)
    killer.start()
    return job.wait()


if __name__ == "__main__":
    sys.exit(main())
