"""The agent process: `python -m cluster.agent_main RUN_DIR NODE`. A composition root.

It outlives its workers. It owns the node's shared memory (heartbeat slots, snapshot segments), runs torch elastic,
persists snapshots in the background, and speaks to the supervisor. Secrets come from a file, never from arguments.
"""

from __future__ import annotations

import logging
import os
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
from cluster.messages import HeldInfo, Order, Plan, RankBeat, WorkerExit
from cluster.rundir import RunDir, safe_name
from cluster.wire import AgentLink
from configs.load import load_job
from configs.schema import JobConfig
from trainer.events import Fact, FactKind, HeartbeatFile, WorkerError, WorkerStart
from trainer.paths import (
    copies_dir,
    error_path,
    facts_path,
    heartbeat_path,
    rank_log,
    segments_dir,
    transfer_key_path,
)

_MONITOR_INTERVAL_S = 0.02
_LOG_TAIL_LINES = 40

if TYPE_CHECKING:
    from checkpointing.copies import Located
    from checkpointing.layout import ShardRef
    from checkpointing.replicator import CopyEvent
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
        from checkpointing.copies import CopyStore
        from checkpointing.gather import Gatherer
        from checkpointing.persister import Persister
        from checkpointing.ratelimit import RateLimit
        from checkpointing.replicator import Replicator
        from checkpointing.store import NodeStore
        from checkpointing.transfer_server import TransferServer

        shutil.rmtree(self.ram_dir, ignore_errors=True)
        segments_dir(self.ram_dir).mkdir(mode=0o700, parents=True)
        self.run_dir.logs(self.node).mkdir(parents=True, exist_ok=True)
        self.slots.open()
        policy = self.config.checkpoint
        node_dir = self.run_dir.node_root(policy.node_dir) / self.node if policy.node_dir else None
        segments, key = segments_dir(self.ram_dir), transfer_key_path(self.run_dir.path).read_bytes()
        self.store = NodeStore(
            segments, self.run_dir.path, policy.keep_last, policy.keep_every_steps, node_dir, policy.keep_best
        )
        self.copies = CopyStore(copies_dir(self.ram_dir))
        self.server = TransferServer(self.state.host, key, self.find, self.copies)
        self.state.peer_address = f"{self.state.host}:{self.server.start()}"
        limit = RateLimit(policy.peer_max_mb_per_s * 1e6) if policy.peer_max_mb_per_s else None
        self.replicator = Replicator(segments, key, policy.peer_interval_steps, limit, self.on_copy_event)
        self.gatherer = Gatherer(self.store, self.copies, key, self.ram_dir)
        self.state.on_order = self.on_order
        self.persister = Persister(self.store, self.on_store_event)
        self.persister.start()
        self.replicator.start()

    def close(self) -> None:
        """Give everything back."""
        self.replicator.stop()
        self.server.close()
        self.persister.stop()
        self.slots.close()
        self.copies.close()
        self.store.close()
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        # The last node of this machine takes the run's folder along; the others find it not empty.
        if self.ram_dir.parent.exists() and not any(self.ram_dir.parent.iterdir()):
            self.ram_dir.parent.rmdir()

    def take_inventory(self) -> Sequence[HeldInfo]:
        """The shards on this node, verified; called only while no worker runs."""
        held = [*self.store.inventory(), *self.copies.held()]
        return [HeldInfo(s.rank, s.world_size, s.step, s.generation, s.tier.value) for s in held]

    def find(self, ref: ShardRef) -> Located | None:
        """Where a shard that a peer asks for lies on this node."""
        return self.store.find(ref) or self.copies.find(ref)

    def on_order(self, order: Order) -> None:
        """The supervisor spoke: copies go to these, and are taken of no history older than the plan's."""
        self.replicator.send_to(order.copy_to)
        if order.plan is not None:
            plan = order.plan
            self.copies.forget_before(plan.ram_generation if plan.ram_step >= 0 else plan.generation)

    def worker_argument(self, plan: Plan) -> str:
        """What a worker of this plan gets to know, as JSON; first, what its rank lacks is brought into memory."""
        self.plan = plan
        for local_rank in self.local_ranks:
            error_path(self.ram_dir, local_rank).unlink(missing_ok=True)
        order = self.state.order()
        self._gather(plan, order)
        start = WorkerStart(
            run_dir=str(self.run_dir.path),
            node=self.node,
            generation=plan.generation,
            ram_dir=str(self.ram_dir),
            ram_step=plan.ram_step,
            rejected=order.rejected,
            peers=tuple(dict.fromkeys([*order.copy_to, *(a for each in order.gather for a in each.addresses)])),
            wait_for_copies=bool(order.copy_to),
        )
        return msgspec.json.encode(start).decode()

    def _gather(self, plan: Plan, order: Order) -> None:
        from checkpointing.gather import Gathered, Need
        from checkpointing.layout import ShardRef

        def done(result: Gathered) -> None:
            rank, mb = result.need.ref.rank, result.size_bytes / 1e6
            if result.problem:
                self.note(FactKind.SNAPSHOT_FAILED, plan.ram_step, f"shard of rank {rank} not had: {result.problem}")
            else:
                detail = f"shard of rank {rank} from {result.origin}, {mb:,.1f} MB"
                self.note(FactKind.GATHERED, plan.ram_step, detail, rank=rank, seconds=result.seconds)

        needs = [
            Need(ShardRef(plan.ram_generation, plan.ram_step, s.rank), s.rank - self.first_rank(), s.addresses)
            for s in order.gather
        ]
        if needs and order.plan == plan:
            self.gatherer.gather(needs, done)

    def note(
        self, kind: FactKind, step: int, detail: str, rank: int = -1, seconds: float = 0.0, generation: int = -1
    ) -> None:
        """Tell the supervisor a fact of this node's own; generation: of the snapshot, if it is not the plan's."""
        now = self.plan.generation if self.plan else 0
        fact = Fact(
            kind=kind, node=self.node, rank=rank, generation=now if generation < 0 else generation, step=step,
            t_wall_s=time.time(), detail=detail, seconds=seconds,
        )  # fmt: skip
        self.state.note(fact)

    def on_copy_event(self, event: CopyEvent) -> None:
        """Copies on peers fell behind, or caught up."""
        kind = FactKind.TIER_BEHIND if event.behind else FactKind.TIER_CAUGHT_UP
        words = f"copies on peers fall behind: {event.detail}" if event.behind else "copies on peers are complete again"
        self.note(kind, event.step, words, rank=event.rank, generation=event.generation)

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
        self.note(kinds[event.kind], event.step, event.detail, event.rank, event.seconds, event.generation)

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


def run_node(node: Node) -> None:
    """Run torch elastic until the supervisor lets the node go."""
    from cluster.elastic import AssignedRendezvous, NodeElasticAgent, WorkerDeath
    from trainer.main import worker_main

    rendezvous = AssignedRendezvous(node.node, node.state.host, node.state)

    def on_deaths(deaths: Sequence[WorkerDeath]) -> None:
        node.forward_facts()  # what they had to say comes before how they ended
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
            node.told_to_leave,
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
    node.state.domain = os.environ.get("EVERSTEP_FAILURE_DOMAIN", "")
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
