"""One node as its agent sees it: heartbeats, facts and ends of its workers, and its snapshots (`cluster.tiers`)."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from cluster.agent import AgentState
from cluster.collecting import Collector, Worker
from cluster.messages import Assignment, HeldInfo, Order, RankBeat, RankTimes, WorkerExit
from cluster.oom import OomWatch
from cluster.rundir import RunDir
from cluster.tiers import NodeTiers
from configs.schema import JobConfig
from configs.timeouts import derive
from health.logtext import shorten_log
from trainer.events import Fact, HeartbeatFile, WorkerError, WorkerStart
from trainer.paths import error_path, facts_path, heartbeat_path, rank_log, segments_dir, times_path
from trainer.timings import NewSteps, TimesFile

_LOG_TAIL_BYTES = 65536

logger = logging.getLogger("everstep.node")


class Node:
    """One node: the pieces of the agent and the callbacks that tie them together."""

    def __init__(self, run_dir: RunDir, config: JobConfig, node: str, host: str) -> None:
        self.run_dir = run_dir
        self.config = config
        self.node = node
        self.ram_dir = run_dir.ram_root(config.checkpoint.ram_dir) / node
        self.local_ranks = range(config.cluster.ranks_per_node)
        self.state = AgentState(node, host, self.take_inventory)
        self.plan: Assignment | None = None
        self.slots = HeartbeatFile(heartbeat_path(self.ram_dir), len(self.local_ranks))
        self.step_times = TimesFile(times_path(self.ram_dir), len(self.local_ranks))
        self.new_steps = NewSteps(self.step_times)
        self.worker_pids: Callable[[], dict[int, int]] = dict
        self.collector = Collector(self.ram_dir, self.workers, self.state.show, derive(config).evidence_s)
        self.facts_read = [0] * len(self.local_ranks)
        self._facts_lock = threading.Lock()
        self._facts_problem = ""
        self.oom = OomWatch()
        self.log_starts: dict[int, int] = {}

    def open(self) -> None:
        """Make the node's folder in shared memory, empty: what an earlier agent left is not trusted."""
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        segments_dir(self.ram_dir).mkdir(mode=0o700, parents=True)
        self._folder = os.open(self.ram_dir, os.O_RDONLY | os.O_DIRECTORY)
        self.run_dir.logs(self.node).mkdir(parents=True, exist_ok=True)
        self.slots.open()
        self.step_times.open()
        self.state.times = self.times
        self.tiers = NodeTiers(self.run_dir, self.config, self.node, self.ram_dir, self.state)
        self.state.on_order = self._obey
        self.tiers.open()

    def close(self) -> None:
        """Give everything back. What the node's next agent has made in the meantime, under the same names, stays."""
        mine = self._has_its_folder()
        self.tiers.close(remove=mine)
        self.slots.close()
        self.step_times.close()
        os.close(self._folder)
        if not mine:
            return
        shutil.rmtree(self.ram_dir, ignore_errors=True)
        # The last node of this machine takes the run's folder along; the others find it not empty.
        if self.ram_dir.parent.exists() and not any(self.ram_dir.parent.iterdir()):
            self.ram_dir.parent.rmdir()

    def _has_its_folder(self) -> bool:
        """Whether the folder in shared memory is still the one that was made; it is held open, so no other is alike."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(self.ram_dir.stat(), os.fstat(self._folder))
        return False

    def take_inventory(self) -> Sequence[HeldInfo]:
        """The shards on this node, verified; called only while no worker runs."""
        # What the last ones had to say comes before the next plan: it may name no snapshot that they found to be wrong.
        self.forward_facts()
        return self.tiers.inventory()

    def worker_argument(self, plan: Assignment) -> str:
        """What a worker of this plan gets to know, as JSON; first, what its rank lacks is brought into memory."""
        self.plan = plan
        self.oom.begin()
        for local_rank in self.local_ranks:
            error_path(self.ram_dir, local_rank).unlink(missing_ok=True)
            # Logs go on over restarts, but a worker's end is judged by its own words.
            self.log_starts[local_rank] = _size(self._log(local_rank))
        order = self.state.order()
        self.tiers.begin(plan, order)
        start = WorkerStart(
            run_dir=str(self.run_dir.path),
            node=self.node,
            generation=plan.generation,
            ram_dir=str(self.ram_dir),
            ram_step=plan.ram_step,
            rejected=order.rejected,
            abandoned=order.abandoned,
            left_out=order.left_out,
            peers=tuple(dict.fromkeys([*order.copy_to, *(a for each in order.gather for a in each.addresses)])),
            wait_for_copies=self.tiers.may_send_copies,
            node_dir=str(self.tiers.node_dir or ""),
            layout=plan.layout,
            recipe=order.recipe,
        )
        return msgspec.json.encode(start).decode()

    def workers(self) -> Sequence[Worker]:
        """The workers that run now."""
        first = self.first_rank() if self.plan is not None else 0
        return [Worker(local_rank, first + local_rank, pid) for local_rank, pid in self.worker_pids().items()]

    def _obey(self, order: Order) -> None:
        self.tiers.obey(order)
        self.collector.obey(order)

    def first_rank(self) -> int:
        """Global rank of local rank 0."""
        return self.plan.ranks.start if self.plan else 0

    def beats(self, pids: dict[int, int]) -> Sequence[RankBeat]:
        """Newest heartbeat and process state of every local rank."""
        first = self.first_rank()
        self.oom.follow(pids.values())
        return [
            RankBeat(first + local_rank, pid, _process_state(pid), self.slots.read(local_rank))
            for local_rank, pid in pids.items()
        ]

    def times(self) -> Sequence[RankTimes]:
        """Where the time of every local rank's newest steps went."""
        if self.plan is None:
            return ()
        first, generation = self.first_rank(), self.plan.generation
        return [RankTimes(first + local, self.new_steps.read(local, generation)) for local in self.local_ranks]

    def all_begun(self) -> bool:
        """Whether every worker of the current generation runs its own code by now."""
        beats = [self.slots.read(local_rank) for local_rank in self.local_ranks]
        return self.plan is not None and all(b is not None and b.generation == self.plan.generation for b in beats)

    def forward_facts(self) -> None:
        """Pass on what workers wrote since the last call. A line that is none is left out; what cannot be read now is
        read the next time."""
        with self._facts_lock:
            for local_rank in self.local_ranks:
                try:
                    lines, problem = self._new_fact_lines(local_rank), ""
                except OSError as error:
                    lines, problem = (), str(error)
                if problem not in ("", self._facts_problem):
                    logger.warning("what workers write cannot be read for now: %s", problem)
                self._facts_problem = problem or self._facts_problem
                for line in lines:
                    try:
                        self.state.note(msgspec.json.decode(line, type=Fact))
                    except msgspec.DecodeError as error:
                        logger.warning("local rank %d wrote what is no fact (%s): %r", local_rank, error, line[:200])

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
        log_tail = shorten_log(_tail(self._log(local_rank), self.log_starts.get(local_rank, 0)))
        oom_scope = self.oom.scope() if signal_number == signal.SIGKILL else ""
        return WorkerExit(
            rank=self.first_rank() + local_rank,
            generation=self.plan.generation if self.plan else 0,
            exit_code=exit_code,
            signal_number=signal_number,
            error=error,
            log_tail=log_tail,
            oom_kill=oom_scope != "",
            # The file was written when the worker failed; that it has ended was seen only later.
            t_wall_s=error_file.stat().st_mtime if error else time.time(),
            oom_scope=oom_scope,
            ram_free_bytes=_free_bytes(self.ram_dir),
        )

    def _log(self, local_rank: int) -> Path:
        return rank_log(self.run_dir.path, self.node, self.first_rank() + local_rank)

    def told_to_leave(self) -> None:
        """SIGTERM while workers run: the node is about to be taken away. In a thread: a signal handler may not wait."""
        threading.Thread(target=self.state.must_go, args=("this node was told to leave (SIGTERM)",)).start()


def _process_state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return stat.rpartition(")")[2].split()[0]


def _tail(path: Path, start: int) -> list[str]:
    """The last lines of a file, of those that were written behind byte `start`."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _free_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
