"""The agent process: `python -m cluster.agent_main RUN_DIR NODE`. A composition root.

It outlives its workers. It owns the node's shared memory (heartbeat slots, snapshot segments), runs torch elastic,
persists snapshots in the background, and speaks to the supervisor. Secrets come from a file, never from arguments.
"""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.agent import AgentState
from cluster.keys import read_keys
from cluster.messages import Plan, RamShardInfo, RankBeat, WorkerExit
from cluster.rundir import RunDir, safe_name
from cluster.wire import AgentLink
from configs.load import load_job
from configs.schema import JobConfig
from trainer.events import Fact, FactKind, HeartbeatFile, WorkerError, WorkerStart
from trainer.paths import error_path, facts_path, heartbeat_path, rank_log, segments_dir

_MONITOR_INTERVAL_S = 0.02
_LOG_TAIL_LINES = 40

if TYPE_CHECKING:
    from checkpointing.store import StoreEvent

logger = logging.getLogger("everstep.agent")


class Node:
    """One node: the pieces of the agent and the callbacks that tie them together."""

    def __init__(self, run_dir: RunDir, config: JobConfig, node: str, host: str) -> None:
        self.run_dir = run_dir
        self.config = config
        self.node = node
        self.ram_dir = run_dir.ram_root(config.checkpoint.ram_dir) / node
        self.local_ranks = range(config.cluster.ranks_per_node)
        self.state = AgentState(node, host, self.take_inventory)
        self.plan: Plan | None = None
        self.slots = HeartbeatFile(heartbeat_path(self.ram_dir), len(self.local_ranks))
        self.facts_read = [0] * len(self.local_ranks)
        self._facts_lock = threading.Lock()
        self.oom_kills_before = 0

    def open(self) -> None:
        """Make the node's folder in shared memory, empty: what an earlier agent left is not trusted."""
        from checkpointing.persister import Persister
        from checkpointing.store import NodeStore

        shutil.rmtree(self.ram_dir, ignore_errors=True)
        segments_dir(self.ram_dir).mkdir(mode=0o700, parents=True)
        self.run_dir.logs(self.node).mkdir(parents=True, exist_ok=True)
        self.slots.open()
        policy = self.config.checkpoint
        self.store = NodeStore(segments_dir(self.ram_dir), self.run_dir.path, policy.keep_last, policy.keep_every_steps)
        self.persister = Persister(self.store, self.on_store_event)
        self.persister.start()

    def close(self) -> None:
        """Give everything back."""
        self.persister.stop()
        self.slots.close()
        self.store.close()
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        # The last node of this machine takes the run's folder along; the others find it not empty.
        if self.ram_dir.parent.exists() and not any(self.ram_dir.parent.iterdir()):
            self.ram_dir.parent.rmdir()

    def take_inventory(self) -> Sequence[RamShardInfo]:
        """What the RAM tier holds, verified; called only while no worker runs."""
        return [RamShardInfo(s.rank, s.world_size, s.step, s.generation) for s in self.store.inventory()]

    def worker_argument(self, plan: Plan) -> str:
        """What a worker of this plan gets to know, as JSON."""
        self.plan = plan
        for local_rank in self.local_ranks:
            error_path(self.ram_dir, local_rank).unlink(missing_ok=True)
        start = WorkerStart(
            run_dir=str(self.run_dir.path),
            node=self.node,
            generation=plan.generation,
            ram_dir=str(self.ram_dir),
            ram_step=plan.ram_step,
        )
        return msgspec.json.encode(start).decode()

    def first_rank(self) -> int:
        """Global rank of local rank 0."""
        return self.plan.nodes.index(self.node) * len(self.local_ranks) if self.plan else 0

    def beats(self, pids: dict[int, int]) -> Sequence[RankBeat]:
        """Newest heartbeat and process state of every local rank."""
        first = self.first_rank()
        return [
            RankBeat(first + local_rank, pid, _process_state(pid), self.slots.read(local_rank))
            for local_rank, pid in pids.items()
        ]

    def all_begun(self) -> bool:
        """Whether every worker of the current generation runs its own code by now."""
        beats = [self.slots.read(local_rank) for local_rank in self.local_ranks]
        return self.plan is not None and all(b is not None and b.generation == self.plan.generation for b in beats)

    def forward_facts(self) -> None:
        """Pass on what workers wrote since the last call."""
        with self._facts_lock:
            for local_rank in self.local_ranks:
                for line in self._new_fact_lines(local_rank):
                    self.state.note(msgspec.json.decode(line, type=Fact))

    def _new_fact_lines(self, local_rank: int) -> Sequence[bytes]:
        path = facts_path(self.ram_dir, local_rank)
        if not path.exists():
            return ()
        with path.open("rb") as file:
            file.seek(self.facts_read[local_rank])
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self.facts_read[local_rank] += len(whole)
        return whole.splitlines()

    def on_store_event(self, event: StoreEvent) -> None:
        """The snapshot store persisted, committed, or failed to."""
        from checkpointing.store import StoreEventKind

        kinds = {
            StoreEventKind.COMMITTED: FactKind.SNAPSHOT_COMMITTED,
            StoreEventKind.FAILED: FactKind.SNAPSHOT_FAILED,
        }
        if event.kind not in kinds:
            return
        self.state.note(
            Fact(
                kind=kinds[event.kind],
                node=self.node,
                rank=event.rank,
                generation=event.generation,
                step=event.step,
                t_wall_s=time.time(),
                detail=event.detail,
                seconds=event.seconds,
            )
        )

    def worker_exit(self, local_rank: int, exit_code: int | None, signal_number: int | None) -> WorkerExit:
        """Everything known about how a worker ended."""
        error_file = error_path(self.ram_dir, local_rank)
        error = msgspec.json.decode(error_file.read_bytes(), type=WorkerError) if error_file.exists() else None
        rank = self.first_rank() + local_rank
        log = rank_log(self.run_dir.path, self.node, rank)
        return WorkerExit(
            rank=rank,
            generation=self.plan.generation if self.plan else 0,
            exit_code=exit_code,
            signal_number=signal_number,
            error=error,
            log_tail=tuple(_tail(log, _LOG_TAIL_LINES)),
            oom_kill=signal_number == signal.SIGKILL and _oom_kills() > self.oom_kills_before,
            t_wall_s=time.time(),
        )

    def remember_oom_kills(self) -> None:
        """Note the cgroup's counter, so that a later rise can be blamed on this generation."""
        self.oom_kills_before = _oom_kills()


