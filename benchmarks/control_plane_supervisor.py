"""`python -m benchmarks.control_plane_supervisor FOLDER AGENTS`: a real supervisor of machines that are only played.

`dead` in the folder names the nodes that the owner of the machines knows to be gone, a line each.
"""

from __future__ import annotations

import cProfile
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from benchmarks.control_plane_agents import say
from benchmarks.control_plane_messages import INTERVAL_S, RANKS, SPARES, TIMEOUT_S, Listening, allow_files, names
from cluster import events
from cluster.jobstate import JobState
from cluster.journal import Journal
from cluster.keys import make_or_read_keys
from cluster.rundir import RunDir
from cluster.supervisor import Supervisor
from cluster.watchers import Watchers
from cluster.wire import SupervisorSocket
from configs.load import load_job
from configs.schema import JobConfig

_READ_EVERY_S = 0.1


class Machines:
    """See `cluster.scheduler.Scheduler`: starts and ends nothing."""

    def __init__(self, dead: Path) -> None:
        self.gone: frozenset[str] = frozenset()
        self._dead = dead
        threading.Thread(target=self._read, daemon=True).start()

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> Sequence[str]:
        """All that there are."""
        return ()

    def start(self, node: str) -> str:
        """They run already."""
        return node

    def alive(self, handle: str) -> bool:
        """Unless the file says something else."""
        return handle not in self.gone

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """Nobody to kill."""

    def report_bad(self, node: str, reason: str) -> None:
        """Nobody to tell."""

    def appeared(self) -> tuple[str, ...]:
        """None."""
        return ()

    def verdicts(self, step: int, nodes: Collection[str]) -> tuple[()]:
        """None."""
        return ()

    def last_words(self, node: str) -> tuple[str, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing is held."""

    def _read(self) -> None:
        while True:
            if self._dead.exists():
                self.gone = frozenset(self._dead.read_text().split())
            time.sleep(_READ_EVERY_S)


def large_job(agents: int) -> JobConfig:
    """A job of that many nodes; what it trains plays no part."""
    config = load_job("demo")
    cluster, health, checkpoint = config.cluster, config.health, config.checkpoint
    return msgspec.structs.replace(
        config,
        cluster=msgspec.structs.replace(cluster, nodes=agents, spares=SPARES, ranks_per_node=RANKS),
        health=msgspec.structs.replace(
            health, heartbeat_interval_s=INTERVAL_S, heartbeat_timeout_s=TIMEOUT_S, hang_floor_s=30.0, preflight=False,
            max_evictions_per_hour=1000,
        ),
        checkpoint=msgspec.structs.replace(checkpoint, peer_copies=1),
    )  # fmt: skip


def main() -> None:
    """Entry point."""
    folder, agents = Path(sys.argv[1]), int(sys.argv[2])
    allow_files(agents + SPARES)
    run_dir = RunDir(folder)
    run_dir.create()
    ears = SupervisorSocket(make_or_read_keys(run_dir.keys))
    say(Listening(ears.bind()))
    supervisor = Supervisor(
        large_job(agents), run_dir, Machines(folder / "dead"), ears, Journal(run_dir.events), JobState(), {}, Watchers()
    )
    supervisor.emit(events.RunStarted, run="large", attempt=1, supervisor_pid=os.getpid(), target_steps=1 << 30)
    for node in names(agents):
        supervisor.handles[node] = node
        supervisor.emit(events.AgentStarted, node=node, handle=node)
    profile = os.environ.get("EVERSTEP_BENCH_PROFILE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if not profile:
        supervisor.run()
        return
    profiler = cProfile.Profile()
    try:
        profiler.runcall(supervisor.run)
    finally:
        profiler.dump_stats(profile)


if __name__ == "__main__":
    main()
