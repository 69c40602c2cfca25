"""One node as its agent sees it: heartbeats, facts and ends of its workers, and its snapshots (`cluster.tiers`)."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.agent import AgentState
from cluster.messages import HeldInfo, Plan, RankBeat, WorkerExit
from cluster.planning import ranks_of
from cluster.rundir import RunDir
from cluster.tiers import NodeTiers
from configs.schema import JobConfig
from trainer.events import Fact, HeartbeatFile, WorkerError, WorkerStart
from trainer.paths import error_path, facts_path, heartbeat_path, rank_log, segments_dir

_LOG_TAIL_LINES = 40


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
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        segments_dir(self.ram_dir).mkdir(mode=0o700, parents=True)
        self.run_dir.logs(self.node).mkdir(parents=True, exist_ok=True)
        self.slots.open()
        self.tiers = NodeTiers(self.run_dir, self.config, self.node, self.ram_dir, self.state)
        self.state.on_order = self.tiers.obey
        self.tiers.open()

    def close(self) -> None:
        """Give everything back."""
        self.tiers.close()
        self.slots.close()
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        # The last node of this machine takes the run's folder along; the others find it not empty.
        if self.ram_dir.parent.exists() and not any(self.ram_dir.parent.iterdir()):
            self.ram_dir.parent.rmdir()

    def take_inventory(self) -> Sequence[HeldInfo]:
        """The shards on this node, verified; called only while no worker runs."""
        # What the last ones had to say comes before the next plan: it may name no snapshot that they found to be wrong.
        self.forward_facts()
        return self.tiers.inventory()

    def worker_argument(self, plan: Plan) -> str:
        """What a worker of this plan gets to know, as JSON; first, what its rank lacks is brought into memory."""
        self.plan = plan
        for local_rank in self.local_ranks:
            error_path(self.ram_dir, local_rank).unlink(missing_ok=True)
        order = self.state.order()
        self.tiers.begin(plan, order)
        start = WorkerStart(
            run_dir=str(self.run_dir.path),
            node=self.node,
            generation=plan.generation,
            ram_dir=str(self.ram_dir),
            ram_step=plan.ram_step,
            rejected=order.rejected,
            peers=tuple(dict.fromkeys([*order.copy_to, *(a for each in order.gather for a in each.addresses)])),
            wait_for_copies=self.tiers.may_send_copies,
            node_dir=str(self.tiers.node_dir or ""),
        )
        return msgspec.json.encode(start).decode()

    def first_rank(self) -> int:
        """Global rank of local rank 0."""
        return ranks_of(self.node, self.plan).start

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

    def told_to_leave(self) -> None:
        """SIGTERM while workers run: the node is about to be taken away. In a thread: a signal handler may not wait."""
        threading.Thread(target=self.state.must_go, args=("this node was told to leave (SIGTERM)",)).start()

    def remember_oom_kills(self) -> None:
        """Note the cgroup's counter, so that a later rise can be blamed on this generation."""
        self.oom_kills_before = _oom_kills()


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