def run_node(node: Node) -> None:
    """Run torch elastic until the supervisor lets the node go."""
    from cluster.elastic import AssignedRendezvous, NodeElasticAgent, WorkerDeath
    from trainer.main import worker_main

    rendezvous = AssignedRendezvous(node.node, node.state.host, node.state)

    def on_deaths(deaths: Sequence[WorkerDeath]) -> None:
        node.state.workers_died([node.worker_exit(d.local_rank, d.exit_code, d.signal_number) for d in deaths])

    while True:
        elastic = NodeElasticAgent(
            rendezvous,
            worker_main,
            len(node.local_ranks),
            node.ram_dir,
            node.worker_argument,
            on_deaths,
            node.all_begun,
            _MONITOR_INTERVAL_S,
        )
        node.remember_oom_kills()
        node.state.beats = lambda e=elastic: node.beats(e.worker_pids())  # type: ignore[misc]
        node.state.on_save = lambda e=elastic: e.signal_workers(signal.SIGUSR1)  # type: ignore[misc]
        result = elastic.run()
        if result is None or result.is_failed():
            return
        node.forward_facts()
        node.persister.flush(node.config.cluster.leave_timeout_s)
        last = node.slots.read(0)
        node.state.workers_finished(last.step if last else 0)
        if not node.state.await_orders_after_finish():
            return


def main() -> int:
    """Entry point."""
    run_dir, name = RunDir(Path(sys.argv[1])), safe_name(sys.argv[2], "node")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    config = load_job(run_dir.config)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before torch elastic starts workers it has no handler of its own: end as it would, through `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _warm_up()
    node = Node(run_dir, config, name, host=socket.gethostbyname("localhost"))
    node.open()
    link = AgentLink(
        name,
        read_keys(run_dir.keys),
        run_dir.read_endpoint,
        node.state.report,
        node.state.take_order,
        config.health.heartbeat_interval_s,
        config.health.heartbeat_timeout_s,
    )
    node.state.wake = link.wake
    stop = threading.Event()
    try:
        link.start()
        threading.Thread(target=_watch, args=(node, link, stop), name="watch", daemon=True).start()
        run_node(node)
    finally:
        stop.set()
        link.stop()
        node.close()
    return 0


def _warm_up() -> None:
    """Load torch here and all of the trainer in the fork server, before the first heartbeat.

    A node that reports is warm; and importing holds the interpreter's lock for seconds, in which no thread of this
    process could send a heartbeat.
    """
    from cluster.elastic import warm_forkserver
    from trainer.main import PRELOAD

    warm_forkserver(PRELOAD)


def _watch(node: Node, link: AgentLink, stop: threading.Event) -> None:
    """Forward facts, and leave when there is nothing to do and nobody to say what next."""
    while not stop.wait(_MONITOR_INTERVAL_S * 5):
        node.forward_facts()
        if node.state.idle and link.silent_s > node.config.cluster.supervisor_lost_timeout_s:
            logger.warning("no supervisor for %.0f s and nothing left to do: leaving", link.silent_s)
            node.state.leave()
            return


def _process_state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return stat.rpartition(")")[2].split()[0]


def _tail(path: Path, lines: int) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 32768))
        return file.read().decode(errors="replace").splitlines()[-lines:]


def _oom_kills() -> int:
    """The cgroup's count of OOM kills; 0 where there is no such file."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")):
        if path.exists():
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
