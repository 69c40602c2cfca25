"""Who uses the processor while a job runs: the ranks, the agents, the supervisor, telemetry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

ROLES = ("ranks", "agents", "supervisor", "wandb")


def processor_times(supervisor: int, run_dir: Path) -> dict[int, tuple[str, float]]:
    """Processor seconds so far of each process of a run, by pid, with its role.

    Ranks write logs named by a number, agents and their helpers `agent.log`; telemetry is whatever else the supervisor
    started.
    """
    found = {}
    logs = run_dir.resolve() / "logs"
    started = {child.pid for child in psutil.Process(supervisor).children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            out = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
            if process.pid == supervisor:
                role = "supervisor"
            elif out.is_relative_to(logs):
                role = "ranks" if out.stem.isdigit() else "agents"
            elif process.pid in started:
                role = "wandb"
            else:
                continue
            times = process.cpu_times()
            found[process.pid] = (role, times.user + times.system)
    return found


def used_between(before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    """Processor seconds used by each role; of a process that began in between, all it used."""
    used = dict.fromkeys(ROLES, 0.0)
    for pid, (role, seconds) in after.items():
        used[role] += seconds - before[pid][1] if pid in before else seconds
    return used
